"""Runs a model on prompts: encodes clips in groups, prefills the KV cache, and decodes.

Every size is padded to a bucket, so that few different shapes are compiled. The first use of a
shape is logged. If `JAX_COMPILATION_CACHE_DIR` is set, as `vcflash` does, JAX keeps the compiled
programs for the next process.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import argument, count
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.cpu_layers import unstack_decoder
from videochat_flash_jax.inference.limits import check_length, check_mesh
from videochat_flash_jax.inference.programs import DECODE_STEPS, NO_TOKEN, bucket
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.models.qwen2 import Caches
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.sharding import dotted_path, weight_shardings
from videochat_flash_jax.shapes import Array, Float, Int, UInt8

CLIPS_PER_GROUP = 8  # per device

_log = logging.getLogger("videochat_flash_jax")


class Prompt(NamedTuple):
  """One row of a batch: a sequence from `data.text.visual_slots.open_slots`, and its visual tokens.

  Attributes:
    token_ids: text, with room for the visual tokens.
    visual_index: index of the visual token at each position; -1 for text.
    visual_tokens: visual tokens of all clips and image tiles.
  """

  token_ids: Int[np.ndarray, "T"]
  visual_index: Int[np.ndarray, "T"]
  visual_tokens: Float[Array, "V D"]


class Reading(NamedTuple):
  """The state of a batch after reading: the KV caches, and the logits of the next token.

  Attributes:
    caches: one for all layers; with dropout, one for each range of layers between drops. Later ones
      hold fewer tokens.
    logits: scores of the next token.
    num_rows: number of rows that the caller gave. On a mesh B may be larger: copies of the last row
      fill up the batch.
  """

  caches: Caches
  logits: Float[Array, "B vocab"]
  num_rows: int

  def rewound(self, num_tokens: int) -> "Reading":
    """Keeps the first tokens of each row only. They must include all visual tokens.

    Args:
      num_tokens: number of tokens of each row, before any drop.
    """
    length = self.caches[0].length
    caches = tuple(
      cache._replace(length=cache.length - (length - num_tokens)) for cache in self.caches
    )
    return self._replace(caches=caches)


class Engine:
  """A model that encodes clips, reads prompts and writes answers, on one device or on a mesh.

  All methods take batches. A row gives the same result alone, in a batch, and in any bucket. In
  random sampling, the random numbers depend on the index of the row in its batch.
  """

  def __init__(self, model: VideoChatFlash, stop_ids: Sequence[int], layout: Layout = ONE_DEVICE):
    """Places the weights on the devices. The model must not be used elsewhere afterwards.

    Args:
      model: a model in the dtype of the computation.
      stop_ids: token ids that end an answer.
      layout: how arrays are split over a mesh. Rows are split over `data` and `fsdp`, the decoder
        over `tensor`, clips over all axes. Any number of rows can be read, since a batch is filled
        up with copies.

    Raises:
      InputError: the model cannot be split over the mesh.
    """
    check_mesh(model.config, layout)
    self.config, self._layout = model.config, dataclasses.replace(layout, replicate_weights=True)
    if layout.mesh is None and jax.default_backend() == "cpu":
      unstack_decoder(model.decoder)
    graph, weights = nnx.split(model)
    weights = nnx.to_pure_dict(weights)
    if layout.mesh is not None:
      weights = jax.device_put(weights, weight_shardings(layout.mesh, weights, replicated=True))
    self._model = graph, self._layout, weights
    self.dtype = jax.tree.leaves(weights)[0].dtype
    self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
    self._compiled: set[tuple] = set()

  def encode(self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]) -> Float[Array, "V D"]:
    """Encodes and compresses clips, or image tiles (F = 1), one group at a time as they arrive.

    Returns:
      The visual tokens of all clips, in order.

    Raises:
      InputError: there is no clip.
    """
    return self._visual_tokens(programs.encode, clips)

  def encode_features(
    self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]
  ) -> Iterator[Float[np.ndarray, "V E"]]:
    """Yields the features of each clip that a feature store keeps, in bfloat16."""
    groups = self._groups(programs.encode_features, clips)
    # The next group is read and dispatched before the result of this one is waited for.
    for (features, num_clips), _ in itertools.pairwise(itertools.chain(groups, [None])):
      yield from np.asarray(features)[:num_clips]

  def project(self, features: Iterable[Float[np.ndarray, "V E"]]) -> Float[Array, "V D"]:
    """As `encode`, from features that `encode_features` gave before."""
    return self._visual_tokens(programs.project, features)

  def vision_weights(self) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the encoder's weights, one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(self._model[-1]["vision"])
    return ((dotted_path(path), np.asarray(leaf)) for path, leaf in leaves)

  def read(
    self, prompts: Sequence[Prompt], max_new_tokens: int, *, after: Reading | None = None
  ) -> Reading:
    """Reads prompts into caches with free slots for an answer.

    Args:
      prompts: rows of the batch. They are right-padded to a common bucket.
      max_new_tokens: the most tokens of the answer.
      after: a reading to continue, by as many rows. Its arrays are donated: it must not be used
        afterwards. With dropout, which ranks all visual tokens of a row together, only text can
        continue a reading.

    Raises:
      InputError: `max_new_tokens` is no positive integer, prompt and answer do not fit into the
        model's context, or the prompt is longer than a TPU can read at once.
    """
    max_new_tokens = argument("max_new_tokens", max_new_tokens, count())
    num_rows = len(prompts)
    prompts = [*prompts, *prompts[-1:] * (-num_rows % self._layout.row_shards)]
    length = np.array([len(prompt.token_ids) for prompt in prompts])
    start = np.zeros_like(length) if after is None else np.asarray(after.caches[0].length)
    self._check_context(int((start + length).max()), max_new_tokens)
    num_visual = max(len(prompt.visual_tokens) for prompt in prompts)
    num_tokens, num_visual, num_slots = programs.padded_sizes(
      int(length.max()), num_visual, max_new_tokens
    )
    token_ids, visual_tokens, visual_index = _pad_rows(prompts, num_tokens, num_visual)
    shape = (len(prompts), num_tokens, num_visual)
    arguments = (token_ids, visual_tokens, visual_index, length.astype(np.int32))
    if after is None:
      check_length(self._layout, num_tokens, num_tokens)
      plan = programs.plan_prompts(self.config, visual_index >= 0, length)
      lengths = [] if plan is None else [drop.indices.shape[1] for drop in plan.drops.values()]
      self._log_new_shape("prefill", *shape, num_slots, *lengths)
      arguments = self._layout.device_put((*arguments, plan), "batch")
      return Reading(*programs.prefill(*self._model, *arguments, num_slots), num_rows)
    if self.config.dropout is not None and (visual_index >= 0).any():
      raise ValueError(
        "with dropout, only text can continue a reading; read all visual tokens in one call"
      )
    caches = tuple(_with_free_slots(cache, num_tokens + max_new_tokens) for cache in after.caches)
    check_length(self._layout, num_tokens, caches[0].num_slots)
    self._log_new_shape("extend", *shape, *(cache.num_slots for cache in caches))
    arguments = self._layout.device_put(arguments, "batch")
    return Reading(*programs.extend(*self._model, caches, *arguments), num_rows)

  def write(
    self, reading: Reading, max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> Iterator[tuple[Int[np.ndarray, "B steps"], Reading]]:
    """Decodes, a few tokens at a time, until every row has its stop token.

    Args:
      reading: from `read`, with enough free slots. Its arrays are donated: it must not be used
        afterwards.
      max_new_tokens: the most tokens of an answer.
      sampling: how tokens are chosen.

    Yields:
      The new tokens of each row, with its stop token, and -1 after it; and the reading with these
      tokens.
    """
    sampling = sampling.check()
    key = jax.random.key(sampling.seed)
    caches, logits, num_rows = reading
    finished = self._layout.device_put(np.arange(len(logits)) >= num_rows, "batch")
    for start in range(0, max_new_tokens, DECODE_STEPS):
      self._log_new_shape("decode", len(finished), *(cache.num_slots for cache in caches))
      num_steps = min(DECODE_STEPS, max_new_tokens - start)
      tokens, caches, logits, finished = programs.decode(
        *self._model,
        caches,
        logits,
        finished,
        self._stop_ids,
        jax.random.fold_in(key, start),
        sampling.temperature,
        sampling.top_p,
        num_steps,
      )
      yield np.asarray(tokens)[:num_rows, :num_steps], Reading(caches, logits, num_rows)
      if finished.all():
        return

  def generate(
    self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> list[list[int]]:
    """Answers a batch of prompts. Returns the token ids of each row, without the stop token."""
    reading = self.read(prompts, max_new_tokens)
    steps = [tokens for tokens, _ in self.write(reading, max_new_tokens, sampling)]
    not_text = {NO_TOKEN, *self._stop_ids.tolist()}
    return [[t for t in row if t not in not_text] for row in np.concatenate(steps, 1).tolist()]

  @property
  def _group_size(self):
    mesh = self._layout.mesh
    return CLIPS_PER_GROUP * (1 if mesh is None else mesh.size)

  def _visual_tokens(self, program, clips):
    groups, num_tokens = [], 0
    for tokens, num_clips in self._groups(program, clips):
      groups.append(tokens)
      num_tokens += num_clips * len(tokens) // self._group_size
    if not groups:
      raise InputError("there is no clip to encode; give at least one frame")
    return jnp.concatenate(groups)[:num_tokens]

  def _groups(self, program, clips):
    """Yields what a program makes of each group of clips, and how many of these are no padding."""
    clips = iter(clips)
    while group := list(itertools.islice(clips, self._group_size)):
      num_clips = len(group)
      group = np.stack(group + group[-1:] * (self._group_size - num_clips))
      self._log_new_shape(program.__name__, *group.shape[:3])
      group = group.reshape(self._layout.row_shards, -1, *group.shape[1:])
      yield program(*self._model, self._layout.device_put(group, "batch", "clips")), num_clips

  def _check_context(self, num_tokens, max_new_tokens):
    available = self.config.decoder.max_positions
    if num_tokens + max_new_tokens > available:
      raise InputError(
        f"the prompt has {num_tokens} tokens and the answer may have {max_new_tokens}, but the "
        f"context of {self.config.name} holds {available}; use fewer frames, a shorter question "
        "or a shorter answer"
      )

  def _log_new_shape(self, program, *shape):
    if (program, *shape) not in self._compiled:
      self._compiled.add((program, *shape))
      _log.info("compiling %s for shape %s", program, shape)


def _pad_rows(prompts, num_tokens, num_visual):
  """Token ids, visual tokens and visual indices of all rows, padded to common lengths."""
  token_ids = np.zeros((len(prompts), num_tokens), np.int32)
  visual_index = np.full((len(prompts), num_tokens), NO_TOKEN, np.int32)
  for row, prompt in enumerate(prompts):
    token_ids[row, : len(prompt.token_ids)] = prompt.token_ids
    visual_index[row, : len(prompt.visual_index)] = prompt.visual_index
  visual_tokens = jnp.stack(
    [
      jnp.pad(prompt.visual_tokens, ((0, num_visual - len(prompt.visual_tokens)), (0, 0)))
      for prompt in prompts
    ]
  )
  return token_ids, visual_tokens, visual_index


def _with_free_slots(cache, num_tokens):
  """The same cache, with at least `num_tokens` free slots in every row."""
  num_slots = bucket(int(cache.length.max()) + num_tokens)
  return cache if cache.num_slots >= num_slots else cache.widened(num_slots)
