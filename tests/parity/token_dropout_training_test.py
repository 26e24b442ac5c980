"""Dropping tokens in training, golden family 06: what asks, what stays, losses, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.parity.golden_dropout import (
  BATCHED,
  BATCHES,
  TRAINED,
  assert_drop,
  batched_rows,
  batched_runs,
  batched_setting,
  dropout_config,
  embed_rows,
  plan_rows,
  recorded,
  same_drops,
  stored_drop,
  training_row,
  training_setting,
)
from tests.parity.golden_flash import (
  GRADIENT_TOLERANCE,
  LOSS_TOLERANCE,
  MANIFEST,
  clips_of,
  load_flash,
  pad_rows,
)
from tests.parity.golden_models import hub_gradients
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.models.token_dropout import before_answer, segment_positions
from videochat_flash_jax.ops.gather import gather_tokens
from videochat_flash_jax.train.losses import cross_entropy, sequence_loss

TRAINING = [row for row in MANIFEST["train"] if row["stages"]]
RUNS = batched_runs("train")


def unlabelled(row):
  return row._replace(labels=np.full_like(row.labels, IGNORE_LABEL))


def unlabelled_run():
  """The rows of the padded batch, of which those that once keep all tokens have no label."""
  runs = {key.removesuffix(".loss") for key in BATCHED if key.endswith(".loss")}
  (key,) = runs - {run["key"] for run in BATCHES["runs"]}
  stages = BATCHES["one_sample_without_labels"]["kept_is_none"]
  kept_whole = [any(stage) for stage in zip(*stages, strict=True)]
  assert True in kept_whole
  return [
    unlabelled(row) if whole else row
    for row, whole in zip(batched_rows(key, RUNS[0]["order"]), kept_whole, strict=True)
  ]


def unlabelled_sample():
  """The sample of `train` that is stored without labels, too: the first that is as long."""
  length = MANIFEST["train_no_labels"]["final_len"]
  rows = map(training_row, MANIFEST["train"])
  return unlabelled(next(row for row in rows if len(row.token_ids) == length))


def sample_of(row):
  return row.name, row.token_ids.tobytes(), row.labels.tobytes()


def samples(setting):
  """All rows of a setting, whatever kind of dropout they are stored for, but each sample once."""
  rows = []
  if setting == training_setting():
    rows += [training_row(row) for row in MANIFEST["train"]]
    rows.append(unlabelled_sample())
  if setting == batched_setting():
    rows += [*batched_rows(RUNS[0]["key"], RUNS[0]["order"]), *unlabelled_run()]
  return {sample_of(row): row for row in rows}


@quick_jit
def read_and_drop(decoder, sequence, plan):
  decoder = nnx.merge(*decoder)
  with recorded() as records:
    hidden, kept = decoder.read_and_drop(sequence, plan)
  return decoder.logits(hidden), kept, records


@functools.cache
def read(setting, kind):
  """The samples of a setting, and the logits, kept tokens and drops of reading them as a batch."""
  known = samples(setting)
  rows = list(known.values())
  width = max(len(row.token_ids) for row in rows)
  plan = plan_rows(dropout_config(setting, kind), rows, width)
  decoder = nnx.split(load_flash().decoder)
  return list(known), read_and_drop(decoder, embed_rows(rows, width), plan)


def numbers_and_reading(setting, kind, rows):
  """Numbers of `rows` in their batch, and what `read` gives beside."""
  known, reading = read(setting, same_drops(kind, setting))
  return np.array([known.index(sample_of(row)) for row in rows]), *reading


def labels_at(rows, kept):
  """Labels of the tokens that are left."""
  labels = jnp.asarray(pad_rows([row.labels for row in rows], IGNORE_LABEL))
  return gather_tokens(labels, jnp.asarray(kept), fill=IGNORE_LABEL)


def loss_of(rows, logits, kept):
  return cross_entropy(logits[:, :-1], labels_at(rows, kept)[:, 1:])[0]


def by_key(rows):
  return [pytest.param(row, id=row["key"]) for row in rows]


@pytest.mark.parametrize("stored", by_key(MANIFEST["train"]))
def test_the_tokens_behind_which_an_answer_begins_ask(stored):
  row = training_row(stored)
  segment_ids = jnp.ones((1, len(row.labels)), jnp.int32)
  found = before_answer(segment_ids, jnp.asarray(row.labels != IGNORE_LABEL)[None])
  assert np.flatnonzero(found[0]).tolist() == stored["query_rows_stage0"]


@pytest.mark.parametrize("stored", by_key(TRAINING))
def test_samples_lose_the_same_tokens_and_have_the_same_loss(stored):
  row, kind = training_row(stored), stored["key"].split(".")[2]
  numbers, logits, kept, records = numbers_and_reading(training_setting(), kind, [row])
  for stage, record in zip(stored["stages"], records, strict=True):
    assert_drop(record, numbers[0], row, stored_drop(TRAINED, row, stage["stage"]))
    assert (record.after[numbers[0]] < len(row.token_ids)).sum() == stage["len_out"]
  loss = loss_of([row], logits[numbers], kept[numbers])
  assert_close(loss[None], TRAINED[f"{stored['key']}.loss"], absolute=LOSS_TOLERANCE)


@pytest.mark.parametrize("run", by_key(RUNS))
def test_a_padded_batch_loses_the_same_tokens_and_has_the_same_loss(run):
  rows, kind = batched_rows(run["key"], run["order"]), run["key"].split(".")[1]
  numbers, logits, kept, records = numbers_and_reading(batched_setting(), kind, rows)
  for stage, record in zip(run["stages"], records, strict=True):
    for number, row in zip(numbers, rows, strict=True):
      assert_drop(record, number, row, stored_drop(BATCHED, row, stage["stage"]))
    names = ("attention_mask", "labels", "position_ids")
    keys = [f"{run['key']}.stage{stage['stage']}.{name}" for name in names]
    mask, labels, positions = (BATCHED[key] for key in keys)
    left = np.asarray(record.after)[numbers]
    lengths = [[len(row.token_ids)] for row in rows]
    assert not (left[:, mask.shape[1] :] < lengths).any()
    left = left[:, : mask.shape[1]]
    np.testing.assert_array_equal(left < lengths, mask == 1)
    np.testing.assert_array_equal(labels_at(rows, left), labels)
    np.testing.assert_array_equal(
      segment_positions(jnp.asarray(mask))[mask == 1], positions[mask == 1]
    )
  loss = loss_of(rows, logits[numbers], kept[numbers])
  assert_close(loss[None], BATCHED[f"{run['key']}.loss"], absolute=LOSS_TOLERANCE)


def kind_of_unlabelled_run():
  """The kind of its dropout: only where attention ranks do unlabelled rows stay whole."""
  stages = BATCHES["one_sample_without_labels"]["kept_is_none"]
  num_even = next(number for number, whole in enumerate(stages) if any(whole))
  return ("attention", "uniform0_attention", "uniform1_attention")[num_even]


def test_where_nothing_asks_attention_drops_nothing():
  stored, rows = BATCHES["one_sample_without_labels"], unlabelled_run()
  reading = numbers_and_reading(batched_setting(), kind_of_unlabelled_run(), rows)
  numbers, logits, kept, records = reading
  run = rows[0].key.rsplit(".", 1)[0]
  lengths = [[len(row.token_ids)] for row in rows]
  for stage, record in enumerate(records):
    left = np.asarray(record.after)[numbers]
    assert (left < lengths).sum(axis=1).tolist() == stored["valid_after"][stage]
    prefix = f"{run}.stage{stage}."
    scores = [BATCHED[key] for key in sorted(BATCHED) if key.startswith(f"{prefix}scores")]
    ranked = record.scores is not None
    assert bool(scores) == ranked
    for number, row, whole in zip(numbers, rows, stored["kept_is_none"][stage], strict=True):
      sample = row.key.rsplit(".", 1)[1]
      if whole:
        assert f"{prefix}kept.sample{sample}" not in BATCHED
        continue
      expected = {"kept": BATCHED[f"{prefix}kept.sample{sample}"]}
      if ranked:  # stored in turn, without the rows that nothing asks
        expected["scores"] = scores.pop(0)
      assert_drop(record, number, row, expected)
    assert not scores
  loss = loss_of(rows, logits[numbers], kept[numbers])
  assert_close(loss[None], BATCHED[f"{run}.loss"], absolute=LOSS_TOLERANCE)


def test_a_sample_without_labels_stays_whole():
  row = unlabelled_sample()
  (number,), _, kept, _ = numbers_and_reading(training_setting(), "attention", [row])
  assert (kept[number] < len(row.token_ids)).sum() == MANIFEST["train_no_labels"]["final_len"]


@quick_jit
def loss_and_gradients(state, inputs, batch):
  """Loss of rows of one input each, given as clips, and gradients of all weights."""
  graph, weights = state

  def loss_of(weights):
    model = nnx.merge(graph, weights)
    tokens = [model.connector(model.vision(clips)) for clips in inputs]
    tokens = [row.reshape(-1, row.shape[-1]) for row in tokens]
    most = max(map(len, tokens))
    tokens = jnp.stack([jnp.pad(row, ((0, most - len(row)), (0, 0))) for row in tokens])
    return sequence_loss(model, tokens, batch).means()["loss"]

  return jax.value_and_grad(loss_of)(weights)


def with_gradients():
  """Rows whose gradients are stored, after key, setting, kind and tensors."""
  for row in TRAINING:
    key = row["key"]
    if any(name.startswith(f"{key}.grad.") for name in TRAINED):
      rows, kind = [training_row(row)], key.split(".")[2]
      arguments = key, training_setting(), kind, rows, TRAINED
      yield pytest.param(*arguments, id=key, marks=pytest.mark.slow)
  for run in RUNS:
    key = run["key"]
    if any(name.startswith(f"{key}.grad.") for name in BATCHED):
      rows, kind = batched_rows(key, run["order"]), key.split(".")[1]
      yield pytest.param(key, batched_setting(), kind, rows, BATCHED, id=key)


@pytest.mark.parametrize("key, setting, kind, rows, tensors", list(with_gradients()))
def test_gradients_agree(key, setting, kind, rows, tensors):
  width = max(len(row.token_ids) for row in rows)
  plan = plan_rows(dropout_config(setting, kind), rows, width)
  batch = {
    "token_ids": pad_rows([row.token_ids for row in rows], 0),
    "visual_index": pad_rows([row.visual_index for row in rows], -1),
    "labels": pad_rows([row.labels for row in rows], IGNORE_LABEL),
    "segment_ids": plan.segment_ids,
    "dropout": plan,
  }
  batch = jax.tree.map(jnp.asarray, batch)
  clips = [clips_of(row.name) for row in rows]
  loss, gradients = loss_and_gradients(nnx.split(load_flash()), clips, batch)
  assert_close(loss[None], tensors[f"{key}.loss"], absolute=LOSS_TOLERANCE)
  named = hub_gradients(gradients)
  for name in [name for name in tensors if name.startswith(f"{key}.grad.")]:
    actual = named[name.removeprefix(f"{key}.grad.")]
    assert_close(actual, tensors[name], relative=GRADIENT_TOLERANCE)
