"""Checks that inference can run, made before anything is read or compiled."""

import jax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.ops import splash
from videochat_flash_jax.parallel.layout import Layout


def check_mesh(config: VideoChatFlashConfig, layout: Layout) -> None:
  """Checks that a model can be split over a mesh for inference.

  Raises:
    InputError: names the axis of the mesh, and the number that it must divide.
  """
  if layout.mesh is None:
    return
  if layout.sequence_shards > 1:
    raise InputError(
      f"mesh.sequence is {layout.sequence_shards}, but only training splits the tokens of a row; "
      "give mesh.sequence=1. In inference mesh.tensor splits the cache of a long video"
    )
  decoder, num_shards = config.decoder, layout.mesh.shape["tensor"]
  for field in ("num_kv_heads", "num_heads", "mlp_width", "vocab_size"):
    size = getattr(decoder, field)
    if size % num_shards:
      raise InputError(
        f"mesh.tensor is {num_shards}, but {config.name} has {field} {size}, which cannot be split "
        f"evenly; give mesh.tensor a divisor of {size}"
      )


def check_length(layout: Layout, num_tokens: int, num_keys: int) -> None:
  """Checks that the tables of the TPU's attention kernel can hold the tokens read at once.

  Token dropout does not raise the limit, because the layers before the first drop read all tokens.
  A mesh does not raise it either, because inference splits the heads and not the tokens of a row.

  Args:
    layout: the devices. Devices other than TPUs have no limit.
    num_tokens: tokens read at once, with padding.
    num_keys: keys that they attend to: the tokens themselves, or all slots of a cache.

  Raises:
    InputError: there are too many.
  """
  mesh = layout.mesh
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if platform == "tpu" and not splash.fits(num_tokens, num_keys):
    raise InputError(
      f"{num_tokens:,} tokens of a prompt (padded) that attend to {num_keys:,} are too many for a "
      f"TPU core, which takes at most {splash.MOST_TOKENS:,} in one reading; use fewer frames or "
      "a shorter text (of a config: fewer tokens_per_row)"
    )
