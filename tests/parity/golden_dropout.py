"""Golden family 06 with dropout: its rows, in batches of one kind, and what each drop does to them.

All rows of a setting are read as one padded batch, prompts of all lengths together.
"""

import contextlib
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from tests.parity.golden_flash import (
  FAMILY,
  HIDDEN_TOLERANCE,
  IMAGES,
  MANIFEST,
  VIDEOS,
  inputs_named,
  labels_in_sequence,
  load_flash,
  order_of,
  pad_rows,
  prompt_ids,
  row_of,
  unpadded,
  visual_tokens_of,
)
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models import qwen2, token_dropout
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.models.token_dropout import DropoutPlan, RankedDrop, plan_dropout

PREFILLED, GENERATED = FAMILY.tensors("b_prefill"), FAMILY.tensors("b_generate")
PREFILLS = MANIFEST["prefill"]
GENERATIONS = [row for row in MANIFEST["generate"] if not row["key"].startswith("none.")]
BATCHES = FAMILY.json("manifest_compressed_batch.json")
BATCHED = FAMILY.tensors("e_compressed_batch")
TRAINED = FAMILY.tensors("c_train")


class Row(NamedTuple):
  """One row: what the files call it, its input, its tokens, and its labels in training."""

  key: str
  name: str
  token_ids: np.ndarray
  visual_index: np.ndarray
  labels: np.ndarray | None = None


class Record(NamedTuple):
  """One drop of a batch: tokens before and after it, scores if attention ranked, hidden states."""

  before: jax.Array  # [B, T], indices in the row
  scores: jax.Array | None  # [B, T]
  after: jax.Array  # [B, S]
  hidden: jax.Array  # [B, S, D]


def dropout_config(setting: str, kind: str) -> DropoutConfig:
  sizes = MANIFEST["settings"][setting]
  layers, ratios = sizes["llm_compress_layer_list"], sizes["llm_image_token_ratio_list"]
  return DropoutConfig(kind, tuple(layers), tuple(ratios))


def same_drops(kind: str, setting: str) -> str:
  """A kind that drops alike in this setting: `uniform1_attention` with two drops is `uniform`."""
  num_even = {"attention": 0, "uniform0_attention": 1, "uniform1_attention": 2}
  num_drops = len(dropout_config(setting, kind).layers)
  return kind if num_even.get(kind, num_drops) < num_drops else "uniform"


def setting_of(runs: list[dict]) -> str:
  """The setting of stored training runs: that of the layers at which they drop."""
  (layers,) = {tuple(stage["rank_layer"] for stage in run["stages"]) for run in runs}
  settings = MANIFEST["settings"].items()
  fitting = [name for name, sizes in settings if tuple(sizes["llm_compress_layer_list"]) == layers]
  assert fitting, f"no setting drops at the layers {layers}"
  return fitting[0]


def training_setting() -> str:
  """The setting of `train`."""
  return setting_of([row for row in MANIFEST["train"] if row["stages"]])


def batched_setting() -> str:
  """The setting of the padded batches."""
  return setting_of(batched_runs("train"))


def batched_runs(mode: str) -> list[dict]:
  """Runs of the padded batches with dropout, in training ("train") or not ("eval")."""
  runs = [run for run in BATCHES["runs"] if run["key"].startswith(f"{mode}.")]
  return [run for run in runs if run["stages"]]


def batched_rows(key: str, order: list[str]) -> list[Row]:
  """Rows of a padded batch; their keys end with their numbers."""
  mode = key.split(".")[0]
  names, counts = inputs_named(order), BATCHED[f"{mode}.attention_mask"]
  ids = unpadded(BATCHED[f"{mode}.input_ids"], counts)
  rows = [Row(f"{key}.{n}", name, *row_of(ids[n], name)) for n, name in enumerate(names)]
  if mode == "eval":
    return rows
  labels = unpadded(BATCHED["train.labels"], counts)
  return [
    row._replace(labels=labels_in_sequence(*texts, row.visual_index))
    for row, *texts in zip(rows, ids, labels, strict=True)
  ]


def prompt_row(row: dict) -> Row:
  """A row of `prefill` or `generate`; a key's fourth part names another prompt than the first."""
  _, _, name, *prompt = row["key"].split(".")
  return Row(row["key"], name, *row_of(prompt_ids(row, *prompt), name))


