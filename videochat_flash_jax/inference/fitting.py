"""What fits into the memory of a chip: known from sizes alone, before anything is loaded.

Weights, caches and working memory of one device are added up. Weights and caches are exact. Working
memory is an upper estimate of what the compiler takes for the largest programs, which run while a
video is watched; `tests/tpu/fitting_test.py` compares it with the compiler's own numbers.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.checkpoints.hub.hf_options import has_int8
from videochat_flash_jax.checkpoints.hub.int8_tensors import int8_shapes
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import CLIPS_PER_GROUP
from videochat_flash_jax.inference.prefix import CHUNK, num_own_slots, whole_chunks
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig, released_configs
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.kv_formats import FORMATS, Wide
from videochat_flash_jax.parallel.sharding import dotted_path, weight_spec

_TEXT_TOKENS = 512  # of the prompt, a question and its answer
_SPARE = 1 << 28  # bytes: compiled programs, and gaps between arrays
_MOST_FRAMES = 1 << 24  # at which the search ends


class Setting(NamedTuple):
  """How a model is loaded.

  Attributes:
    weights: "int8"; None for the dtype of the computation.
    cache: "int8" or "int4"; None for the dtype of the computation.
    dropout: which visual tokens are dropped between layers; None for none.
    tensor: number of devices over which heads, MLP and vocabulary are split.
    sequence: number of devices over which the tokens of a video are split.
  """

  weights: str | None = None
  cache: str | None = None
  dropout: DropoutConfig | None = None
  tensor: int = 1
  sequence: int = 1

  def flags(self, usual: "Setting") -> str:
    """The flags of `vcflash chat` that differ from those of another setting."""
    flags = [
      f"--{name} {getattr(self, name)}"
      for name in ("weights", "cache", "tensor")
      if getattr(self, name) != getattr(usual, name)
    ]
    return " ".join([*flags, *["--dropout"] * (self.dropout != usual.dropout)])


class Needs(NamedTuple):
  """Bytes that one device needs."""

  weights: int
  cache: int
  working: int

  @property
  def total(self) -> int:
    """All together."""
    return sum(self)


class Fitting:
  """Tells what a model needs, for any number of frames and any setting."""

  def __init__(self, config: VideoChatFlashConfig, dtype: Any = jnp.bfloat16):
    """Takes the sizes of a model.

    Args:
      config: of the model. Its own `dropout` has no meaning here: settings say it.
      dtype: of the computation.
    """
    self.config, self.dtype = dataclasses.replace(config, dropout=None), jnp.dtype(dtype)
    model = nnx.eval_shape(
      lambda: VideoChatFlash(self.config, rngs=nnx.Rngs(0), param_dtype=self.dtype)
    )
    self._weights = nnx.to_pure_dict(nnx.state(model))

  def weights_of(self, *parts: str) -> int:
    """Bytes of the wide weights of parts of the model, such as "vision"."""
    leaves = jax.tree.leaves([self._weights[part] for part in parts])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  def tokens(self, frames: int) -> int:
    """Tokens of a prompt about so many frames, and of its answer."""
    clips = -(-frames // self.config.vision.clip_frames)
    return clips * self.config.clip_tokens + _TEXT_TOKENS

  def frames(self, tokens: int) -> int:
    """The most frames of which a context of so many tokens has room for the prompt and answer."""
    clips = max(0, tokens - _TEXT_TOKENS) // self.config.clip_tokens
    return clips * self.config.vision.clip_frames

  def needs(self, frames: int, setting: Setting) -> Needs:
    """What one device needs to watch so many frames, and to answer a question about them."""
    weights = int8_shapes(self._weights) if setting.weights == "int8" else self._weights
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    of_weights = sum(self._bytes_on_device(path, leaf, setting.tensor) for path, leaf in leaves)
    return Needs(of_weights, self._cache(frames, setting), self._working(setting))

  def most_frames(self, num_bytes: int, setting: Setting) -> int:
    """The most frames that fit into so many bytes; 0 if not even the model does."""
    step = self.config.vision.clip_frames
    low, high = 0, _MOST_FRAMES // step
    while low < high:
      middle = (low + high + 1) // 2
      fits = self.needs(middle * step, setting).total <= num_bytes
      low, high = (middle, high) if fits else (low, middle - 1)
    return low * step

  def remedies(
    self, frames: int, num_bytes: int, usual: Setting, num_devices: int = 8
  ) -> Iterator[Setting]:
    """Yields settings in which the frames fit on so many devices, those with few changes first.

    A setting that only adds changes to one that was yielded before is left out.
    """
    yielded = []
    choices = itertools.product(
      *({own, *others} for own, others in zip(usual, self._others(num_devices), strict=True))
    )
    for choice in sorted(
      map(Setting._make, choices), key=lambda setting: self._cost(setting, usual)
    ):
      changes = self._changes(choice, usual)
      is_new = bool(changes) and not any(known <= changes for known in yielded)
      if is_new and self.needs(frames, choice).total <= num_bytes:
        yielded.append(changes)
        yield choice

  def _others(self, num_devices):
    """Values of the fields of a setting that could be chosen."""
    decoder, preset = self.config.decoder, DropoutConfig.model_card()
    splits = [n for n in (2, 4, 8) if decoder.num_kv_heads % n == num_devices % n == 0]
    has_preset = decoder.depth > max(preset.layers)
    return (("int8",), ("int8", "int4"), (preset,) * has_preset, splits, ())

  @staticmethod
  def _changes(setting, usual):
    pairs = zip(Setting._fields, setting, usual, strict=True)
    return frozenset((name, value) for name, value, own in pairs if value != own)

  def _cost(self, setting, usual):
    """Sorts settings: by the number of changes, then by what they cost."""
    order = [setting.tensor, setting.cache == "int4", setting.dropout is not None]
    return len(self._changes(setting, usual)), *order

  def _cache(self, frames, setting):
    """Bytes of the caches of all parts of the layers."""
    num_text = _TEXT_TOKENS // 4
    num_visual = self.tokens(frames) - _TEXT_TOKENS
    parts = dataclasses.replace(self.config, dropout=setting.dropout).layer_parts
    ratios = setting.dropout.ratios if setting.dropout else [1.0]
    total, own = 0, num_own_slots(0, 64, 256)
    for layers, ratio in zip(parts, ratios, strict=True):
      slots = whole_chunks(num_text + int(num_visual * ratio))
      on_device = -(-slots // setting.sequence)
      for num_slots, kept_as in ((on_device, FORMATS[setting.cache]), (own, Wide)):
        total += self._cache_bytes(len(layers), num_slots, kept_as)
    return total // setting.tensor

  def _cache_bytes(self, depth, num_slots, kept_as):
    cache = jax.eval_shape(
      lambda: KVCache.empty(
        self.config.decoder, 1, num_slots, depth=depth, dtype=self.dtype, kept_as=kept_as
      )
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

  def _working(self, setting):
    """Bytes of the activations of reading a chunk, and of encoding a group of clips meanwhile."""
    vision, decoder, size = self.config.vision, self.config.decoder, self.dtype.itemsize
    reading = CHUNK * (2 * decoder.mlp_width // setting.tensor + 6 * decoder.width) * size
    patches = CLIPS_PER_GROUP * vision.num_patches(vision.clip_frames)
    encoding = int(2.4 * patches * (vision.mlp_width + 5 * vision.width) * size)
    frames = 3 * CLIPS_PER_GROUP * vision.clip_frames * 3 * vision.image_size**2
    return reading + encoding + frames + _SPARE

  @staticmethod
  def _bytes_on_device(path, leaf, tensor):
    path = dotted_path(path)
    spec = weight_spec(path, leaf.ndim, replicated=True)
    return leaf.size * leaf.dtype.itemsize // (tensor if "tensor" in spec else 1)


def sizes_of(name: str) -> tuple[VideoChatFlashConfig, bool]:
  """The config of a model, and whether its weights are stored in int8; nothing is downloaded.

  Args:
    name: of a released model, "tiny", or a directory, see `VideoChat.from_pretrained`.

  Raises:
    InputError: there is no such model.
  """
  for config in released_configs() if not os.path.isdir(name) else ():
    if name.rpartition("/")[2] == config.name:
      return config, False
  checkpoint = open_checkpoint(checkpoint_directory(name))
  return checkpoint.config, has_int8(checkpoint.fields)


def device_memory() -> int | None:
  """Bytes of memory of the device that JAX uses by default; None if it does not say."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return (device.memory_stats() or {}).get("bytes_limit")


