"""Runs a model: encodes clips in groups, reads tokens into KV caches, and decodes.

Every size is padded to one of few sizes, so that few different shapes are compiled. If
`JAX_COMPILATION_CACHE_DIR` is set, as `vcflash` does, JAX keeps the compiled programs for the next
process.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import argument, count
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.cpu_layers import unstack_decoder
from videochat_flash_jax.inference.limits import check_mesh, naming_what_needs_memory
from videochat_flash_jax.inference.prefix import (
  Part,
  Prefix,
  num_own_slots,
  own_pieces,
  piece_sizes,
  whole_chunks,
)
from videochat_flash_jax.inference.programs import DECODE_STEPS, NO_TOKEN, Tokens, bucket
from videochat_flash_jax.inference.reading import Prompt, Reading
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.inference.token_rows import TokenRows
from videochat_flash_jax.models.kv_cache import KVCache
from videochat_flash_jax.models.token_dropout import ranked_indices
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.kv_formats import FORMATS, Wide
from videochat_flash_jax.ops.precision import dtype_of_products
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.sharding import dotted_path, weight_shardings
from videochat_flash_jax.shapes import Float, Int, UInt8

CLIPS_PER_GROUP = 8  # per device
_PATIENCE = 2.0  # seconds of compiling of which nothing is said

_log = logging.getLogger("videochat_flash_jax")


class Engine:
  """A model that encodes clips, reads tokens and writes answers, on one device or on a mesh.

  A row gives the same result alone, in a batch, and with any padding. In random sampling, the
  random numbers depend on the index of the row in its batch.

  Attributes:
    config: of the model.
    dtype: of the computation.
    shared_parts: the parts of the decoder's layers that do not depend on the question.
    ranked_parts: the parts above the first drop that ranks tokens by attention.
  """

  def __init__(
    self,
    model: VideoChatFlash,
    stop_ids: Sequence[int],
    layout: Layout = ONE_DEVICE,
    cache: str | None = None,
  ):
    """Places the weights on the devices. The model must not be used elsewhere afterwards.

    Args:
      model: a model in the dtype of the computation.
      stop_ids: token ids that end an answer.
      layout: how arrays are split over a mesh. The decoder is split over `tensor`, clips over all
        axes.
      cache: "int8" or "int4": how keys and values of videos and images are kept, see
        `ops.kv_formats`; None: as they are.

    Raises:
      InputError: the model cannot be split over the mesh.
    """
    self.config, self._layout = model.config, dataclasses.replace(layout, replicate_weights=True)
    check_mesh(self.config, self._layout)
    if layout.mesh is None and jax.default_backend() == "cpu":
      unstack_decoder(model.decoder)
    self._cache_type, self._kept_as = model.decoder.cache_type, FORMATS[cache]
    graph, weights = nnx.split(model)
    weights = nnx.to_pure_dict(weights)
    if layout.mesh is not None:
      weights = jax.device_put(weights, weight_shardings(layout.mesh, weights, replicated=True))
    self._model = programs.ModelGraph(graph), self._layout, weights
    self.dtype = dtype_of_products(weights)
    parts, num_shared = self.config.layer_parts, self.config.num_shared_parts
    self.shared_parts, self.ranked_parts = parts[:num_shared], parts[num_shared:]
    self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
    self._compiled: set[tuple] = set()

  def encode(self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]) -> Float[np.ndarray, "V D"]:
    """Encodes and compresses clips, or image tiles (F = 1), to visual tokens.

    Raises:
      InputError: there is no clip.
    """
    groups = list(self.encode_groups(clips))
    if not groups:
      raise InputError("there is no clip to encode; give at least one frame")
    return np.concatenate(groups)

  def encode_groups(
    self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]
  ) -> Iterator[Float[np.ndarray, "v D"]]:
    """Yields the visual tokens of clips, one group of clips at a time as they arrive."""
    return self._tokens_of(programs.encode, clips)

  def encode_features(
    self, clips: Iterable[UInt8[np.ndarray, "F S S 3"]]
  ) -> Iterator[Float[np.ndarray, "V E"]]:
    """Yields the features of each clip that a feature store keeps, in bfloat16."""
    for features, num_clips in self._groups(programs.encode_features, clips):
      yield from features[:num_clips]

  def project_groups(
    self, features: Iterable[Float[np.ndarray, "V E"]]
  ) -> Iterator[Float[np.ndarray, "v D"]]:
    """As `encode_groups`, from features that `encode_features` gave before."""
    return self._tokens_of(programs.project, features)

  def _tokens_of(self, program, clips):
    """Yields the visual tokens of each group of clips, without those of the padding."""
    for tokens, num_clips in self._groups(program, clips):
      yield tokens[: num_clips * len(tokens) // self.group_size]

  def vision_weights(self) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the encoder's weights, one by one."""
    leaves = jax.tree_util.tree_leaves_with_path(self._model[-1]["vision"])
    return ((dotted_path(path), np.asarray(leaf)) for path, leaf in leaves)

  def read(
    self,
    rows: Sequence[Int[np.ndarray, "T"]],
    max_new_tokens: int,
    *,
    behind: Sequence[Prefix] = (),
    after: Reading | None = None,
  ) -> Reading:
    """Reads the text of a batch of questions into caches with free slots for the answers.

    Args:
      rows: token ids of each row.
      max_new_tokens: the most tokens of the answer.
      behind: the prefix that all rows stand behind, or one for each row, settled; none for text
        alone.
      after: a reading of the same rows to continue, behind the same prefixes. It is donated: it
        must not be used afterwards.

    Raises:
      InputError: `max_new_tokens` is no positive integer, or prompt and answer do not fit into the
        model's context.
    """
    max_new_tokens = argument("max_new_tokens", max_new_tokens, count())
    start = np.zeros(len(rows), int) if after is None else after.lengths
    length = start + [len(row) for row in rows]
    before = np.array([prefix.num_tokens for prefix in behind] or [0])
    self.check_context(int((before + length).max()), max_new_tokens)
    num_slots = num_own_slots(int(start.max()), max(map(len, rows)), max_new_tokens)
    parts = [*self.shared_parts, *self.ranked_parts]
    shared = self.shared_parts if behind else parts  # without visual tokens nothing is ranked
    caches, seen, entering = [], [], [self.tokens(row) for row in rows]
    for number, layers in enumerate(shared):
      if after is None:
        cache = self._empty_cache(layers, len(rows), num_slots)
      else:
        cache = self.widened(after.caches[number], num_slots)
      seen.append(tuple(prefix.caches[number] for prefix in behind))
      wanted = "logits" if layers == parts[-1] else "states"
      cache, entering = self.read_part(layers, entering, cache, seen[-1], wanted=wanted)
      caches.append(cache)
    entered = ()
    if len(shared) < len(parts):
      entered = after.entered if after else tuple(TokenRows() for _ in rows)
      for states, new in zip(entered, entering, strict=True):
        states.append(new)
      num_slots = num_own_slots(0, int(length.max()), max_new_tokens)
      more_caches, more_seen, entering = self._read_ranked(entered, num_slots, behind)
      caches += more_caches
      seen += more_seen
    return Reading(tuple(caches), tuple(seen), entering, len(shared), entered)

  def _read_ranked(self, entered, num_slots, behind):
    """Reads the parts above the first drop that ranks: which tokens they read, the question says.

    Args:
      entered: for each row, what of its own tokens has entered the drop.
      num_slots: of the caches of the rows' own tokens.
      behind: the prefixes.

    Returns:
      For each part the cache of the own tokens, and the caches of the prefixes' tokens that stay;
      and the logits of the next token.
    """
    own = [states.take(slice(None)) for states in entered]
    shared = len(behind) == 1
    of_rows = [(prefix.plan(), *prefix.ranked()) for prefix in behind]
    of_rows *= len(own) if shared else 1
    plans, states, visual = map(list, zip(*of_rows, strict=True))
    caches, seen = [], []
    for number, layers in enumerate(self.ranked_parts):
      is_last = number + 1 == len(self.ranked_parts)
      if shared and number == 0:  # all questions rank the same tokens
        scores = self._scores(layers.start, own, states[0])
      else:
        scores = [self._scores(layers.start, [own[i]], states[i])[0] for i in range(len(states))]
      chosen = []
      for row, prefix_states in enumerate(states):
        drop = plans[row].drops[layers.start]
        kept = ranked_indices(scores[row], visual[row], drop)
        part = Part(layers, self.empty_prefix_cache(layers, whole_chunks(len(kept))), kept=kept)
        visual[row], states[row] = visual[row][kept], TokenRows()
        leaving = None if is_last else states[row]
        part.read_kept(self, prefix_states, leaving, finish=True)
        chosen.append(part.cache)
      seen.append(tuple(chosen))
      cache = self._empty_cache(layers, len(own), num_slots)
      wanted = "logits" if is_last else "states"
      cache, own = self.read_part(layers, own, cache, seen[-1], wanted=wanted)
      caches.append(cache)
    return caches, seen, own

  def _scores(self, layer, own, states):
    """How much attention tokens of a prefix get from the last token of each row, in a layer.

    Args:
      layer: index of the layer.
      own: for each row, what of its own tokens enters the layer; they get attention, too.
      states: what of the prefix enters the layer, in T rows.

    Returns:
      The means over all heads, float32 [B, T].
    """
    count = np.array([len(row) for row in own], np.int32)
    (batch,) = _batches(own, [(int(count.max()), bucket(int(count.max()), 16))])
    with self._running("last_queries", layer, *batch.shape[:2]):
      queries, of_own = programs.last_queries(
        *self._model, *self._put(batch, count), len(states), layer
      )
    scores, start = [], 0
    for num_tokens, size in piece_sizes(len(states)):
      piece = _padded(states.take(slice(start, start + num_tokens)), size)[None]
      with self._running("score", layer, len(queries), size):
        of_piece = programs.score(*self._model, queries, self._put(piece), start, layer)
        scores.append(np.asarray(of_piece)[..., :num_tokens])
      start += num_tokens
    scores = np.concatenate([*scores, np.asarray(of_own)], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights.mean(axis=1)[:, :start]

  def read_part(
    self,
    layers: range,
    rows: Sequence[Tokens] | Sequence[Float[np.ndarray, "t D"]],
    cache: KVCache,
    behind: tuple[KVCache, ...] = (),
    *,
    sizes: list[tuple[int, int]] | None = None,
    wanted: str = "",
  ) -> tuple[KVCache, Any]:
    """Reads tokens with a part of the layers, in pieces. The host has them, before and after.

    Args:
      layers: the part.
      rows: for each row of the cache the tokens; or what left the part before.
      cache: of the tokens before, with free slots. It is donated.
      behind: see `programs.read`.
      sizes: of the pieces and of their padding; see `piece_sizes`.
      wanted: see `programs.read`.

    Returns:
      The cache; and what is wanted: for "states" one array [t, D] for each row.
    """
    count = np.array([_length(row) for row in rows])
    sizes = own_pieces(int(count.max())) if sizes is None else sizes
    outputs, start = [], 0
    for batch, (num_tokens, size) in zip(_batches(rows, sizes), sizes, strict=True):
      here = np.clip(count - start, 0, num_tokens).astype(np.int32)
      start += num_tokens
      slots = (cache.num_slots, *(each.num_slots for each in behind))
      with self._running("read", layers, len(rows), size, *slots):
        arrays = self._put(batch, here)
        cache, output = programs.read(*self._model, *arrays, cache, behind, layers, wanted)
        jax.block_until_ready(cache)  # no work piles up, and progress is told as it is
      outputs.append((output, here))
    if wanted == "states":
      pieces = [[np.asarray(x)[row, : n[row]] for x, n in outputs] for row in range(len(rows))]
      return cache, [np.concatenate(of_row) for of_row in pieces]
    if not wanted:
      return cache, None
    logits = outputs[0][0]
    for later, here in outputs[1:]:  # a row's last token is in the last piece that has any of it
      logits = jnp.where((here > 0)[:, None], later, logits)
    return cache, logits

  def write(
    self, reading: Reading, max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> Iterator[tuple[Int[np.ndarray, "B steps"], Reading]]:
    """Decodes, a few tokens at a time, until every row has its stop token.

    Args:
      reading: from `read`, with enough free slots. It is donated: it must not be used afterwards.
      max_new_tokens: the most tokens of an answer.
      sampling: how tokens are chosen.

    Yields:
      The new tokens of each row, with its stop token, and -1 after it; and the reading with these
      tokens.
    """
    sampling = sampling.check()
    key = jax.random.key(sampling.seed)
    finished = self._put(np.zeros(len(reading.logits), bool))
    for start in range(0, max_new_tokens, DECODE_STEPS):
      slots = [cache.num_slots for cache in reading.caches]
      slots += [cache.num_slots for part in reading.behind for cache in part]
      num_steps = min(DECODE_STEPS, max_new_tokens - start)
      with self._running("decode", len(finished), *slots):
        tokens, caches, logits, finished = programs.decode(
          *self._model,
          reading.caches,
          reading.behind,
          reading.logits,
          finished,
          self._stop_ids,
          jax.random.fold_in(key, start),
          sampling.temperature,
          sampling.top_p,
          num_steps,
        )
        tokens = np.asarray(tokens)[:, :num_steps]
      reading = reading._replace(caches=caches, logits=logits)
      yield tokens, reading
      if np.asarray(finished).all():
        return

  def generate(
    self, prompts: Sequence[Prompt], max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> list[list[int]]:
    """Answers a batch of prompts. Returns the token ids of each row, without the stop token."""
    prefixes, rows = zip(*[self._split_prompt(prompt) for prompt in prompts], strict=True)
    if not any(prefix.num_tokens for prefix in prefixes):
      prefixes = ()
    reading = self.read(rows, max_new_tokens, behind=prefixes)
    return self.answers(reading, max_new_tokens, sampling)

  def answers(
    self, reading: Reading, max_new_tokens: int, sampling: Sampling = Sampling()
  ) -> list[list[int]]:
    """Writes as `write` does. Returns the token ids of each row, without the stop token."""
    steps = [tokens for tokens, _ in self.write(reading, max_new_tokens, sampling)]
    not_text = {NO_TOKEN, *self._stop_ids.tolist()}
    return [[t for t in row if t not in not_text] for row in np.concatenate(steps, 1).tolist()]

  def _split_prompt(self, prompt):
    """The prefix of a prompt, up to its last visual token; and the ids of the text after it."""
    prefix, is_visual = Prefix(self), prompt.visual_index >= 0
    end = len(is_visual) - int(is_visual[::-1].argmax()) if is_visual.any() else 0
    for run in np.split(np.arange(end), np.flatnonzero(np.diff(is_visual[:end])) + 1):
      if len(run) and is_visual[run[0]]:
        prefix.add_visual(np.asarray(prompt.visual_tokens)[prompt.visual_index[run]])
      else:
        prefix.add_text(prompt.token_ids[run])
    prefix.settle()
    return prefix, prompt.token_ids[end:]

  def tokens(self, token_ids: Int[np.ndarray, "T"]) -> Tokens:
    """Text tokens, without padding."""
    token_ids = np.asarray(token_ids, np.int32)
    visual_tokens = np.zeros((len(token_ids), self.config.decoder.width), self.dtype)
    return Tokens(token_ids, visual_tokens, np.full(len(token_ids), NO_TOKEN, np.int32))

  def empty_prefix_cache(self, layers: range, num_slots: int) -> KVCache:
    """A cache without tokens, for what stands before the question."""
    return self._empty_cache(layers, 1, num_slots, self._kept_as, self._layout.slot_shards)

  def _empty_cache(self, layers, batch, num_slots, kept_as=Wide, shards=1):
    make = functools.partial(
      self._cache_type.empty,
      self.config.decoder,
      batch,
      num_slots,
      depth=len(layers),
      dtype=self.dtype,
      kept_as=kept_as,
      shards=shards,
    )
    if self._layout.mesh is None:
      return make()
    return jax.jit(make, out_shardings=self._layout.shardings(jax.eval_shape(make).axes))()

  def shortened(self, cache: KVCache, length: Int[np.ndarray, "B shards"]) -> KVCache:
    """A cache with the first tokens of each row only, so many on each device."""
    return cache._replace(length=self._layout.device_put(length, *cache.axes.length))

  def forget(self, cache: KVCache, start: int, num_tokens: int) -> KVCache:
    """A cache without some of its tokens; see `Qwen2.forget`. It is donated."""
    with self._running("forget", cache.depth, cache.num_slots):
      return programs.forget(*self._model, cache, start, num_tokens)

  def check_window(self) -> None:
    """Checks that what is read can be forgotten again.

    Raises:
      InputError: the slots of a cache are split over several devices.
    """
    if self._layout.slot_shards > 1:
      raise InputError(
        "window needs caches whose slots are on one device, but mesh.data x mesh.fsdp x "
        f"mesh.sequence is {self._layout.slot_shards}; make it 1 (mesh.tensor may be more), or "
        "give no window"
      )

  def widened(self, cache: KVCache, num_slots: int) -> KVCache:
    """The same tokens in a cache with at least so many slots. The old one is freed."""
    return cache if cache.num_slots >= num_slots else cache.widened(num_slots)

  def check_context(self, num_tokens: int, max_new_tokens: int) -> None:
    """Checks that a prompt and its answer fit into the model's context.

    Raises:
      InputError: they do not.
    """
    available = self.config.decoder.max_positions
    if num_tokens + max_new_tokens > available:
      raise InputError(
        f"the prompt has {num_tokens} tokens and the answer may have {max_new_tokens}, but the "
        f"context of {self.config.name} holds {available}; give fewer frames (max_frames), a "
        "shorter question or answer (max_new_tokens), or a longer context (context, yarn)"
      )

  @property
  def is_on_several_hosts(self) -> bool:
    """Whether other processes compute, too; all must start the same programs in the same order."""
    return self._layout.mesh is not None and self._layout.mesh.is_multi_process

  @property
  def group_size(self) -> int:
    """Clips that are encoded at once."""
    mesh = self._layout.mesh
    return CLIPS_PER_GROUP * (1 if mesh is None else mesh.size)

  def _groups(self, program, clips):
    """Yields what a program makes of each group of clips, and how many of these are no padding.

    The next group is read and dispatched before the result of this one is waited for. If a clip
    cannot be read, the error comes after those before it.
    """
    errors = []
    groups = self._dispatched(program, _up_to_error(clips, errors))
    for (result, num_clips), _ in itertools.pairwise(itertools.chain(groups, [None])):
      with naming_what_needs_memory(program.__name__, f"{self.group_size} clips"):
        result = np.asarray(result)
      yield result, num_clips
    if errors:
      raise errors.pop()

  def _dispatched(self, program, clips):
    clips = iter(clips)
    while group := list(itertools.islice(clips, self.group_size)):
      num_clips = len(group)
      group = np.stack(group + group[-1:] * (self.group_size - num_clips))
      with self._running(program.__name__, *group.shape[:3]):
        result = program(*self._model, self._layout.device_put(group[None], "batch", "clips"))
      yield result, num_clips

  def _put(self, *arrays):
    """Puts arrays on the devices, on each of them the whole."""
    arrays = self._layout.device_put(arrays)
    return arrays if len(arrays) > 1 else arrays[0]

  @contextlib.contextmanager
  def _running(self, program, *shape):
    """Says so if the first use of a shape takes long, or if the device has no memory for it."""
    is_new = (program, *shape) not in self._compiled
    self._compiled.add((program, *shape))
    told = _told_if_long(program) if is_new else contextlib.nullcontext()
    with naming_what_needs_memory(program, str(shape)), told:
      yield


@contextlib.contextmanager
def _told_if_long(program):
  """Logs after two seconds that a program is being compiled."""
  said = f"compiling the program {program!r}, which is kept for the next time ..."
  timer = threading.Timer(_PATIENCE, _log.info, [said])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _up_to_error(items, errors):
  """Yields items until there is no more, or an error, which is added to `errors`."""
  try:
    yield from items
  except Exception as error:
    errors.append(error)


def _length(row):
  return len(row.token_ids) if isinstance(row, Tokens) else len(row)


def _batches(rows, sizes):
  """Yields each piece of all rows, padded: trees of arrays [B, size, ...]."""
  start = 0
  for num_tokens, size in sizes:

    def piece(x, part=slice(start, start + num_tokens), size=size):
      """The piece of one array."""
      return _padded(x[part], size)

    yield jax.tree.map(lambda *of_rows: np.stack(of_rows), *[jax.tree.map(piece, r) for r in rows])
    start += num_tokens


def _padded(x, size):
  """Adds zeros to the first axis."""
  return np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))
