"""The modules of the paper's figure, in the order in which data passes through them.

  UMT              video encoder: maps clips of 4 frames to patch tokens
  InternVideo2     the other video encoder, with the same interface
  Connector        clip-level compression: token merging, then an MLP into the decoder's width
  Qwen2            decoder
  VideoChatFlash   the whole model: encode, compress, splice, decode

| file              | what it does |
|-------------------|--------------|
| `videochat_flash` | the paper's figure as code |
| `config`          | the sizes of a model; one constructor per released checkpoint |
| `umt`             | the video encoder of most released models |
| `internvideo2`    | the video encoder of one released model |
| `connector`       | merges the tokens of a clip and projects them |
| `token_merging`   | token merging (ToMe) as pure functions |
| `splice`          | puts visual tokens into the text sequence |
| `qwen2`           | the decoder |
| `layer_stack`     | equal layers, run by a scan |
| `kv_cache`        | keys and values of the tokens that were read |
| `token_dropout`   | which visual tokens are dropped between layers |

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
