"""Models of golden families: sizes from their manifests, weights through the real converter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.checkpoints.convert import flat_weights
from videochat_flash_jax.checkpoints.hub.hf_mapping import hub_tensors
from videochat_flash_jax.checkpoints.hub.safetensors_files import StoredTensor
from videochat_flash_jax.checkpoints.hub.weights import load_weights
from videochat_flash_jax.models.config import DecoderConfig, VisionConfig
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.layer_stack import LayerStack

# What stands before the names of a part's tensors when the whole model is stored.
HUB_PREFIX = {
  "vision": "model.vision_tower.vision_tower.",
  "connector": "model.mm_projector.",
  "decoder": "",
}


def load_golden(
  make: Callable[[], nnx.Module], tensors: dict[str, np.ndarray], part: str | None = None
) -> nnx.Module:
  """A whole model, or one part of it, with golden tensors as its weights."""
  graph, state = nnx.split(nnx.eval_shape(make))
  home = f"{part}." if part else ""
  shapes = {home + path: leaf.shape for path, leaf in flat_weights(state)}
  prefix = HUB_PREFIX[part] if part else ""
  stored = {prefix + name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
  weights = load_weights("golden", stored, shapes)
  filled = [
    (path, leaf.replace(jnp.asarray(weights[home + ".".join(map(str, path))])))
    for path, leaf in nnx.to_flat_state(state)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def vision_config(sizes: dict, mlp_width: int) -> VisionConfig:
  # The original lays its table out for the patches at hand at 224 pixels, else for 14 x 14.
  position_grid = 224 // sizes["patch_size"] if sizes["img_size"] == 224 else 14
  return VisionConfig(
    kind="umt",
    image_size=sizes["img_size"],
    patch_size=sizes["patch_size"],
    width=sizes["embed_dim"],
    depth=sizes["blocks_present"],
    num_heads=sizes["num_heads"],
    mlp_width=mlp_width,
    position_frames=sizes.get("ckpt_num_frame", 4),
    position_grid=position_grid,
  )


def decoder_config(sizes: dict) -> DecoderConfig:
  return DecoderConfig(
    vocab_size=sizes["vocab_size"],
    width=sizes["hidden_size"],
    depth=sizes["num_hidden_layers"],
    num_heads=sizes["num_attention_heads"],
    num_kv_heads=sizes["num_key_value_heads"],
    head_size=sizes["hidden_size"] // sizes["num_attention_heads"],
    mlp_width=sizes["intermediate_size"],
    rope_theta=sizes["rope_theta"],
    norm_eps=sizes["rms_norm_eps"],
    tied_embeddings=sizes["tie_word_embeddings"],
    max_positions=sizes["max_position_embeddings"],
  )


def pixels_of(u8: np.ndarray, upsample: int) -> jax.Array:
  """Stored bytes [..., 3, h, w] to normalised pixels [..., height, width, 3]."""
  pixels = (np.moveaxis(u8, -3, -1).astype(np.float32) - 128) / 64
  return jnp.asarray(pixels.repeat(upsample, axis=-3).repeat(upsample, axis=-2))


class RecordedLayers:
  """A stack of layers that keeps what enters the first layer and leaves each."""

  def __init__(self, stack: LayerStack):
    self.stack = stack
    self.states = None  # [depth + 1, ...] after a run

  def run(self, apply, carry):
    def apply_and_keep(layer, index, carry):
      inner, states = carry
      inner = apply(layer, index, inner)
      return inner, states.at[index + 1].set(inner[0])

    states = jnp.broadcast_to(carry[0], (self.stack.depth + 1, *carry[0].shape))
    carry, self.states = self.stack.run(apply_and_keep, (carry, states))
    return carry


@nnx.jit
def read(decoder, x, cache, num_tokens):
  """The logits after the new tokens `x` of each row, and the cache with them."""
  hidden, cache = decoder.read(x, cache, num_tokens)
  return decoder.logits(decoder.norm(hidden[jnp.arange(len(x)), num_tokens - 1])), cache


def decode_greedily(decoder: nnx.Module, prompts: list[jax.Array], num_tokens: int, width: int):
  """Greedy tokens after embedded prompts [T, D], read as one batch of rows padded to `width`.

  Returns:
    tokens [B, num_tokens], the logits that chose them [B, num_tokens, vocab], and the lengths
    [num_tokens - 1, layers, B] of every layer's cache before each chosen token was read.
  """
  config, lengths = decoder.config, jnp.array([len(prompt) for prompt in prompts], jnp.int32)
  batch = jnp.stack([jnp.pad(prompt, ((0, width - len(prompt)), (0, 0))) for prompt in prompts])
  cache = KVCache.empty(config, len(batch), width + num_tokens, depth=config.depth)
  logits, cache = read(decoder, batch, cache, lengths)
  all_logits, cache_lengths = [logits], []
  for _ in range(num_tokens - 1):
    cache_lengths.append([cache.length[:, 0]] * cache.depth)
    x = decoder.embed(all_logits[-1].argmax(-1)[:, None])
    logits, cache = read(decoder, x, cache, jnp.ones_like(lengths))
    all_logits.append(logits)
  all_logits = np.stack(all_logits, axis=1)
  return all_logits.argmax(-1), all_logits, np.array(cache_lengths)


def hub_gradients(grads: nnx.State, part: str | None = None) -> dict[str, np.ndarray]:
  """Gradients of a whole model, or of one part, by the names and layouts of golden weights."""
  home = f"{part}." if part else ""
  arrays = {home + path: np.asarray(leaf) for path, leaf in flat_weights(grads)}
  prefix = HUB_PREFIX[part] if part else ""
  named = {}
  for name, tensor in hub_tensors({path: array.shape for path, array in arrays.items()}).items():
    array = arrays[tensor.path]
    array = array if tensor.layer is None else array[tensor.layer]
    named[name.removeprefix(prefix)] = tensor.conversion.to_hub(array)
  return named
