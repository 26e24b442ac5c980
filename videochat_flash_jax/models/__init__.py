"""The modules of the paper's figure, in the order in which data passes through them.

  UMT              video encoder: maps clips of 4 frames to patch tokens
  InternVideo2     the other video encoder, with the same interface
  Connector        clip-level compression: token merging, then an MLP into the decoder's width
  Qwen2            decoder
  VideoChatFlash   the whole model: encode, compress, splice, decode

Each name is imported when it is first used, so that `data` reads `models.config` without JAX.
"""

from videochat_flash_jax.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
  __name__,
  {
    "UMT": "umt",
    "InternVideo2": "internvideo2",
    "Connector": "connector",
    "Qwen2": "qwen2",
    "VideoChatFlash": "videochat_flash",
  },
)
