"""VideoChat-Flash in JAX: ask questions about hours of video.

This file is the public face, and nothing else is public:

  VideoChat             watches a video and answers questions about it
  VideoChatFlashConfig  a model's sizes: one constructor per released checkpoint, and `tiny()`
  DropoutConfig         which visual tokens are dropped on the way through the decoder
  YarnConfig            how far the context is stretched
  MeshConfig            how many devices share the work, and what each axis of them splits
  models                the Flax modules, listed in `models/__init__.py`
  InputError            raised wherever the user's input cannot be used

Each name is imported when it is first used, so `import videochat_flash_jax` is instant.
"""

from videochat_flash_jax.lazy_names import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
  __name__,
  {
    "VideoChat": "inference.chat",
    "VideoChatFlashConfig": "models.config",
    "DropoutConfig": "models.config",
    "YarnConfig": "models.config",
    "MeshConfig": "parallel.mesh_config",
    "models": "models",
    "InputError": "errors",
  },
)
