"""What is said when a device has too little memory."""

import jax
import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.testing.dummy import dummy_model

FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
BUG = jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.fixture(scope="module")
def engine():
  return Engine(dummy_model(), stop_ids=[3])


def failing(error):
  def run(*_, **__):
    raise error

  run.__name__ = "encode"
  return run


@pytest.mark.parametrize("name", ["encode", "read", "forget", "decode"])
def test_a_device_without_memory_is_an_error_that_names_program_shape_and_remedies(
  engine, monkeypatch, name
):
  reading = engine.read([np.arange(5, 25)], 4)
  monkeypatch.setattr(programs, name, failing(FULL))
  with pytest.raises(InputError, match=f"'{name}' of shape .*max_frames.*int8.*mesh"):
    use(engine, name, reading)


def use(engine, name, reading):
  if name == "encode":
    engine.encode(np.zeros((1, 4, 32, 32, 3), np.uint8))
  elif name == "read":
    engine.read([np.arange(5, 25)], 4)
  elif name == "forget":
    engine.forget(engine.empty_prefix_cache(range(3), 4096), 0, 64)
  else:
    next(engine.write(reading, 4))


def test_other_errors_keep_their_traceback(engine, monkeypatch):
  monkeypatch.setattr(programs, "read", failing(BUG))
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    engine.read([np.arange(5, 25)], 4)
