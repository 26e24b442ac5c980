"""Upstream's names for weights and config fields, and ours: the only place that knows them."""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np


class Conversion(NamedTuple):
  """How an array of the hub becomes one of ours, and back."""

  from_hub: Callable[[np.ndarray], np.ndarray]
  to_hub: Callable[[np.ndarray], np.ndarray]


def _patches_to_hub(kernel):
  size = round((kernel.shape[0] // 3) ** 0.5)
  return kernel.reshape(1, size, size, 3, -1).transpose(4, 3, 0, 1, 2)


SAME = Conversion(lambda x: x, lambda x: x)
ROWS = Conversion(lambda x: x[0], lambda x: x[None])  # there [1, rows, E]
LINEAR = Conversion(lambda x: x.T, lambda x: x.T)  # torch keeps [out, in], we [in, out]
# A convolution over whole patches [E, 3, 1, size, size] is a product with [size * size * 3, E].
PATCHES = Conversion(lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]), _patches_to_hub)

_IN_ENCODER = r"(?:encoder\.)?"  # UMT's names have it, InternVideo2's do not
_TOWER = r"model\.vision_tower\.vision_tower\." + _IN_ENCODER
_BLOCK = _TOWER + r"blocks\.(?P<layer>\d+)"
# The released InternVideo2 stores `gamma` where the original's module says `weight`: transformers
# used to rename it while loading. Either is read; `gamma` is written, as it was released.
_GAMMA = r"(?:gamma|weight)"
_LAYER = r"model\.layers\.(?P<layer>\d+)"

# Name on the hub -> path here. A path through `stacked` holds all layers along its first axis.
RULES: tuple[tuple[str, str, Conversion], ...] = (
  (_TOWER + r"patch_embed\.proj\.weight", "vision.patch_embed.kernel", PATCHES),
  (_TOWER + r"patch_embed\.proj\.bias", "vision.patch_embed.bias", SAME),
  (_TOWER + r"cls_token", "vision.class_token", ROWS),
  (_TOWER + r"pos_embed", "vision.video_positions", ROWS),
  (_TOWER + r"img_pos_embed", "vision.image_positions", ROWS),
  (_BLOCK + r"\.norm1\.weight", "vision.blocks.stacked.norm1.scale", SAME),
  (_BLOCK + r"\.norm1\.bias", "vision.blocks.stacked.norm1.bias", SAME),
  (_BLOCK + r"\.attn\.qkv\.weight", "vision.blocks.stacked.qkv.kernel", LINEAR),
  (_BLOCK + r"\.attn\.q_bias", "vision.blocks.stacked.q_bias", SAME),
  (_BLOCK + r"\.attn\.v_bias", "vision.blocks.stacked.v_bias", SAME),
  (_BLOCK + r"\.attn\.q_norm\.weight", "vision.blocks.stacked.q_norm.scale", SAME),
  (_BLOCK + r"\.attn\.k_norm\.weight", "vision.blocks.stacked.k_norm.scale", SAME),
  (_BLOCK + r"\.attn\.proj\.weight", "vision.blocks.stacked.proj.kernel", LINEAR),
  (_BLOCK + r"\.attn\.proj\.bias", "vision.blocks.stacked.proj.bias", SAME),
  (_BLOCK + r"\.ls1\." + _GAMMA, "vision.blocks.stacked.attention_scale", SAME),
  (_BLOCK + r"\.norm2\.weight", "vision.blocks.stacked.norm2.scale", SAME),
  (_BLOCK + r"\.norm2\.bias", "vision.blocks.stacked.norm2.bias", SAME),
  (_BLOCK + r"\.mlp\.fc1\.weight", "vision.blocks.stacked.fc1.kernel", LINEAR),
  (_BLOCK + r"\.mlp\.fc1\.bias", "vision.blocks.stacked.fc1.bias", SAME),
  (_BLOCK + r"\.mlp\.fc2\.weight", "vision.blocks.stacked.fc2.kernel", LINEAR),
  (_BLOCK + r"\.mlp\.fc2\.bias", "vision.blocks.stacked.fc2.bias", SAME),
  (_BLOCK + r"\.ls2\." + _GAMMA, "vision.blocks.stacked.mlp_scale", SAME),
  (_TOWER + r"vision_layernorm\.weight", "vision.norm.scale", SAME),
  (_TOWER + r"vision_layernorm\.bias", "vision.norm.bias", SAME),
  (r"model\.mm_projector\.mlp\.0\.weight", "connector.fc1.kernel", LINEAR),
  (r"model\.mm_projector\.mlp\.0\.bias", "connector.fc1.bias", SAME),
  (r"model\.mm_projector\.mlp\.2\.weight", "connector.fc2.kernel", LINEAR),
  (r"model\.mm_projector\.mlp\.2\.bias", "connector.fc2.bias", SAME),
  (r"model\.embed_tokens\.weight", "decoder.embed_tokens.embedding", SAME),
  (_LAYER + r"\.input_layernorm\.weight", "decoder.layers.stacked.input_norm.scale", SAME),
  (_LAYER + r"\.self_attn\.q_proj\.weight", "decoder.layers.stacked.q_proj.kernel", LINEAR),
  (_LAYER + r"\.self_attn\.q_proj\.bias", "decoder.layers.stacked.q_proj.bias", SAME),
  (_LAYER + r"\.self_attn\.k_proj\.weight", "decoder.layers.stacked.k_proj.kernel", LINEAR),
  (_LAYER + r"\.self_attn\.k_proj\.bias", "decoder.layers.stacked.k_proj.bias", SAME),
  (_LAYER + r"\.self_attn\.v_proj\.weight", "decoder.layers.stacked.v_proj.kernel", LINEAR),
  (_LAYER + r"\.self_attn\.v_proj\.bias", "decoder.layers.stacked.v_proj.bias", SAME),
  (_LAYER + r"\.self_attn\.o_proj\.weight", "decoder.layers.stacked.o_proj.kernel", LINEAR),
  (
    _LAYER + r"\.post_attention_layernorm\.weight",
    "decoder.layers.stacked.post_attention_norm.scale",
    SAME,
  ),
  (_LAYER + r"\.mlp\.gate_proj\.weight", "decoder.layers.stacked.gate_proj.kernel", LINEAR),
  (_LAYER + r"\.mlp\.up_proj\.weight", "decoder.layers.stacked.up_proj.kernel", LINEAR),
  (_LAYER + r"\.mlp\.down_proj\.weight", "decoder.layers.stacked.down_proj.kernel", LINEAR),
  (r"model\.norm\.weight", "decoder.norm.scale", SAME),
  (r"lm_head\.weight", "decoder.lm_head.kernel", LINEAR),
)


