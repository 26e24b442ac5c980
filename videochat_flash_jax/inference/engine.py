"""Runs a model on prompts: encode clips in groups, prefill, decode; every shape from a bucket.

A bucket is a padded size. Each new one is compiled once, which is logged. JAX's persistent cache
keeps it for the next process if `JAX_COMPILATION_CACHE_DIR` is set, as `vcflash` does.
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
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.limits import check_length, check_mesh
from videochat_flash_jax.inference.programs import DECODE_STEPS, NO_TOKEN, bucket
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.models.qwen2 import Caches
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.sharding import dotted_path, weight_shardings
from videochat_flash_jax.shapes import Array, Float, Int, UInt8

CLIPS_PER_GROUP = 8  # on each device

_log = logging.getLogger("videochat_flash_jax")


class Prompt(NamedTuple):
  """One row: a laid-out sequence (`data.text.visual_slots.open_slots`) and its visual tokens."""

  token_ids: Int[np.ndarray, "T"]
  visual_index: Int[np.ndarray, "T"]
  visual_tokens: Float[Array, "V D"]


class Reading(NamedTuple):
  """What the model has read: a cache for each part of its layers, and scores of the next token.

  Without dropout there is one part. With it, later parts hold fewer tokens of a row.

  Attributes:
    caches: of B rows: on a mesh, copies of the last one fill it up.
    logits: of B rows.
    num_rows: how many of them were asked for.
  """

  caches: Caches
  logits: Float[Array, "B vocab"]
  num_rows: int

  def rewound(self, num_tokens: int) -> "Reading":
    """Forgets all but the first tokens of each row; all visual ones must be among these."""
    length = self.caches[0].length
    caches = tuple(
      cache._replace(length=cache.length - (length - num_tokens)) for cache in self.caches
    )
    return self._replace(caches=caches)


class Engine:
  """A model ready to encode, read and write, on one device or on a mesh.

  All methods take batches. A row gives the same result alone, in a batch, and in any bucket; where
  answers are sampled, what is drawn depends on the row's number.
  """

  def __init__(self, model: VideoChatFlash, stop_ids: Sequence[int], layout: Layout = ONE_DEVICE):
    """Takes the model over; it must not be used elsewhere afterwards.

    Args:
      model: weights in the dtype to compute in.
      stop_ids: token ids that end an answer.
      layout: a mesh whose `data` and `fsdp` share out rows, and whose `tensor` shares out the
        model; all of it encodes clips. Any number of rows can be read: copies fill it up.

    Raises:
      InputError: the model cannot be split over the mesh.
    """
    check_mesh(model.config, layout)
    self.config, self._layout = model.config, dataclasses.replace(layout, replicate_weights=True)
    if layout.mesh is None and jax.default_backend() == "cpu":
      # XLA on the CPU copies scanned weights at every step (models/layer_stack.py).
      model.decoder.layers = model.decoder.layers.unstack()
    graph, weights = nnx.split(model)
    weights = nnx.to_pure_dict(weights)
    if layout.mesh is not None:
      weights = jax.device_put(weights, weight_shardings(layout.mesh, weights, replicated=True))
    self._model = graph, self._layout, weights
    self.dtype = jax.tree.leaves(weights)[0].dtype
    self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
    self._compiled: set[tuple] = set()

  def encode(self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]) -> Float[Array, "V D"]:
    """Encodes and compresses clips, or image tiles (F = 1), a group at a time as they arrive.

    Returns:
      The visual tokens of all clips, one clip after another.
    """
    return self._visual_tokens(programs.encode, clips)

  def encode_features(
    self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]
  ) -> Iterator[Float[np.ndarray, "V E"]]:
    """Yields what a feature store keeps of each clip, bfloat16, a group at a time."""
    groups = self._groups(programs.encode_features, clips)
    # The next group is decoded and sent off before this one is waited for.
    for (features, num_clips), _ in itertools.pairwise(itertools.chain(groups, [None])):
      yield from np.asarray(features)[:num_clips]

  def project(self, features: Iterable[Float[np.ndarray, "V E"]]) -> Float[Array, "V D"]:
    """As `encode`, of what `encode_features` gave."""
    return self._visual_tokens(programs.project, features)

  def vision_weights(self) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the encoder's weights, one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(self._model[-1]["vision"])
    return ((dotted_path(path), np.asarray(leaf)) for path, leaf in leaves)

  def read(
    self, prompts: Sequence[Prompt], max_new_tokens: int, *, after: Reading | None = None
  ) -> Reading:
    """Reads prompts into a cache with room for an answer.

    Args:
      prompts: rows of the batch; right-padded here to a common bucket.
      max_new_tokens: room to leave.
      after: continue this reading (given up to this call) instead of starting anew. With dropout,
        which looks at all visual tokens of a row together, only by text.

    Raises:
      InputError: prompt and answer do not fit into the model's context, or the prompt into what a
        TPU reads at once.
    """
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
      widths = [] if plan is None else [drop.slots.shape[1] for drop in plan.drops.values()]
      self._announce("prefill", *shape, num_slots, *widths)
      arguments = self._layout.device_put((*arguments, plan), "batch")
      return Reading(*programs.prefill(*self._model, *arguments, num_slots), num_rows)
    if self.config.dropout is not None and (visual_index >= 0).any():
      raise ValueError("with dropout, all visual tokens of a row are read at once")
    caches = tuple(_with_room(cache, num_tokens + max_new_tokens) for cache in after.caches)
    check_length(self._layout, num_tokens, caches[0].num_slots)
    self._announce("extend", *shape, *(cache.num_slots for cache in caches))
    arguments = self._layout.device_put(arguments, "batch")
    return Reading(*programs.extend(*self._model, caches, *arguments), num_rows)

  def write(
    self, reading: Reading, max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> Iterator[tuple[Int[np.ndarray, "B steps"], Reading]]:
    """Decodes, a few tokens at a time, until every row has stopped.

    Args:
      reading: from `read`, with room for the tokens; given up to this call.
      max_new_tokens: the most tokens of an answer.
      sampling: how tokens are chosen.

    Yields:
      New tokens of each row, stop tokens included and -1 after them; and the reading so far.
    """
    key = jax.random.key(sampling.check().seed)
    caches, logits, num_rows = reading
    finished = self._layout.device_put(np.arange(len(logits)) >= num_rows, "batch")
    for start in range(0, max_new_tokens, DECODE_STEPS):
      self._announce("decode", len(finished), *(cache.num_slots for cache in caches))
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
    """Answers a batch of prompts; token ids of each row, without the stop token."""
    reading = self.read(prompts, max_new_tokens)
    steps = [tokens for tokens, _ in self.write(reading, max_new_tokens, sampling)]
    unwanted = {NO_TOKEN, *self._stop_ids.tolist()}
    return [[t for t in row if t not in unwanted] for row in np.concatenate(steps, 1).tolist()]

  @property
  def _clips_at_once(self):
    mesh = self._layout.mesh
    return CLIPS_PER_GROUP * (1 if mesh is None else mesh.size)

  def _visual_tokens(self, program, clips):
    groups, num_tokens = [], 0
    for tokens, num_clips in self._groups(program, clips):
      groups.append(tokens)
      num_tokens += num_clips * len(tokens) // self._clips_at_once
    if not groups:
      raise InputError("there is no clip to encode; give at least one frame")
    return jnp.concatenate(groups)[:num_tokens]

  def _groups(self, program, clips):
    """Yields what a program makes of groups of clips, the last one padded; and their numbers."""
    clips = iter(clips)
    while group := list(itertools.islice(clips, self._clips_at_once)):
      num_clips = len(group)
      group = np.stack(group + group[-1:] * (self._clips_at_once - num_clips))
      self._announce(program.__name__, *group.shape[:3])
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

  def _announce(self, program, *shape):
    if (program, *shape) not in self._compiled:
      self._compiled.add((program, *shape))
      _log.info("compiling %s for shape %s", program, shape)


def _pad_rows(prompts, num_tokens, num_visual):
  """Token ids, visual tokens and visual index of all rows, padded alike."""
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


def _with_room(cache, num_tokens):
  """The same cache with free slots for that many tokens in every row."""
  num_slots = bucket(int(cache.length.max()) + num_tokens)
  return cache if cache.num_slots >= num_slots else cache.widened(num_slots)
