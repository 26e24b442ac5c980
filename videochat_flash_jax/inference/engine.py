"""Runs a model on prompts: encode clips in groups, prefill, decode; every shape from a bucket.

A bucket is a padded size. Each new one is compiled once, which is logged. JAX's persistent cache
keeps it for the next process if `JAX_COMPILATION_CACHE_DIR` is set, as `vcflash` does.
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.sampler import Sampling, sample
from videochat_flash_jax.models.qwen2 import Caches
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.shapes import Array, Float, Int, UInt8

CLIPS_PER_GROUP = 8
_DECODE_STEPS = 16  # tokens decoded on the device before the host looks
_NO_TOKEN = -1

_log = logging.getLogger("videochat_flash_jax")


class Prompt(NamedTuple):
  """One row: a laid-out sequence (`data.packing.lay_out`) and its visual tokens."""

  token_ids: Int[np.ndarray, "T"]
  visual_index: Int[np.ndarray, "T"]
  visual_tokens: Float[Array, "V D"]


class Reading(NamedTuple):
  """What the model has read: a cache for each part of its layers, and scores of the next token.

  Without dropout there is one part. With it, later parts hold fewer tokens of a row.
  """

  caches: Caches
  logits: Float[Array, "B vocab"]

  def rewound(self, num_tokens: int) -> "Reading":
    """Forgets all but the first tokens of each row; all visual ones must be among these."""
    length = self.caches[0].length
    caches = tuple(
      cache._replace(length=cache.length - (length - num_tokens)) for cache in self.caches
    )
    return self._replace(caches=caches)


def bucket(size: int, smallest: int = 64) -> int:
  """The next of 64, 96, 128, 192, 256, 384...: at most a half more than needed."""
  step = smallest
  while step < size:
    step = step * 3 // 2 if step & (step - 1) == 0 else step * 4 // 3
  return step


class Engine:
  """A model ready to encode, read and write.

  All methods take batches. A row gives the same result alone, in a batch, and in any bucket; where
  answers are sampled, what is drawn depends on the row's number.
  """

  def __init__(self, model: VideoChatFlash, stop_ids: Sequence[int]):
    """Takes the model over; it must not be used elsewhere afterwards.

    Args:
      model: weights in the dtype to compute in.
      stop_ids: token ids that end an answer.
    """
    self.config = model.config
    if jax.default_backend() == "cpu":
      # XLA on the CPU copies scanned weights at every step (models/layer_stack.py).
      model.decoder.layers = model.decoder.layers.unstack()
    self._graph, self._weights = nnx.split(model)
    self.dtype = jax.tree.leaves(self._weights)[0].dtype
    self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
    self._compiled: set[tuple] = set()

  def encode(self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]) -> Float[Array, "V D"]:
    """Encodes and compresses clips, or image tiles (F = 1), a group at a time as they arrive.

    Returns:
      The visual tokens of all clips, one clip after another.
    """
    groups, group, num_clips = [], [], 0
    for clip in clips:
      group.append(clip)
      num_clips += 1
      if len(group) == CLIPS_PER_GROUP:
        groups.append(self._encode_group(np.stack(group)))
        group = []
    if group:
      padding = [group[-1]] * (CLIPS_PER_GROUP - len(group))
      groups.append(self._encode_group(np.stack(group + padding)))
    if not groups:
      raise InputError("there is no clip to encode; give at least one frame")
    tokens = jnp.concatenate(groups)[:num_clips]
    return tokens.reshape(-1, tokens.shape[-1])

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
      InputError: prompt and answer do not fit into the model's context.
    """
    length = np.array([len(prompt.token_ids) for prompt in prompts])
    start = np.zeros_like(length) if after is None else np.asarray(after.caches[0].length)
    self._check_context(int((start + length).max()), max_new_tokens)
    num_tokens = bucket(int(length.max()))
    token_ids, visual_tokens, visual_index = _pad_rows(prompts, num_tokens)
    shape = (len(prompts), num_tokens, visual_tokens.shape[1])
    arguments = (token_ids, visual_tokens, visual_index, length.astype(np.int32))
    if after is None:
      plan = self._plan(visual_index, length)
      num_slots = bucket(num_tokens + max_new_tokens)
      widths = [] if plan is None else [drop.slots.shape[1] for drop in plan.drops.values()]
      self._announce("prefill", *shape, num_slots, *widths)
      return _prefill(self._graph, self._weights, *arguments, plan, num_slots=num_slots)
    if self.config.dropout is not None and (visual_index >= 0).any():
      raise ValueError("with dropout, all visual tokens of a row are read at once")
    caches = tuple(_with_room(cache, num_tokens + max_new_tokens) for cache in after.caches)
    self._announce("extend", *shape, *(cache.num_slots for cache in caches))
    return _extend(self._graph, self._weights, caches, *arguments)

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
    finished = jnp.zeros(reading.logits.shape[:1], bool)
    for start in range(0, max_new_tokens, _DECODE_STEPS):
      self._announce("decode", len(finished), *(cache.num_slots for cache in reading.caches))
      num_steps = min(_DECODE_STEPS, max_new_tokens - start)
      tokens, reading, finished = _decode(
        self._graph,
        self._weights,
        reading,
        finished,
        self._stop_ids,
        jax.random.fold_in(key, start),
        sampling.temperature,
        sampling.top_p,
        num_steps,
      )
      yield np.asarray(tokens)[:, :num_steps], reading
      if finished.all():
        return

  def generate(
    self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> list[list[int]]:
    """Answers a batch of prompts; token ids of each row, without the stop token."""
    reading = self.read(prompts, max_new_tokens)
    steps = [tokens for tokens, _ in self.write(reading, max_new_tokens, sampling)]
    unwanted = {_NO_TOKEN, *self._stop_ids.tolist()}
    return [[t for t in row if t not in unwanted] for row in np.concatenate(steps, 1).tolist()]

  def _encode_group(self, clips):
    self._announce("encode", *clips.shape[:3])
    return _encode(self._graph, self._weights, clips)

  def _plan(self, visual_index, length):
    """What is dropped from prompts, padded to buckets like the prompts themselves."""
    if self.config.dropout is None:
      return None
    counts = (np.arange(visual_index.shape[1]) < length[:, None]).astype(np.int32)
    return plan_dropout(self.config.dropout, visual_index >= 0, counts, round_length=bucket)

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


def _pad_rows(prompts, num_tokens):
  """Token ids, visual tokens and visual index of all rows, padded alike."""
  token_ids = np.zeros((len(prompts), num_tokens), np.int32)
  visual_index = np.full((len(prompts), num_tokens), _NO_TOKEN, np.int32)
  for row, prompt in enumerate(prompts):
    token_ids[row, : len(prompt.token_ids)] = prompt.token_ids
    visual_index[row, : len(prompt.visual_index)] = prompt.visual_index
  num_visual = bucket(max(len(prompt.visual_tokens) for prompt in prompts))
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


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph, weights, clips):
  return nnx.merge(graph, weights).encode(clips)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_slots")
