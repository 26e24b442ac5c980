"""What a TPU cannot read at once is refused before it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.engine import Engine, Prompt
from videochat_flash_jax.inference.limits import check_length
from videochat_flash_jax.ops import splash
from videochat_flash_jax.parallel.layout import ONE_DEVICE
from videochat_flash_jax.testing.dummy import dummy_model

HALF_A_MILLION = 1 << 19


@pytest.fixture
def on_tpu(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize(
  "num_tokens, num_keys", [(HALF_A_MILLION, HALF_A_MILLION), (1024, 1 << 28), (64, 1 << 20)]
)
def test_what_a_core_has_tables_for_is_read(num_tokens, num_keys):
  check_length(ONE_DEVICE, num_tokens, num_keys)


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize(
  "num_tokens, num_keys", [(3 << 18, 3 << 18), (HALF_A_MILLION, 3 << 18), (2048, 1 << 28)]
)
def test_more_is_refused_with_the_limit_and_what_helps_at_inference(num_tokens, num_keys):
  with pytest.raises(InputError, match="at most 524,288 in one reading; use fewer frames") as error:
    check_length(ONE_DEVICE, num_tokens, num_keys)
  assert f"{num_tokens:,} tokens" in str(error.value) and "mesh.sequence" not in str(error.value)


def test_elsewhere_there_is_no_such_limit():
  check_length(ONE_DEVICE, 1 << 20, 1 << 20)


def test_the_engine_refuses_before_it_compiles(monkeypatch):
  engine = Engine(dummy_model(), stop_ids=[3])
  width = engine.config.decoder.width
  prompt = Prompt(np.arange(5, 25), np.full(20, -1, np.int32), jnp.zeros((1, width), engine.dtype))
  reading = engine.read([prompt], 4)

  def never(*_, **__):
    raise AssertionError("compiled")

  monkeypatch.setattr(programs, "prefill", never)
  monkeypatch.setattr(programs, "extend", never)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(splash, "_TABLE_ENTRIES", 0)
  for before in (None, reading):
    with pytest.raises(InputError, match="64 tokens of a prompt"):
      engine.read([prompt], 4, after=before)
