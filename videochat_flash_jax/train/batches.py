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
from jax.experimental import multihost_utils

from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.data.check.media_check import check_roots
from videochat_flash_jax.data.features.feature_key import FeatureKey, weights_digest
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import Rows, open_rows
from videochat_flash_jax.data.text.tokenizer import load_tokenizer
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.synthetic.examples import patch_batches, synthetic_batches
from videochat_flash_jax.train.config import data_config
from videochat_flash_jax.train.device_batches import (
  device_batches,
  own_rows,
  own_streams,
  row_groups,
)
from videochat_flash_jax.train.dropout_plans import with_plan
from videochat_flash_jax.train.program import TrainProgram
from videochat_flash_jax.train.settings import TrainSettings

_HELD_OUT = 90_210  # what is added to the seed where held-out examples are drawn, not read


@dataclasses.dataclass(frozen=True)
class RunBatches:
  """Batches of a run, that begin at the first one whenever they are begun."""

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


def check_features(settings: TrainSettings, program: TrainProgram):
  """Refuses stored features of what has no features, or of an encoder that changes.

  Raises:
    InputError: that is so.
  """
  path = settings.data.features
  if not path:
    return
  if settings.data.synthetic or settings.objective == "patches":
    raise InputError(
      f"config.data.features is {path!r}, but nothing of data.mixture is trained on; give no "
      "data.features, or no data.synthetic"
    )
  if "vision" in program.state.trained:
    raise InputError(
      f"config.data.features is {path!r}, but the encoder is trained, and its features change: "
      'freeze all of it (config.optimizer.scales with ("vision", 0.0) first), or give no '
      "data.features"
    )


def open_features(settings: TrainSettings, frozen: Mapping[str, Any]) -> FeatureStore | None:
  """The stored features that a run reads, if any; every process calls this.

  Args:
    settings: of the run.
    frozen: weights; those of the encoder are to be those that made the features.

  Raises:
    InputError: there are none, or they are of another encoder.
  """
  if not settings.data.features:
    return None
  leaves = jax.tree_util.tree_leaves_with_path(frozen["vision"])
  weights = weights_digest((dotted_path(name), _whole(leaf)) for name, leaf in leaves)
  path = Path(settings.data.features)
  try:
    dtype = json.loads((path / "key.json").read_text())["dtype"]
  except (OSError, ValueError, KeyError, TypeError):
    dtype = "float32"  # `FeatureStore.open` says what is wrong
  return FeatureStore.open(path, FeatureKey.of(settings.model, dtype, weights))


def _whole(array: jax.Array) -> np.ndarray:
  """All of an array, whichever processes hold its parts."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def run_batches(
  settings: TrainSettings,
  program: TrainProgram,
  hub: Path,
  features: FeatureStore | None = None,
  num_streams: int = 0,
) -> RunBatches:
  """The batches that a run is trained on.

  Args:
    settings: of the run.
    program: whose batches they are.
    hub: directory of the tokenizer.
    features: of `open_features`.
    num_streams: of a run that goes on; 0 for what the settings say.

  Raises:
    InputError: a file is missing or cannot be used.
  """
  shardings = jax.tree.map(lambda shape: shape.sharding, program.batch)
  if settings.objective == "patches":
    return _patches(settings, shardings)
  sharding, shape = shardings["token_ids"], program.batch["token_ids"].shape
  streams = num_streams or settings.data.streams or len(row_groups(sharding, shape))
  config = data_config(settings, program.layout.sequence_shards, streams)
  own, kept = (choose(sharding, shape, streams) for choose in (own_streams, own_rows))
  make_tokenizer = functools.partial(load_tokenizer, hub)
  rows = None
  if settings.data.synthetic:
    questions = dict(settings.data.synthetic)
    dataset = synthetic_batches(config, settings.model, make_tokenizer, questions, own)
  else:
    mixture = read_mixture(settings.data.mixture)
    rows = open_rows(mixture, max_frames=settings.data.frames[1])
    check_roots(rows)
    dataset = mixture_batches(config, rows, make_tokenizer, own, features)
  dataset = dataset.map(lambda batch: {name: array[kept] for name, array in batch.items()})
  if settings.dropout is not None:
    dataset = dataset.map(lambda batch: with_plan(batch, settings.dropout, program.layout))
  return RunBatches(dataset, shardings, settings.rows, rows)


def held_out_batches(
  settings: TrainSettings, program: TrainProgram, hub: Path, features: FeatureStore | None = None
) -> RunBatches | None:
  """The batches that a run is measured on: of `eval.mixture`, or of the synthetic world.

  Their examples are the same on any number of hosts: each row is a stream of its own, with one
  process that reads it unless `data.workers` is 0. Arguments are those of `run_batches`.

  Returns:
    None where there is nothing to measure on.
  """
  data, seed, mixture = settings.data, settings.seed, settings.eval.mixture
  if mixture:
    data = dataclasses.replace(data, mixture=mixture, synthetic=())
  elif data.synthetic or settings.objective == "patches":
    seed = (seed + _HELD_OUT) % 2**32
  else:
    return None
  data = dataclasses.replace(data, workers=min(data.workers, 1))
  settings = dataclasses.replace(settings, data=data, seed=seed)
  return run_batches(settings, program, hub, features, num_streams=settings.rows)


def _patches(settings, shardings):
  if jax.process_count() > 1:
    raise InputError('config.objective "patches" is for one process; start only one')
  clips = settings.clips_per_shard
  dataset = patch_batches(settings.model, settings.rows, clips, settings.seed)
  return RunBatches(dataset, shardings, settings.rows * clips, None)
