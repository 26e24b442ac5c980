"""Makes batches of training data: draws, reads and packs examples; can resume after any batch.

  rows    = open_rows(read_mixture("stage3.yaml"))
  batches = iter(mixture_batches(config, rows, make_tokenizer))
  batch   = next(batches)            # numpy arrays of fixed shapes, see `sharded_rows.empty_rows`
  state   = batches.get_state()      # JSON values; `set_state` continues after this batch

Row r of a batch comes from stream r // (rows / streams). A stream is a sequence of examples that
depends only on the seed, so its state is small; see `packed_stream`. The state is a dict by stream
number, so the states of several processes can be merged into one: each has its own streams.
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
from videochat_flash_jax.data.batches.examples import ExampleReader, media_shapes
from videochat_flash_jax.data.batches.packed_stream import PackedStream, stop_all
from videochat_flash_jax.data.batches.replacement import Reader, ReplacingReader
from videochat_flash_jax.data.batches.row_packer import write_row
from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN, STORED_FEATURES, empty_rows
from videochat_flash_jax.data.batches.shared_stream import Sharing, digest
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.errors import InputError, one_line

_log = logging.getLogger("videochat_flash_jax")
_VERSION = 3
# Facts that may change when a run is resumed, for example on another mesh. Rows are then packed
# again.
_MESH_FACTS = ("num_shards", "zigzag", "clips_per_shard", "tiles_per_shard")
_REMEDIES = {  # for facts whose values mean nothing to a reader
  "mixture": "give the one it was saved with, and the same max_frames to open_rows",
  "order": "continue with the versions of grain and numpy it was saved with",
  "tokenizer": "give the one it was saved with",
}
# Counts of each stream over all of its rows. "places" are all tokens of the rows, with padding.
_PACKED = ("tokens", "visual_tokens", "places")


def mixture_batches(
  config: DataConfig,
  rows,
  make_tokenizer: Callable[[], Tokenizer],
  streams: Sequence[int] | None = None,
  features: FeatureStore | None = None,
  sharing: Sharing | None = None,
) -> "TrainBatches":
  """Returns the batches of a mixture; of all files only the tokenizer is opened.

  Args:
    config: settings of the batches.
    rows: rows of `data.mixture.rows.open_rows`.
    make_tokenizer: returns the tokenizer, such as `partial(BPETokenizer, path)`; called once in
      each worker.
    streams: see `TrainBatches`.
    features: features to use instead of frames. Batches then have `features [B, C, V, E]` instead
      of `frames`, and `tile_features [B, I, V, E]` instead of `tiles`, both bfloat16.
    sharing: see `TrainBatches`.

  Raises:
    InputError: the rows hold images, but `tiles_per_shard` is 0.
  """
  if not config.row_shape.tiles_per_shard and rows.has("image"):
    raise InputError(
      "the mixture holds images, but tiles_per_shard is 0; give room for at least one tile"
    )
  reader = ExampleReader(config.example, config.row_shape, make_tokenizer, features)
  order = ExampleOrder(rows, config.seed, config.streams)
  facts = {
    "mixture": rows.fingerprint,
    "order": order.digest(),
    "features": None if features is None else features.key.digest,
    "tokenizer": vocabulary_digest(reader.tokenizer),
  }
  reader = ReplacingReader(rows, reader, order, config.seed)
  return TrainBatches(config, reader, facts, streams, features, sharing)


class TrainBatches(grain.IterDataset):
  """An endless data set of batches; its iterators can be saved: see `TrainBatchesIterator`."""

  def __init__(
    self,
    config: DataConfig,
    reader: Reader,
    facts: Mapping[str, Any],
    streams: Sequence[int] | None = None,
    features: FeatureStore | None = None,
    sharing: Sharing | None = None,
  ):
    """Stores the settings; nothing is read yet.

    Args:
      config: settings of the batches.
      reader: reads the examples of a mixture (`mixture_batches`) or of the synthetic world.
      facts: everything that decides which examples the reader returns. A state that was saved with
        other facts raises `InputError`.
      streams: which of the config's streams this process reads; by default all. Its batches only
        have the rows of these streams.
      features: the store whose features the reader returns instead of frames.
      sharing: which of the streams other processes read, too; None for none. These processes read
        them together, each of them in its own iterator.
    """
    super().__init__()
    self._config, self._reader = config, reader
    self._features, self._sharing = features, sharing
    self._streams = range(config.streams) if streams is None else streams
    self._facts = config.facts() | facts

  def __iter__(self) -> "TrainBatchesIterator":
    return TrainBatchesIterator(
      self._config, self._reader, self._streams, self._facts, self._features, self._sharing
    )


class TrainBatchesIterator(grain.DatasetIterator):
  """Iterates over batches: dicts of numpy arrays as described in `sharded_rows.empty_rows`.

  `grain.checkpoint.CheckpointSave(iterator)` saves it together with a model, through Orbax. `close`
  ends the workers. The end of the program does the same, and an error in `next` too; after such an
  error the state is the one after the last returned batch.
  """

  def __init__(
    self,
    config: DataConfig,
    reader: Reader,
    streams: Sequence[int],
    facts: dict[str, Any],
    features: FeatureStore | None,
    sharing: Sharing | None,
  ):
    """Is called by `TrainBatches`; a saved state must agree with `facts`."""
    super().__init__()
    self._config, self._facts = config, facts
    self._features, self._sharing = features, sharing
    # Those of the restored state, until the first batch after it is packed.
    self._saved_facts = facts
    self._streams = {stream: PackedStream(reader, stream, config) for stream in streams}
    weakref.finalize(self, _close_at_exit, weakref.ref(self), list(self._streams.values()))
    self._share = BrokenShare(config.max_broken_share)
    self._packed = {stream: {"last": []} | dict.fromkeys(_PACKED, 0) for stream in streams}
    self._begin_sharing()

  def _begin_sharing(self):
    if self._sharing is not None:
      for stream, peers in self._sharing.begin().items():
        self._streams[stream].share(peers)

  def __next__(self) -> dict[str, np.ndarray]:
    state = self.get_state()
    try:
      return self._next_batch()
    except BaseException:
      self._restore(state)
      raise

  def _next_batch(self):
    self.start_prefetch()
    row_shape = self._config.row_shape
    stream_rows = self._config.rows // self._config.streams
    num_rows = len(self._streams) * stream_rows
    batch = empty_rows(row_shape, num_rows, *media_shapes(self._config.example, self._features))
    for index, (name, stream) in enumerate(self._streams.items()):
      counts, rows = self._packed[name], slice(index * stream_rows, (index + 1) * stream_rows)
      if stream.shared:
        batch_number = 1 + counts["places"] // (stream_rows * row_shape.tokens)
        stream.shared.begin_batch(f"{self._sharing.unit} {batch_number}")
      counts["last"], numbers = [], []
      for number in range(rows.start, rows.stop):
        packed = stream.next_row(self._share)
        write_row(packed, row_shape, batch, number)
        self._count(packed, counts)
        numbers += [item.number for item in packed]
      if stream.shared:
        # The numbers stand for clips and tiles: each example was compared when it was read.
        stream.shared.check_rows(digest(numbers, *(batch[field][rows] for field in PER_TOKEN)))
    self._saved_facts = self._facts
    if self._features is None:
      return batch
    return {STORED_FEATURES.get(name, name): values for name, values in batch.items()}

  def _count(self, packed, counts):
    counts["last"].append([item.source_row for item in packed])
    counts["tokens"] += sum(len(item.example.token_ids) for item in packed)
    counts["visual_tokens"] += sum(int((item.example.visual_index >= 0).sum()) for item in packed)
    counts["places"] += self._config.row_shape.tokens

  def get_state(self) -> dict[str, Any]:
    """Returns what `set_state` needs to continue after the last batch: kilobytes of JSON values."""
    return {
      "version": _VERSION,
      "facts": self._saved_facts,
      "streams": {
        str(stream): rows.state() | self._packed[stream] | self._share.state(stream)
        for stream, rows in self._streams.items()
      },
    }

  def set_state(self, state: dict[str, Any]):
    """Continues after the batch after which `get_state` was called.

    If `num_shards`, `zigzag`, `clips_per_shard` or `tiles_per_shard` have changed since then, the
    examples in unfinished rows are packed again. The following batches differ from those without
    the change, but no example is lost or used twice.

    Raises:
      InputError: the state belongs to other batches. The message names the first difference.
    """
    self._check_state(state)
    self._restore(state)
    self._begin_sharing()
    if changed := self._changed_mesh_facts(state):
      _log.info("rows are packed again, no example is lost: %s", ", ".join(changed))

  def _changed_mesh_facts(self, state) -> list[str]:
    facts = [(name, state["facts"][name], self._facts[name]) for name in _MESH_FACTS]
    return [f"{name} was {saved}, now {now}" for name, saved, now in facts if saved != now]

  def _restore(self, state):
    self._saved_facts, repack = state["facts"], bool(self._changed_mesh_facts(state))
    for stream, rows in self._streams.items():
      saved = state["streams"][str(stream)]
      rows.set_state(saved, repack)
      self._share.set_state(saved, stream)
      self._packed[stream] = {name: saved[name] for name in ("last", *_PACKED)}

  def _check_state(self, state):
    if state.get("version") != _VERSION:
      raise InputError(
        f"the saved batches have format {state.get('version')}, this program reads {_VERSION}; "
        "continue with the version of this package that saved them, or start without their state"
      )
    for name, value in self._facts.items():
      saved = state["facts"].get(name)
      if saved != value and name not in _MESH_FACTS:
        remedy = _REMEDIES.get(name, f"give {saved!r:.80}")
        raise InputError(
          f"the saved batches were made with {name} {saved!r:.80}, now it is {value!r:.80}; "
          f"{remedy}, or start without their state"
        )
    missing = [stream for stream in self._streams if str(stream) not in state["streams"]]
    if missing:
      raise InputError(
        f"the saved state has the streams {', '.join(state['streams'])}, but this process reads "
        f"{missing[0]}; run as many processes as when it was saved"
      )

  def start_prefetch(self):
    """Starts to read, if that has not started yet."""
    for stream in self._streams.values():
      stream.start()

  def close(self):
    """Ends the workers."""
    super().close()
    stop_all(self._streams.values())


def _close_at_exit(reference: weakref.ref, streams: Sequence[PackedStream]):
  """Ends the workers before the interpreter unloads Grain's modules, which are needed for it."""
  stop_all(streams)
  iterator = reference()
  if iterator is not None:
    iterator.close = lambda: None  # Grain calls it again after our modules are unloaded


