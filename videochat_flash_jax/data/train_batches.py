"""Batches of training data: drawn, read by worker processes, packed, and begun again anywhere.

  rows    = open_rows(read_mixture("stage3.yaml"))
  batches = iter(TrainBatches(config, rows, make_tokenizer))
  batch   = next(batches)            # numpy arrays of fixed shapes, see `sharded_rows.empty_rows`
  state   = batches.get_state()      # fit for JSON; `set_state` goes on behind this batch

Row r of a batch comes from stream r // (rows / streams). A stream is a sequence of examples that
depends on the seed alone, so its state is a number: how many were taken; and the numbers of those
in rows that are not full yet, which are read once more when a run goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from videochat_flash_jax.data.broken_share import BrokenShare
from videochat_flash_jax.data.data_config import DataConfig
from videochat_flash_jax.data.example_order import ExampleOrder
from videochat_flash_jax.data.examples import ExampleReader, seen_as
from videochat_flash_jax.data.feature_store import FeatureStore
from videochat_flash_jax.data.replacement import Drawn, ReplacingReader
from videochat_flash_jax.data.row_packer import Packed, RowPacker, write_row
from videochat_flash_jax.data.sharded_rows import empty_rows
from videochat_flash_jax.data.tokenizer import Tokenizer
from videochat_flash_jax.errors import InputError

_ENDLESS = 1 << 40
_VERSION = 1
_EXAMPLES_AHEAD = 2  # of each worker
_NAMES_OF_FEATURES = {"frames": "features", "tiles": "tile_features"}
_LEAST_SHARED_BYTES = 1 << 16  # smaller arrays are sent, larger ones handed over in shared memory


class TrainBatches(grain.IterDataset):
  """An endless data set of batches; its iterators can be saved, see `TrainBatchesIterator`."""

  def __init__(
    self,
    config: DataConfig,
    rows,
    make_tokenizer: Callable[[], Tokenizer],
    streams: Sequence[int] | None = None,
    features: FeatureStore | None = None,
  ):
    """Opens nothing yet.

    Args:
      config: what batches are made of.
      rows: of `data.rows.open_rows`.
      make_tokenizer: gives the tokenizer, once in each worker: `partial(BPETokenizer, path)`.
      streams: which of the config's streams this process reads; by default all. Its batches have
        their rows only.
      features: to take in place of frames; batches have `features [B, C, V, E]` and perhaps
        `tile_features [B, I, V, E]`, bfloat16, in place of `frames` and `tiles`.

    Raises:
      InputError: the rows hold images, and batches have no room for any.
    """
    super().__init__()
    if not config.layout.tiles_per_shard and rows.has("image"):
      raise InputError("the mixture holds images, but tiles_per_shard is 0; give room for some")
    self._config = config
    self._streams = range(config.streams) if streams is None else streams
    self._facts = config.facts() | {"mixture": rows.fingerprint}
    self._facts["features"] = None if features is None else features.key.digest
    order = ExampleOrder(rows, config.seed, config.streams)
    reader = ExampleReader(config.example, config.layout, make_tokenizer, features)
    self._reader, self._features = ReplacingReader(rows, reader, order, config.seed), features

  def __iter__(self) -> "TrainBatchesIterator":
    return TrainBatchesIterator(
      self._config, self._reader, self._streams, self._facts, self._features
    )


class TrainBatchesIterator(grain.DatasetIterator):
  """Gives batches: dictionaries of numpy arrays as of `sharded_rows.empty_rows`.

  `grain.checkpoint.CheckpointSave(iterator)` saves it with a model, through Orbax. To be closed
  when there are workers.
  """

  def __init__(
    self,
    config: DataConfig,
    reader: ReplacingReader,
    streams: Sequence[int],
    facts: dict[str, Any],
    features: FeatureStore | None,
  ):
    """Made by `TrainBatches`; `facts` are what a saved state has to agree with."""
    super().__init__()
    self._config, self._facts, self._features = config, facts, features
    self._streams = {
      stream: _PackedRows(_Examples(reader, stream, config.workers), config) for stream in streams
    }
    self._share = BrokenShare(config.max_broken_share)
    self._num_tokens = self._num_places = 0

  def __next__(self) -> dict[str, np.ndarray]:
    self.start_prefetch()
    layout = self._config.layout
    rows_each = self._config.rows // self._config.streams
    num_rows = len(self._streams) * rows_each
    batch = empty_rows(layout, num_rows, *seen_as(self._config.example, self._features))
    for place, stream in enumerate(self._streams.values()):
      for number in range(place * rows_each, (place + 1) * rows_each):
        packed = stream.next_row(self._share)
        write_row(packed, layout, batch, number)
        self._num_tokens += sum(len(item.example.token_ids) for item in packed)
    self._num_places += num_rows * layout.tokens
    if self._features is None:
      return batch
    return {_NAMES_OF_FEATURES.get(name, name): values for name, values in batch.items()}

  def get_state(self) -> dict[str, Any]:
    """What `set_state` needs to go on behind the last batch: a few kilobytes, fit for JSON."""
    return {
      "version": _VERSION,
      "facts": self._facts,
      "streams": {str(stream): rows.state() for stream, rows in self._streams.items()},
      "tokens": self._num_tokens,
      "places": self._num_places,
      **self._share.state(),
    }

  def set_state(self, state: dict[str, Any]):
    """Goes on behind the batch after which `get_state` was called.

    Raises:
      InputError: the state is of other batches than these; names the first thing that differs.
    """
    self._check_state(state)
    for stream, rows in self._streams.items():
      rows.set_state(state["streams"][str(stream)])
    self._share.set_state(state)
    self._num_tokens, self._num_places = state["tokens"], state["places"]

  def _check_state(self, state):
    if state.get("version") != _VERSION:
      raise InputError(
        f"the saved batches have format {state.get('version')}, this program knows {_VERSION}; "
        "go on with the program that saved them, or begin without their state"
      )
    for name, value in self._facts.items():
      saved = state["facts"].get(name)
      if saved != value:
        remedy = "give the one it was saved with" if name == "mixture" else f"give {saved!r}"
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
    for stream in self._streams.values():
      stream.stop()


def batch_metrics(state: dict[str, Any]) -> dict[str, float]:
  """What to log of a state: examples so far, broken ones by reason, how full rows were packed.

  {"examples": 812, "tokens_filled": 0.97, "broken_share": 0.005, "broken/missing file": 4}
  """
  reasons: dict[str, float] = {}
  for counts in state["broken"].values():
    for reason, count in counts.items():
      reasons[f"broken/{reason}"] = reasons.get(f"broken/{reason}", 0) + count
  return {
    "examples": state["examples"],
    "tokens_filled": state["tokens"] / max(state["places"], 1),
    "broken_share": sum(reasons.values()) / max(state["examples"], 1),
    **reasons,
  }


class _PackedRows:
  """The packed rows of one stream."""

  def __init__(self, examples: "_Examples", config: DataConfig):
    self._examples, self._layout = examples, config.layout
    self._drawn: grain.DatasetIterator | None = None
    self._packer: RowPacker | None = None
    self._next, self._unfinished = 0, []

  def state(self) -> dict[str, Any]:
    unfinished = self._packer.numbers if self._packer else self._unfinished
    return {"next": self._next, "unfinished": unfinished}

  def set_state(self, state):
    self.stop()
    self._next, self._unfinished = state["next"], state["unfinished"]

  def start(self):
    if self._drawn is None:
      again = [number for row in self._unfinished for number in row]
      self._drawn = self._examples.read(again, self._next)

  def stop(self):
    self._unfinished, self._packer = self.state()["unfinished"], None
    if self._drawn is not None:
      self._drawn.close()
      self._drawn = None

  def next_row(self, share: BrokenShare) -> list[Packed]:
    if self._packer is None:
      packer = RowPacker(self._layout)
      for row in self._unfinished:  # read again, and counted before
        packer.put_together([Packed(number, next(self._drawn).example) for number in row])
      self._packer = packer
    full = None
    while full is None:
      drawn = next(self._drawn)
      share.count(drawn)
      full = self._packer.add(Packed(self._next, drawn.example))
      self._next += 1
    return full


class _Examples:
  """Examples of one stream, read ahead by worker processes."""

  def __init__(self, reader: ReplacingReader, stream: int, workers: int):
    self._reader, self._stream, self._workers = reader, stream, workers

  def read(self, again: Sequence[int], first: int) -> grain.DatasetIterator:
    """Yields the examples `again`, then all from number `first` on."""

    def draw(place: int) -> Drawn:
      number = again[place] if place < len(again) else first + place - len(again)
      return reader.read(stream, number)

    reader, stream = self._reader, self._stream
    # One at a time and nothing ahead, in each worker: its output is buffered already.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    examples = grain.MapDataset.range(_ENDLESS).map(draw).to_iter_dataset(read_options)
    options = grain.experimental.DatasetOptions(min_shm_size=_LEAST_SHARED_BYTES)
    examples = grain.experimental.WithOptionsIterDataset(examples, options)
    if self._workers:
      if not flags.FLAGS.is_parsed():  # Grain asks for it
        flags.FLAGS.mark_as_parsed()
      examples = examples.mp_prefetch(
        grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_EXAMPLES_AHEAD)
      )
    drawn = iter(examples)
    drawn.start_prefetch()
    return drawn
