"""Batches of training data: drawn, read by worker processes, packed, and begun again anywhere.

  rows    = open_rows(read_mixture("stage3.yaml"))
  batches = iter(mixture_batches(config, rows, make_tokenizer))
  batch   = next(batches)            # numpy arrays of fixed shapes, see `sharded_rows.empty_rows`
  state   = batches.get_state()      # fit for JSON; `set_state` goes on behind this batch

Row r of a batch comes from stream r // (rows / streams). A stream is a sequence of examples that
depends on the seed alone, so its state is small, see `packed_stream`. All that is known of a stream
stands under its number: put together, the streams of several processes' states are one state.
"""

import hashlib
import json
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from videochat_flash_jax.data.batches.broken_share import BrokenShare
from videochat_flash_jax.data.batches.data_config import DataConfig
from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.data.batches.examples import ExampleReader, seen_as
from videochat_flash_jax.data.batches.packed_stream import PackedStream, Reader, stop_all
from videochat_flash_jax.data.batches.replacement import ReplacingReader
from videochat_flash_jax.data.batches.row_packer import write_row
from videochat_flash_jax.data.batches.sharded_rows import empty_rows
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_VERSION = 3
# Facts that may be others when a run goes on, on another mesh perhaps: rows are then packed anew.
_OF_LAYOUT = ("num_shards", "zigzag", "clips_per_shard", "tiles_per_shard")
_REMEDIES = {  # for facts that say nothing to a reader
  "mixture": "give the one it was saved with, and the same max_frames to open_rows",
  "order": "go on with the versions of grain and numpy it was saved with",
  "tokenizer": "give the one it was saved with",
}
_PACKED = ("tokens", "visual_tokens", "places")  # counted in each stream, over all of its rows
_NAMES_OF_FEATURES = {"frames": "features", "tiles": "tile_features"}


def mixture_batches(
  config: DataConfig,
  rows,
  make_tokenizer: Callable[[], Tokenizer],
  streams: Sequence[int] | None = None,
  features: FeatureStore | None = None,
) -> "TrainBatches":
  """Batches of a mixture; opens the tokenizer alone.

  Args:
    config: what batches are made of.
    rows: of `data.mixture.rows.open_rows`.
    make_tokenizer: gives the tokenizer, once in each worker: `partial(BPETokenizer, path)`.
    streams: see `TrainBatches`.
    features: to take in place of frames; batches have `features [B, C, V, E]` and perhaps
      `tile_features [B, I, V, E]`, bfloat16, in place of `frames` and `tiles`.

  Raises:
    InputError: the rows hold images, and batches have no room for any.
  """
  if not config.layout.tiles_per_shard and rows.has("image"):
    raise InputError("the mixture holds images, but tiles_per_shard is 0; give room for some")
  reader = ExampleReader(config.example, config.layout, make_tokenizer, features)
  order = ExampleOrder(rows, config.seed, config.streams)
  facts = {
    "mixture": rows.fingerprint,
    "order": order.digest(),
    "features": None if features is None else features.key.digest,
    "tokenizer": vocabulary_digest(reader.tokenizer),
  }
  reader = ReplacingReader(rows, reader, order, config.seed)
  return TrainBatches(config, reader, facts, streams, features)


class TrainBatches(grain.IterDataset):
  """An endless data set of batches; its iterators can be saved, see `TrainBatchesIterator`."""

  def __init__(
    self,
    config: DataConfig,
    reader: Reader,
    facts: Mapping[str, Any],
    streams: Sequence[int] | None = None,
    features: FeatureStore | None = None,
  ):
    """Reads nothing yet.

    Args:
      config: what batches are made of.
      reader: of examples: those of a mixture (`mixture_batches`), or of the synthetic world.
      facts: what decides which examples it gives; a state saved with others is refused.
      streams: which of the config's streams this process reads; by default all. Its batches have
        their rows only.
      features: that the reader gives in place of frames.
    """
    super().__init__()
    self._config, self._reader, self._features = config, reader, features
    self._streams = range(config.streams) if streams is None else streams
    self._facts = config.facts() | facts

  def __iter__(self) -> "TrainBatchesIterator":
    return TrainBatchesIterator(
      self._config, self._reader, self._streams, self._facts, self._features
    )


