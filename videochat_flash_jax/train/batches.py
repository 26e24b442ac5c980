"""Which batches a run asks for, and how they come onto its devices.

a mixture (data.mixture)              rows of annotations, perhaps with stored features
the synthetic world (data.synthetic)  conversations about it, packed in the same way
objective "patches"                   clips of it, and what each of their patches shows
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from videochat_flash_jax.data.feature_key import FeatureKey, weights_digest
from videochat_flash_jax.data.feature_store import FeatureStore
from videochat_flash_jax.data.media_check import check_roots
from videochat_flash_jax.data.mixture import read_mixture
from videochat_flash_jax.data.rows import Rows, open_rows
from videochat_flash_jax.data.synthetic_examples import patch_batches, synthetic_batches
from videochat_flash_jax.data.tokenizer import load_tokenizer
from videochat_flash_jax.data.train_batches import mixture_batches
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.device_batches import (
  device_batches,
  own_rows,
  own_streams,
  row_groups,
)
from videochat_flash_jax.train.dropout_plans import with_plan
from videochat_flash_jax.train.program import TrainProgram
from videochat_flash_jax.train.settings import TrainSettings, data_config

_HELD_OUT = 90_210  # what is added to the seed where held-out examples are drawn, not read


@dataclasses.dataclass(frozen=True)
class RunBatches:
  """Batches of a run, that begin at the first one whenever they are begun.

  Attributes:
    share: of the streams of all processes, those that this process reads.
  """

  share: float
  _dataset: grain.IterDataset
  _shardings: Mapping[str, Any]
  _num_rows: int
  _rows: Rows | None

  def begin(self) -> grain.DatasetIterator:
    """Batches on the devices; to be closed."""
    return device_batches(self._dataset, self._shardings, self._num_rows)

  def names(self, state: Mapping[str, Any]) -> list[list[str]]:
    """What the rows of the last batch of this process hold: source and row of each example."""
    last = [row for stream in state.get("streams", {}).values() for row in stream["last"]]
    return [[self._name(number) for number in numbers] for numbers in last]

  def _name(self, number):
    if self._rows is None:
      return f"example {number} of the synthetic world"
    return f"{self._rows.source(number)}, {self._rows.label(number)}"


def run_batches(
  settings: TrainSettings,
  program: TrainProgram,
  hub: Path,
  vision: Any,
  num_streams: int = 0,
  *,
  held_out: bool = False,
) -> RunBatches:
  """The batches that a run is trained on, or those that it is measured on.

  Args:
    settings: of the run.
    program: whose batches they are.
    hub: directory of the tokenizer.
    vision: weights of the encoder, of which stored features must be.
    num_streams: of a run that goes on; 0 for what the settings say.
    held_out: of `eval.mixture`, or of the synthetic world with another seed.

  Raises:
    InputError: a file is missing or cannot be used.
  """
  if held_out:
    settings = _of_held_out(settings)
  shardings = jax.tree.map(lambda shape: shape.sharding, program.batch)
  if settings.objective == "patches":
    return _patches(settings, shardings)
  sharding, shape = shardings["token_ids"], program.batch["token_ids"].shape
  streams = num_streams or settings.data.streams or len(row_groups(sharding, shape))
  config = data_config(settings, program.layout.sequence_shards, streams)
  own = own_streams(sharding, shape, streams)
  make_tokenizer = functools.partial(load_tokenizer, hub)
  rows = None
  if settings.data.synthetic:
    questions = dict(settings.data.synthetic)
    dataset = synthetic_batches(config, settings.model, make_tokenizer, questions, own)
  else:
    mixture = read_mixture(settings.data.mixture)
    rows = open_rows(mixture, max_frames=settings.data.frames[1])
    check_roots(rows)
    store = _open_features(settings, vision) if settings.data.features else None
    dataset = mixture_batches(config, rows, make_tokenizer, own, store)
    if store is not None:
      shardings |= {"features": shardings["frames"]}
      shardings |= {"tile_features": shardings["tiles"]} if settings.tiles_per_shard else {}
  kept = own_rows(sharding, shape, streams)
  dataset = dataset.map(lambda batch: {name: array[kept] for name, array in batch.items()})
  if settings.dropout is not None:
    dataset = dataset.map(lambda batch: with_plan(batch, settings.dropout, program.layout))
  return RunBatches(len(own) / streams, dataset, shardings, settings.rows, rows)


def _of_held_out(settings):
  mixture, seed = settings.eval.mixture, settings.seed
  changes = {"mixture": mixture, "synthetic": ()} if mixture else {}
  if not mixture:
    seed = (seed + _HELD_OUT) % 2**32
  data = dataclasses.replace(settings.data, workers=0, **changes)
  return dataclasses.replace(settings, data=data, seed=seed)


def _patches(settings, shardings):
  if jax.process_count() > 1:
    raise InputError('config.objective "patches" is for one process; start only one')
  clips = settings.clips_per_shard
  dataset = patch_batches(settings.model, settings.rows, clips, settings.seed)
  return RunBatches(1.0, dataset, shardings, settings.rows * clips, None)


def _open_features(settings, vision) -> FeatureStore:
  """The stored features, if they are of this encoder."""
  path = Path(settings.data.features)
  try:
    dtype = json.loads((path / "key.json").read_text())["dtype"]
  except (OSError, ValueError, KeyError, TypeError):
    dtype = "float32"  # `FeatureStore.open` says what is wrong
  leaves = jax.tree_util.tree_leaves_with_path(vision)
  weights = weights_digest((dotted_path(name), np.asarray(leaf)) for name, leaf in leaves)
  return FeatureStore.open(path, FeatureKey.of(settings.model, dtype, weights))