def _smallest_model(fitting: Fitting, num_bytes: int) -> list[str]:
  """Flags for the released model that needs least, if it watches its usual frames there."""
  others = [Fitting(config, fitting.dtype) for config in released_configs()]
  wide, narrow = Setting(), Setting(weights="int8")
  least = min(others, key=lambda other: other.needs(0, wide).weights)
  frames = least.config.sampling.max_frames
  return [
    f"--model {least.config.name} {setting.flags(wide)}".strip()
    for setting in (wide, narrow)
    if least.needs(frames, setting).total <= num_bytes
  ][:1]


def check_memory(
  fitting: Fitting, frames: int, setting: Setting, num_bytes: int, num_devices: int
) -> None:
  """Checks that a model and a video fit, before anything is loaded.

  Args:
    fitting: of the model.
    frames: to watch.
    setting: how the model is loaded.
    num_bytes: memory of each device.
    num_devices: how many devices there are.

  Raises:
    InputError: they do not fit; names flags, or another model, with which they do.
  """
  needs = fitting.needs(frames, setting).total
  if needs <= num_bytes:
    return
  remedies = [
    remedy.flags(setting)
    for remedy in itertools.islice(fitting.remedies(frames, num_bytes, setting, num_devices), 2)
  ]
  most = fitting.most_frames(num_bytes, setting)
  remedies += [f"--max-frames {most}"] * (most > 0)
  if not remedies:
    remedies = _smallest_model(fitting, num_bytes)
  raise InputError(
    f"{fitting.config.name} with {frames:,} frames needs {needs / 2**30:.1f} GiB, the device has "
    f"{num_bytes / 2**30:.1f}; give {', or '.join(remedies) or 'a device with more memory'} "
    "(vcflash fit tells more)"
  )
