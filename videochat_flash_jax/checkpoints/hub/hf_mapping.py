"""Maps upstream's names of weights to the paths of our arrays.

Upstream's names of weights appear only here and in `parts`; its config fields only in `hf_config`
and `hf_options`.
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np


class Conversion(NamedTuple):
  """Converts an array of the hub to ours, and back."""

  from_hub: Callable[[np.ndarray], np.ndarray]
  to_hub: Callable[[np.ndarray], np.ndarray]


def _patches_to_hub(kernel):
  size = round((kernel.shape[0] // 3) ** 0.5)
  return kernel.reshape(1, size, size, 3, -1).transpose(4, 3, 0, 1, 2)


SAME = Conversion(lambda x: x, lambda x: x)
ROWS = Conversion(lambda x: x[0], lambda x: x[None])  # hub [1, rows, E], here [rows, E]
LINEAR = Conversion(lambda x: x.T, lambda x: x.T)  # hub [out, in], as in torch; here [in, out]
# A convolution [E, 3, 1, size, size] whose stride is the patch size is the same as a matrix product
# with [size * size * 3, E].
PATCHES = Conversion(lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]), _patches_to_hub)

_IN_ENCODER = r"(?:encoder\.)?"  # in the names of UMT, but not in those of InternVideo2
_TOWER = r"model\.vision_tower\.vision_tower\." + _IN_ENCODER
_BLOCK = _TOWER + r"blocks\.(?P<layer>\d+)"
# The released InternVideo2 stores `gamma` where the original's module says `weight`: transformers
# used to rename it while loading. Both names can be read; `gamma` is written, as in the release.
_GAMMA = r"(?:gamma|weight)"
_LAYER = r"model\.layers\.(?P<layer>\d+)"

# An int8 weight is two tensors: values, with the name of the wide tensor; and scales.
INT8_VALUES, SCALE_OF_INT8 = ".qvalue", "_scale"  # end of a path here; end of a name on the hub

# Tensors that some versions of transformers store although they are computed from the config.
_COMPUTED = re.compile(r"(?:.*\.)?(?:rotary_emb\.\w+|position_ids)")

# Name on the hub -> path here. An array with `stacked` in its path holds all layers along its first
# axis.
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


def may_be_int8(path: str) -> bool:
  """Returns whether a weight may be int8: matrices of the decoder, with the vocabulary's."""
  return re.fullmatch(r"decoder\..*\.(?:kernel|embedding)", path) is not None


# The two arrays of an int8 weight, which is a `qwix.QArray`.
_INT8_RULES = tuple(
  rule
  for name, path, conversion in RULES
  if may_be_int8(path)
  for rule in (
    (name, path + INT8_VALUES, conversion),
    (name + SCALE_OF_INT8, f"{path}.scale", conversion),
  )
)


def is_computed(name: str) -> bool:
  """Returns whether a tensor on the hub follows from the config, so that no model here has it."""
  return _COMPUTED.fullmatch(name) is not None


class HubTensor(NamedTuple):
  """A tensor on the hub, and the array here (or the layer of a stacked array) that it fills.

  Attributes:
    name: its name on the hub.
    path: path of our array.
    layer: index of the layer in a stacked array; None if the tensor fills the whole array.
    shape: its shape on the hub.
    conversion: converts between the two.
  """

  name: str
  path: str
  layer: int | None
  shape: tuple[int, ...]
  conversion: Conversion


def hub_tensors(
  shapes: dict[str, tuple[int, ...]], stored: Collection[str] = ()
) -> dict[str, HubTensor]:
  """Returns all hub tensors that together fill the arrays of a model, by their names.

  Args:
    shapes: shape of every array of the model by its path, such as `decoder.norm.scale`.
    stored: names in a checkpoint. Where a tensor may have two names, the stored one is used.

  Raises:
    KeyError: no rule, or more than one rule, produces one of the paths.
  """
  rules = RULES + _INT8_RULES
  by_path: dict[str, tuple[str, Conversion]] = {
    path: (regex, conversion) for regex, path, conversion in rules
  }
  if len(by_path) != len(rules):
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
      if len(matching := {rule[0] for rule in rules if re.fullmatch(rule[0], name)}) != 1:
        raise KeyError(f"{name} matches {len(matching)} rules")
      tensors[name] = HubTensor(name, path, layer, hub_shape, conversion)
  return tensors


def _name(regex, stored):
  """The name that matches `regex`: the stored one if there is one, otherwise the one we write."""
  names = [regex.replace(_GAMMA, suffix).replace("\\", "") for suffix in ("gamma", "weight")]
  return next((name for name in names if name in stored), names[0])
