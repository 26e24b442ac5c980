"""The peer of our decoder: Qwen2 of `transformers`, on the same work; needs the extra `bench`."""

from typing import Any

import numpy as np

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.models.config import DecoderConfig


class Qwen2Peer:
  """`Qwen2Model` in float32 on the CPU, with torch's fused attention and the default cache."""

  def __init__(self, config: DecoderConfig, prompt: np.ndarray, new_tokens: int):
    import torch
    import transformers

    torch.set_num_threads(usable_cores())
    self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    self._torch, self._new_cache = torch, transformers.DynamicCache
    self._model = transformers.Qwen2Model(
      transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        attn_implementation="sdpa",
        pad_token_id=None,
      )
    ).eval()
    self._prompt, self._new_tokens = torch.from_numpy(prompt), new_tokens
    self._cache: Any = None

  def prefill(self):
    """Reads the prompt."""
    self._cache = self._new_cache()
    self._read(self._prompt)

  def decode(self):
    """Decodes the new tokens after `prefill`; to be called once per prefill."""
    x = self._prompt[:, -1:]
    for _ in range(self._new_tokens):
      x = self._read(x)

  def _read(self, x):
    with self._torch.inference_mode():
      output = self._model(inputs_embeds=x, past_key_values=self._cache, use_cache=True)
    return output.last_hidden_state