class TrainBatchesIterator(grain.DatasetIterator):
  """Gives batches: dictionaries of numpy arrays as of `sharded_rows.empty_rows`.

  `grain.checkpoint.CheckpointSave(iterator)` saves it with a model, through Orbax. `close` ends its
  workers; so does the end of the program, or an error of `next`, after which the state is that
  behind the last batch given.
  """

  def __init__(
    self,
    config: DataConfig,
    reader: Reader,
    streams: Sequence[int],
    facts: dict[str, Any],
    features: FeatureStore | None,
  ):
    """Made by `TrainBatches`; `facts` are what a saved state has to agree with."""
    super().__init__()
    self._config, self._facts, self._features = config, facts, features
    self._saved_facts = facts  # of the state gone on from, until a batch was packed behind it
    self._streams = {stream: PackedStream(reader, stream, config) for stream in streams}
    weakref.finalize(self, _close_at_exit, weakref.ref(self), list(self._streams.values()))
    self._share = BrokenShare(config.max_broken_share)
    self._packed = {stream: {"last": []} | dict.fromkeys(_PACKED, 0) for stream in streams}

  def __next__(self) -> dict[str, np.ndarray]:
    state = self.get_state()
    try:
      return self._next_batch()
    except BaseException:
      self._go_to(state)
      raise

  def _next_batch(self):
    self.start_prefetch()
    layout = self._config.layout
    rows_each = self._config.rows // self._config.streams
    num_rows = len(self._streams) * rows_each
    batch = empty_rows(layout, num_rows, *seen_as(self._config.example, self._features))
    for place, (name, stream) in enumerate(self._streams.items()):
      self._packed[name]["last"] = []
      for number in range(place * rows_each, (place + 1) * rows_each):
        packed = stream.next_row(self._share)
        write_row(packed, layout, batch, number)
        self._count(packed, self._packed[name])
    self._saved_facts = self._facts
    if self._features is None:
      return batch
    return {_NAMES_OF_FEATURES.get(name, name): values for name, values in batch.items()}

  def _count(self, packed, counts):
    counts["last"].append([item.source_row for item in packed])
    counts["tokens"] += sum(len(item.example.token_ids) for item in packed)
    counts["visual_tokens"] += sum(int((item.example.visual_index >= 0).sum()) for item in packed)
    counts["places"] += self._config.layout.tokens

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to go on behind the last batch: a few kilobytes, fit for JSON."""
    return {
      "version": _VERSION,
      "facts": self._saved_facts,
      "streams": {
        str(stream): rows.state() | self._packed[stream] | self._share.state(stream)
        for stream, rows in self._streams.items()
      },
    }

  def set_state(self, state: dict[str, Any]):
    """Goes on behind the batch after which `get_state` was called.

    If rows had another layout then (`num_shards`, `zigzag`, `clips_per_shard`, `tiles_per_shard`),
    the examples that wait in unfinished rows are packed anew: the batches are others than without
    the change, but no example is left out or given twice.

    Raises:
      InputError: the state is of other batches than these; names the first thing that differs.
    """
    self._check_state(state)
    self._go_to(state)
    if changed := self._changes_of_layout(state):
      _log.info("rows are packed anew, no example is lost: %s", ", ".join(changed))

  def _changes_of_layout(self, state) -> list[str]:
    facts = [(name, state["facts"][name], self._facts[name]) for name in _OF_LAYOUT]
    return [f"{name} was {saved}, now {now}" for name, saved, now in facts if saved != now]

  def _go_to(self, state):
    self._saved_facts, is_anew = state["facts"], bool(self._changes_of_layout(state))
    for stream, rows in self._streams.items():
      saved = state["streams"][str(stream)]
      rows.set_state(saved, is_anew)
      self._share.set_state(saved, stream)
      self._packed[stream] = {name: saved[name] for name in ("last", *_PACKED)}

  def _check_state(self, state):
    if state.get("version") != _VERSION:
      raise InputError(
        f"the saved batches have format {state.get('version')}, this program knows {_VERSION}; "
        "go on with the program that saved them, or begin without their state"
      )
    for name, value in self._facts.items():
      saved = state["facts"].get(name)
      if saved != value and name not in _OF_LAYOUT:
        remedy = _REMEDIES.get(name, f"give {saved!r}")
        raise InputError(
          f"the saved batches were made with {name} {saved!r}, now it is {value!r}; {remedy}, "
          "or begin without their state"
        )
    missing = [stream for stream in self._streams if str(stream) not in state["streams"]]
    if missing:
      raise InputError(
        f"the saved state has the streams {', '.join(state['streams'])}, but this process reads "
        f"{missing[0]}; run as many processes as when it was saved"
      )

  def start_prefetch(self):
    """Begins to read, if that has not begun yet."""
    for stream in self._streams.values():
      stream.start()

  def close(self):
    """Ends the workers."""
    super().close()
    stop_all(self._streams.values())


def _close_at_exit(reference: weakref.ref, streams: Sequence[PackedStream]):
  """Ends the workers before the interpreter takes Grain's modules apart, which that needs."""
  stop_all(streams)
  iterator = reference()
  if iterator is not None:
    iterator.close = lambda: None  # Grain calls it once more, after our modules are gone


def batch_metrics(
  state: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> dict[str, float]:
  """What to log of batches: examples, broken ones by reason, how full rows were packed.

  {"examples": 812, "damaged": 2, "tokens": 198000, "visual_tokens": 96000, "tokens_filled": 0.97,
   "broken_share": 0.005, "broken/missing file": 4}

  `damaged` are examples of videos of which some frames could not be read; they are used.

  Args:
    state: of their iterator, or those of several processes put together.
    before: an earlier one, behind which to begin; None: from the first batch on.
  """
  counts = _counts(state)
  if before is not None:
    counts.subtract(_counts(before))
  reasons = {name: count for name, count in counts.items() if name.startswith("broken/") and count}
  return {
    **{name: counts[name] for name in ("examples", "damaged", "tokens", "visual_tokens")},
    "tokens_filled": counts["tokens"] / max(counts["places"], 1),
    "broken_share": sum(reasons.values()) / max(counts["examples"], 1),
    **reasons,
  }


def _counts(state) -> Counter:
  counts = Counter()
  for stream in state["streams"].values():
    counts.update({name: stream[name] for name in ("examples", "damaged", *_PACKED)})
    for reasons in stream["broken"].values():
      counts.update({f"broken/{reason}": count for reason, count in reasons.items()})
  return counts


def vocabulary_digest(tokenizer: Tokenizer) -> str:
  """Tells vocabularies apart: the same for the same pieces at the same ids."""
  pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
  marks = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_id, tokenizer.pad_id
  return hashlib.blake2b(json.dumps([pieces, marks]).encode(), digest_size=8).hexdigest()
