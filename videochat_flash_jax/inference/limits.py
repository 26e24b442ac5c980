"""What cannot be computed at inference, refused before anything is read or compiled."""

import jax

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.ops import splash
from videochat_flash_jax.parallel.layout import Layout


def check_mesh(config: VideoChatFlashConfig, layout: Layout) -> None:
  """Refuses a mesh over which a model cannot be split for inference, before anything is compiled.

  Raises:
    InputError: names the axis of the mesh, and what it must divide.
  """
  if layout.mesh is None:
    return
  if layout.sequence_shards > 1:
    raise InputError(
      f"mesh.sequence is {layout.sequence_shards}, but only training splits the tokens of a row; "
      "give mesh.sequence=1: in inference mesh.tensor shares out the cache of a long video"
    )
  decoder, parts = config.decoder, layout.mesh.shape["tensor"]
  for of_what in ("num_kv_heads", "num_heads", "mlp_width", "vocab_size"):
    size = getattr(decoder, of_what)
    if size % parts:
      raise InputError(
        f"mesh.tensor is {parts}, but {config.name} has {of_what} {size}, which cannot be shared "
        f"out evenly; give mesh.tensor a divisor of {size}"
      )


def check_length(layout: Layout, num_tokens: int, num_keys: int) -> None:
  """Refuses to read more tokens at once than the attention kernel of TPUs has tables for.

  All layers before the first drop see all tokens, so dropout does not help; nor does a mesh, which
  shares out heads and not the tokens of a row.

  Args:
    layout: whose devices read; on others than TPUs there is no limit.
    num_tokens: that are read at once, padded.
    num_keys: that they attend to: themselves, or all slots of a cache.

  Raises:
    InputError: they are too many.
  """
  mesh = layout.mesh
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if platform == "tpu" and not splash.fits(num_tokens, num_keys):
    raise InputError(
      f"{num_tokens:,} tokens of a prompt (padded) that attend to {num_keys:,} are too many for a "
      f"TPU core, which takes at most {splash.MOST_TOKENS:,} in one reading; use fewer frames or "
      "a shorter text (of a config: fewer tokens_per_row)"
    )
