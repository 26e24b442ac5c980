"""Checks that inference can run, before anything is read or compiled, and says what failed."""

import contextlib
from collections.abc import Iterator

import jax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.parallel.layout import Layout

SMALLEST_PIECE = 64  # tokens; in a piece of a video that is read at once


def check_mesh(config: VideoChatFlashConfig, layout: Layout) -> None:
  """Checks that a model can be split over a mesh for inference.

  Raises:
    InputError: names the axis of the mesh, and the number that it must divide.
  """
  if layout.mesh is None:
    return
  if SMALLEST_PIECE % layout.slot_shards:
    raise InputError(
      f"mesh.data x mesh.fsdp x mesh.sequence is {layout.slot_shards}, over which inference splits "
      f"the cache of a video; make it a divisor of {SMALLEST_PIECE} by another mesh (--tensor, "
      "--sequence)"
    )
  check_tensor(config, layout.mesh.shape["tensor"])


def check_tensor(config: VideoChatFlashConfig, num_shards: int) -> None:
  """Checks that a model can be split over so many devices of the mesh's axis `tensor`.

  Raises:
    InputError: names what it must divide.
  """
  for field in ("num_kv_heads", "num_heads", "mlp_width", "vocab_size"):
    size = getattr(config.decoder, field)
    if size % num_shards:
      raise InputError(
        f"mesh.tensor is {num_shards}, but {config.name} has {field} {size}, which cannot be split "
        f"evenly; give mesh.tensor (--tensor) a divisor of {size}"
      )


def model_card_dropout(config: VideoChatFlashConfig) -> DropoutConfig:
  """The dropout of `--dropout`, for a model.

  Raises:
    InputError: the model has too few layers for it.
  """
  dropout, depth = DropoutConfig.model_card(), config.decoder.depth
  if depth <= max(dropout.layers):
    raise InputError(
      f"--dropout drops tokens at layers {' and '.join(map(str, dropout.layers))}, but "
      f"{config.name} has {depth} layers; leave it out"
    )
  return dropout


@contextlib.contextmanager
def naming_what_needs_memory(program: str, shape: str) -> Iterator[None]:
  """Turns the error of a device without memory into one that says what needed it, and what helps.

  Args:
    program: that runs in the block.
    shape: sizes of its arrays, for the message.

  Raises:
    InputError: the device has too little memory.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise InputError(
      f"the device has no memory left for the program {program!r} of shape {shape}; give fewer "
      "frames (max_frames) or a window, weights='int8', cache='int8' or 'int4', dropout, or more "
      "devices by mesh; vcflash fit tells what fits"
    ) from error