def batch_metrics(
  state: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> dict[str, float]:
  """Computes what is logged about batches: examples, broken ones by reason, how full rows are.

  {"examples": 812, "damaged": 2, "tokens": 198000, "visual_tokens": 96000, "tokens_filled": 0.97,
   "broken_share": 0.005, "broken/missing file": 4, "cut": 30, "cut/a.jsonl": 30}

  `damaged` counts examples whose video has some frames that could not be read, and `cut` those
  whose answers do not fit into a row, by annotation file. They are used, as far as they go.

  Args:
    state: state of the iterator, or the merged states of several processes.
    before: an earlier state; only what came after it is counted. None counts from the first batch.
  """
  counts = _counts(state)
  if before is not None:
    counts.subtract(_counts(before))
  reasons = {name: count for name, count in counts.items() if name.startswith("broken/") and count}
  cut = {name: count for name, count in counts.items() if name.startswith("cut/") and count}
  return {
    **{name: counts[name] for name in ("examples", "damaged", "tokens", "visual_tokens")},
    "tokens_filled": counts["tokens"] / max(counts["places"], 1),
    "broken_share": sum(reasons.values()) / max(counts["examples"], 1),
    **reasons,
    "cut": sum(cut.values()),
    **cut,
  }


def _counts(state) -> Counter:
  counts = Counter()
  for stream in state["streams"].values():
    counts.update({name: stream[name] for name in ("examples", "damaged", *_PACKED)})
    for reasons in stream["broken"].values():
      counts.update({f"broken/{reason}": count for reason, count in reasons.items()})
    # Earlier versions did not count what is cut.
    cut = stream.get("cut", {})
    counts.update({f"cut/{one_line(source)}": count for source, count in cut.items()})
  return counts


def vocabulary_digest(tokenizer: Tokenizer) -> str:
  """Returns a digest of a vocabulary: equal if all ids stand for equal pieces of text."""
  pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
  special_ids = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_id, tokenizer.pad_id
  return hashlib.blake2b(json.dumps([pieces, special_ids]).encode(), digest_size=8).hexdigest()
