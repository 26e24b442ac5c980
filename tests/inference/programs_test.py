"""What `vcflash compile` compiles is what the engine runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.engine import Engine, Prompt
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

TOKENS, VISUAL, NEW = 100, 70, 40
DROPOUT = {
  "off": None,
  "on": DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25)),
}


def shapes(tree):
  return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


class Taken(Exception):
  """What a program was given."""


def taken_by(monkeypatch, name, run):
  """What the engine gives to one of its programs, which is not run."""

  def take(*arguments):
    raise Taken(arguments)

  with monkeypatch.context() as patch:
    patch.setattr(programs, name, take)
    with pytest.raises(Taken) as taken:
      run()
  return taken.value.args[0]


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.slow
def test_the_engine_pads_prompts_as_the_compiled_programs_say(monkeypatch, dropout):
  config = dataclasses.replace(VideoChatFlashConfig.tiny(), dropout=DROPOUT[dropout])
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  model = VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
  engine = Engine(model, stop_ids=[1], layout=Layout(mesh))
  index = np.where(np.arange(TOKENS) < VISUAL, np.arange(TOKENS), -1).astype(np.int32)
  visual_tokens = jnp.zeros((VISUAL, config.decoder.width), jnp.bfloat16)
  prompt = Prompt(np.zeros(TOKENS, np.int32), index, visual_tokens)
  sizes = {"rows": 1, "num_tokens": TOKENS, "num_visual": VISUAL, "max_new_tokens": NEW}

  given = taken_by(monkeypatch, "prefill", lambda: engine.read([prompt], NEW))
  _, said = programs.prefill_program(config, mesh, **sizes)
  assert shapes(given[2:-1]) == shapes(said[2:-1])
  assert given[-1] == said[-1], "slots"

  reading = engine.read([prompt], NEW)
  given = taken_by(monkeypatch, "decode", lambda: next(engine.write(reading, NEW)))
  _, said = programs.decode_program(config, mesh, **sizes)
  caches_logits_finished = slice(3, 6)
  assert shapes(given[caches_logits_finished]) == shapes(said[caches_logits_finished])


def test_more_to_see_than_to_read_is_refused_with_the_fields_to_change():
  config, mesh = VideoChatFlashConfig.tiny(), make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(InputError, match="tokens_per_row or fewer clips_per_shard") as error:
    programs.prefill_program(
      config, mesh, rows=1, num_tokens=1024, num_visual=1025, max_new_tokens=NEW
    )
  assert "1,024 tokens has no room for 1,025 visual ones" in str(error.value)