class HubTensor(NamedTuple):
  """One tensor on the hub: the array here that it fills, or one layer of."""

  name: str
  path: str
  layer: int | None
  shape: tuple[int, ...]  # as on the hub
  conversion: Conversion


def hub_tensors(
  shapes: dict[str, tuple[int, ...]], stored: Collection[str] = ()
) -> dict[str, HubTensor]:
  """All tensors on the hub that together fill arrays of these paths and shapes.

  Args:
    shapes: shape of every array of the model by its path, `decoder.norm.scale` and so on.
    stored: names in a checkpoint, where one of them decides between two that a tensor may have.

  Raises:
    KeyError: a path that no rule, or more than one rule, produces.
  """
  by_path: dict[str, tuple[str, Conversion]] = {
    path: (regex, conversion) for regex, path, conversion in RULES
  }
  if len(by_path) != len(RULES):
    raise KeyError("two rules fill the same array")
  encoder = "" if "vision.class_token" in shapes else r"encoder\."
  stored = frozenset(stored)
  tensors = {}
  for path, shape in shapes.items():
    regex, conversion = by_path[path]
    regex = regex.replace(_IN_ENCODER, encoder)
    stacked = ".stacked." in path
    one_layer = np.broadcast_to(np.float32(0), shape[1:] if stacked else shape)
    hub_shape = conversion.to_hub(one_layer).shape
    for layer in range(shape[0]) if stacked else (None,):
      name = _name(regex.replace(r"(?P<layer>\d+)", str(layer)), stored)
      if len(matching := [rule for rule in RULES if re.fullmatch(rule[0], name)]) != 1:
        raise KeyError(f"{name} matches {len(matching)} rules")
      tensors[name] = HubTensor(name, path, layer, hub_shape, conversion)
  return tensors


def _name(regex, stored):
  """The name that `regex` stands for: one that is stored, else the one that is written."""
  names = [regex.replace(_GAMMA, word).replace("\\", "") for word in ("gamma", "weight")]
  return next((name for name in names if name in stored), names[0])
