"""The batches of a run: packed conversations, from one of two sources.

data.mixture      annotated videos, images and text, perhaps with stored features
data.synthetic    conversations about the synthetic world
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN, STORED_FEATURES
from videochat_flash_jax.data.batches.train_batches import mixture_batches
from videochat_flash_jax.data.check.media_check import check_roots
from videochat_flash_jax.data.features.feature_key import FeatureKey, weights_digest
from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import Rows, open_rows
from videochat_flash_jax.data.text.tokenizer import check_embedded, load_tokenizer
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.synthetic.examples import synthetic_batches
from videochat_flash_jax.train.config import data_config
from videochat_flash_jax.train.device_batches import (
  StreamExchanges,
  device_batches,
  own_rows,
  own_streams,
  row_groups,
  stream_readers,
)
from videochat_flash_jax.train.dropout_plans import with_plan
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainProgram


@dataclasses.dataclass(frozen=True)
class RunBatches:
  """The batches of a run. Each call of `begin` starts at the first one.

  Attributes:
    dataset: this process's part of each batch, as numpy arrays.
    shardings: of each field of the whole batch.
    num_rows: first axis of the whole batch.
    exchanges: with processes that read the same streams; None if no other process reads any.
    rows: the annotation rows that examples are read from; None where examples are drawn.
  """

  dataset: grain.IterDataset
  shardings: Mapping[str, Any]
  num_rows: int
  exchanges: StreamExchanges | None = None
  rows: Rows | None = None

  def begin(self) -> grain.DatasetIterator:
    """Returns an iterator over batches on the devices; close it after use."""
    return device_batches(self.dataset, self.shardings, self.num_rows, self.exchanges)

  def names(self, state: Mapping[str, Any]) -> list[list[str]]:
    """Names the examples in each row of this process's last batch, by source and row.

    Args:
      state: of the iterator, after that batch.
    """
    last = [row for stream in state.get("streams", {}).values() for row in stream["last"]]
    return [[self._name(number) for number in numbers] for numbers in last]

  def _name(self, number):
    if self.rows is None:
      return f"example {number} of the synthetic world"
    return f"{self.rows.source(number)}, {self.rows.label(number)}"


def batch_shapes(settings: TrainSettings, layout: Layout) -> dict[str, Any]:
  """Shapes and shardings of what `data.batches.sharded_rows` gives, for all processes together."""
  vision, row = settings.model.vision, (settings.rows, settings.tokens_per_row)
  picture = (vision.image_size, vision.image_size, 3)

  def shape(sizes, dtype, *axes):
    """An array whose leading axes are split over the mesh as `Layout.spec` says."""
    sharding = NamedSharding(layout.mesh, layout.spec(*axes))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

  batch = {name: shape(row, jnp.int32, "batch", "sequence") for name in PER_TOKEN}
  kinds = {"frames": (settings.clips_per_shard, vision.clip_frames, settings.model.clip_tokens)}
  if settings.tiles_per_shard:
    kinds["tiles"] = (settings.tiles_per_shard, 1, settings.model.tile_tokens)
  for kind, (number, frames, tokens) in kinds.items():
    number *= layout.sequence_shards
    if settings.data.features:
      sizes = (settings.rows, number, tokens, vision.width)
      batch[STORED_FEATURES[kind]] = shape(sizes, jnp.bfloat16, "batch", "clips")
    else:
      sizes = (settings.rows, number, frames, *picture)
      batch[kind] = shape(sizes, jnp.uint8, "batch", "clips")
  if settings.dropout is not None:
    ids = np.zeros(row, np.int32)
    plan = plan_dropout(settings.dropout, ids > 0, ids, ids > 0, lambda _: row[1])
    batch["dropout"] = jax.tree.map(lambda x: shape(x.shape, x.dtype, "batch"), plan)
  return batch


def check_features(settings: TrainSettings, program: TrainProgram):
  """Refuses stored features that a run cannot use.

  Args:
    settings: of the run.
    program: of the run.

  Raises:
    InputError: there is no mixture that they belong to, or the encoder is trained.
  """
  path = settings.data.features
  if not path:
    return
  if settings.data.synthetic:
    raise InputError(
      f"config.data.features is {path!r:.80}, but all examples come from data.synthetic; give "
      "no data.features, or no data.synthetic"
    )
  if "vision" in program.state.trained:
    raise InputError(
      f"config.data.features is {path!r:.80}, but the encoder is trained, so its features change: "
      'freeze all of it (config.optimizer.scales with ("vision", 0.0) first), or give no '
      "data.features"
    )


def open_features(settings: TrainSettings, frozen: Mapping[str, Any]) -> FeatureStore | None:
  """Opens the stored features that a run reads, if it reads any; every process calls this.

  Args:
    settings: of the run.
    frozen: the frozen weights; the features must come from an encoder with the same weights.

  Raises:
    InputError: there are no features, or another encoder made them.
  """
  if not settings.data.features:
    return None
  leaves = jax.tree_util.tree_leaves_with_path(frozen["vision"])
  weights = weights_digest((dotted_path(name), _on_host(leaf)) for name, leaf in leaves)
  path = Path(settings.data.features)
  try:
    dtype = json.loads((path / "key.json").read_text())["dtype"]
  except (OSError, ValueError, KeyError, TypeError):
    dtype = "float32"  # `FeatureStore.open` says what is wrong
  return FeatureStore.open(path, FeatureKey.of(settings.model, dtype, weights))


def _on_host(array: jax.Array) -> np.ndarray:
  """The whole of an array, also where its parts are on devices of other processes."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def run_batches(
  settings: TrainSettings,
  program: TrainProgram,
  hub: Path,
  features: FeatureStore | None = None,
  num_streams: int = 0,
  unit: str = "step",
) -> RunBatches:
  """The batches that a run is trained on.

  Args:
    settings: of the run.
    program: the program that takes the batches.
    hub: directory of the tokenizer.
    features: of `open_features`.
    num_streams: the streams of a run that resumes; 0: as many as the settings say.
    unit: what a batch is for, in errors.

  Raises:
    InputError: a file is missing or cannot be used.
  """
  shardings = jax.tree.map(lambda shape: shape.sharding, program.batch)
  sharding, shape = shardings["token_ids"], program.batch["token_ids"].shape
  streams = num_streams or settings.data.streams or len(row_groups(sharding, shape))
  config = data_config(settings, program.layout.sequence_shards, streams)
  read_streams, kept_rows = (choose(sharding, shape, streams) for choose in (own_streams, own_rows))
  exchanges = StreamExchanges(stream_readers(sharding, shape, streams), unit)
  make_tokenizer = functools.partial(_tokenizer_of_model, hub, settings.model.decoder.vocab_size)
  rows = None
  if settings.data.synthetic:
    questions = dict(settings.data.synthetic)
    dataset = synthetic_batches(
      config, settings.model, make_tokenizer, questions, read_streams, exchanges
    )
  else:
    mixture = read_mixture(settings.data.mixture)
    rows = open_rows(mixture, max_frames=settings.data.frames[1])
    check_roots(rows)
    dataset = mixture_batches(config, rows, make_tokenizer, read_streams, features, exchanges)
  dataset = dataset.map(lambda batch: {name: array[kept_rows] for name, array in batch.items()})
  if settings.dropout is not None:
    dataset = dataset.map(lambda batch: with_plan(batch, settings.dropout, program.layout))
  return RunBatches(dataset, shardings, settings.rows, exchanges, rows)