def _prefill(graph, weights, token_ids, visual_tokens, visual_index, length, plan, *, num_slots):
  model = nnx.merge(graph, weights)
  sequence = model.embed_sequence(token_ids, visual_tokens, visual_index)
  hidden, caches = model.decoder.prefill(sequence, length, num_slots, plan)
  return Reading(caches, _last_logits(model, hidden, caches[-1].length))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(graph, weights, caches, token_ids, visual_tokens, visual_index, length):
  model = nnx.merge(graph, weights)
  sequence = model.embed_sequence(token_ids, visual_tokens, visual_index)
  hidden, caches = model.decoder.extend(sequence, caches, length)
  return Reading(caches, _last_logits(model, hidden, length))


def _last_logits(model, hidden, length):
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
  return model.decoder.logits(last)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
  graph, weights, reading, finished, stop_ids, key, temperature, top_p, num_steps
) -> tuple[Array, Reading, Array]:
  """Up to `num_steps` (at most `_DECODE_STEPS`) tokens a row: choose, record, read, repeat."""
  decoder = nnx.merge(graph, weights).decoder

  def unfinished(state):
    step, _, _, finished = state
    return (step < num_steps) & ~finished.all()

  def one_token(state):
    step, tokens, reading, finished = state
    token = sample(reading.logits, jax.random.fold_in(key, step), temperature, top_p)
    tokens = tokens.at[:, step].set(jnp.where(finished, _NO_TOKEN, token))
    # A stop token is read, too: the next turn of a chat follows it.
    num_read = 1 - finished.astype(jnp.int32)
    hidden, caches = decoder.extend(decoder.embed(token[:, None]), reading.caches, num_read)
    finished = finished | (token[:, None] == stop_ids).any(axis=-1)
    return step + 1, tokens, Reading(caches, decoder.logits(hidden[:, 0])), finished

  tokens = jnp.full((len(finished), _DECODE_STEPS), _NO_TOKEN, jnp.int32)
  state = (0, tokens, reading, finished)
  _, tokens, reading, finished = jax.lax.while_loop(unfinished, one_token, state)
  return tokens, reading, finished