def prompts(setting: str) -> dict:
  """All rows of a setting by `prompt_of`, whatever kind of dropout they are stored for."""
  stored = [row for row in PREFILLS + GENERATIONS if row["key"].startswith(f"{setting}.")]
  rows = [prompt_row(row) for row in stored]
  if setting == batched_setting():
    rows += [row for run in batched_runs("eval") for row in batched_rows(run["key"], run["order"])]
  return {prompt_of(row): row for row in rows}


def prompt_of(row: Row):
  """What a prompt shows and says: equal for equal prompts."""
  return row.name, row.token_ids.tobytes()


def by_key(rows: list[dict]) -> list:
  """Stored rows as parameters of tests."""
  return [pytest.param(row, id=row["key"]) for row in rows]


def training_row(row: dict) -> Row:
  """A row of `train`; its input is the one that fills it up."""
  sample, style, *_ = row["key"].split(".")
  ids, labels = TRAINED[f"{sample}.input_ids"][0], TRAINED[f"{sample}.labels.{style}"][0]
  length = row["stages"][0]["len_in"] if row["stages"] else row["final_len"]
  inputs = [*VIDEOS, *IMAGES]
  name = next(name for name in inputs if len(order_of(name)) == length - (len(ids) - 1))
  token_ids, visual_index = row_of(ids, name)
  labels = labels_in_sequence(ids, labels, visual_index)
  return Row(row["key"], name, token_ids, visual_index, labels)


def plan_rows(config: DropoutConfig, rows: list[Row], length: int) -> DropoutPlan:
  """The plan of rows that are padded to `length`."""
  is_visual = pad_rows([row.visual_index >= 0 for row in rows], False, length)
  segment_ids = pad_rows([np.ones(len(row.token_ids), np.int32) for row in rows], 0, length)
  learnt = None
  if rows[0].labels is not None:
    learnt = pad_rows([row.labels != IGNORE_LABEL for row in rows], False, length)
  return plan_dropout(config, is_visual, segment_ids, learnt)


def embed_rows(rows: list[Row], length: int) -> jax.Array:
  """Embedded sequences, padded to `length`."""
  return load_flash().embed_sequence(
    jnp.asarray(pad_rows([row.token_ids for row in rows], 0, length)),
    jnp.asarray(pad_rows([visual_tokens_of(row.name) for row in rows], 0)),
    jnp.asarray(pad_rows([row.visual_index for row in rows], -1, length)),
  )


@contextlib.contextmanager
def recorded():
  """Collects a `Record` of every drop that is traced inside; to be returned from what is jitted."""
  records, scores = [], []

  def drop(plan, drop, x, before, *rest):
    hidden, after = token_dropout.drop_tokens(plan, drop, x, before, *rest)
    ranked = isinstance(drop, RankedDrop)
    records.append(Record(before, scores.pop() if ranked else None, after, hidden))
    return hidden, after

  def score(*arguments):
    scores.append(visual_scores(*arguments))
    return scores[-1]

  visual_scores = token_dropout.visual_scores
  with (
    mock.patch.object(qwen2, "drop_tokens", drop),
    mock.patch.object(token_dropout, "visual_scores", score),
  ):
    yield records


def stored_drop(tensors: dict[str, np.ndarray], row: Row, stage: int) -> dict[str, np.ndarray]:
  """What is stored of a drop: `kept`, and some of `kept_abs`, `scores` and `hidden_out`."""
  if tensors is not BATCHED:
    prefix = f"{row.key}.stage{stage}."
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
  run, number = row.key.rsplit(".", 1)
  keys = {"kept": f"kept.sample{number}", "scores": f"scores.call{number}"}
  keys = {name: f"{run}.stage{stage}.{key}" for name, key in keys.items()}
  return {name: tensors[key] for name, key in keys.items() if key in tensors}


def assert_drop(record: Record, number: int, row: Row, expected: dict[str, np.ndarray]):
  """Compares what a drop does to row `number` of its batch."""
  places = np.flatnonzero(row.visual_index >= 0)
  before, after = (
    np.searchsorted(places, np.intersect1d(kept[number], places))
    for kept in (record.before, record.after)
  )
  np.testing.assert_array_equal(np.searchsorted(before, after), expected["kept"])
  if "kept_abs" in expected:
    np.testing.assert_array_equal(after, expected["kept_abs"])
  if "scores" in expected:
    scores = record.scores[number][np.isin(record.before[number], places)]
    assert_close(scores, expected["scores"], relative=HIDDEN_TOLERANCE)
  if "hidden_out" in expected:
    hidden = record.hidden[number][record.after[number] < len(row.token_ids)]
    assert_close(hidden[None], expected["hidden_out"], relative=HIDDEN_TOLERANCE)