def _tokenizer_of_model(hub, num_embedded):
  tokenizer = load_tokenizer(hub)
  check_embedded(tokenizer, num_embedded, hub)
  return tokenizer


def held_out_batches(
  settings: TrainSettings, program: TrainProgram, hub: Path, features: FeatureStore | None = None
) -> RunBatches | None:
  """The batches of a run's evaluations: from `eval.mixture`, or from the synthetic world.

  Their examples do not depend on the number of hosts, since each row is a stream of its own. One
  process reads each stream, or none if `data.workers` is 0. Arguments are those of `run_batches`.

  Returns:
    None where there are no held-out examples.
  """
  data, seed, mixture = settings.data, settings.seed, settings.eval.mixture
  if mixture:
    data = dataclasses.replace(data, mixture=mixture, synthetic=())
  elif data.synthetic:
    seed = held_out_seed(seed)
  else:
    return None
  data = dataclasses.replace(data, workers=min(data.workers, 1))
  settings = dataclasses.replace(settings, data=data, seed=seed)
  unit = "evaluation batch"
  return run_batches(settings, program, hub, features, num_streams=settings.rows, unit=unit)


def held_out_seed(seed: int) -> int:
  """The seed of held-out examples where examples are drawn: other ones than those trained on."""
  return (seed + 90_210) % 2**32
