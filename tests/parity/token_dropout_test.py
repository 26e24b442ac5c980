"""Dropping tokens in prompts, golden family 06: what stays, and what comes out.

What the engine keeps and writes is in engine_test.py.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.parity.golden_dropout import (
  BATCHED,
  PREFILLED,
  PREFILLS,
  assert_drop,
  batched_rows,
  batched_runs,
  batched_setting,
  by_key,
  dropout_config,
  embed_rows,
  plan_rows,
  prompt_of,
  prompt_row,
  prompts,
  recorded,
  same_drops,
  stored_drop,
)
from tests.parity.golden_flash import (
  FAMILY,
  HIDDEN_TOLERANCE,
  LOGIT_TOLERANCE,
  load_flash,
)
from videochat_flash_jax.models.token_dropout import evenly_spaced

ROUNDING = FAMILY.json("uniform_and_rounding.json")


@quick_jit
def read_and_drop(decoder, sequence, plan):
  """Hidden states of the tokens that stay, how many these are, the logits of the next, records."""
  decoder = nnx.merge(*decoder)
  with recorded() as records:
    hidden, kept = decoder.read_and_drop(sequence, plan)
  length = (kept < sequence.shape[1]).sum(axis=1)
  return hidden, length, decoder.logits(hidden[jnp.arange(len(length)), length - 1]), records


@functools.cache
def batch(setting, kind):
  """The prompts of a setting, and what reading them as one batch gives."""
  rows = prompts(setting)
  width = max(len(row.token_ids) for row in rows.values())
  plan = plan_rows(dropout_config(setting, kind), list(rows.values()), width)
  decoder, sequence = nnx.split(load_flash().decoder), embed_rows(list(rows.values()), width)
  return list(rows), read_and_drop(decoder, sequence, plan)


def read(setting, kind, row):
  """A row's number in its batch; and what `read_and_drop` gives for all rows."""
  known, results = batch(setting, same_drops(kind, setting))
  return known.index(prompt_of(row)), *results


def num_kept(record, number, row):
  """How many tokens of a row stay after a drop."""
  return np.count_nonzero(np.asarray(record.after[number]) < len(row.token_ids))


@pytest.mark.parametrize("stored", by_key(PREFILLS))
def test_prompts_lose_the_same_tokens_and_give_the_same_logits(stored):
  key, row = stored["key"], prompt_row(stored)
  number, hidden, length, logits, records = read(*key.split(".")[:2], row)
  assert len(row.token_ids) == stored["stages"][0]["len_in"]
  for stage, record in zip(stored["stages"], records, strict=True):
    expected = stored_drop(PREFILLED, row, stage["stage"])
    assert_drop(record, number, row, expected)
    assert num_kept(record, number, row) == stage["len_out"]
    assert ("scores" in expected) == (record.scores is not None)
  assert length[number] == stored["final_len"]
  if f"{key}.final_hidden" in PREFILLED:
    hidden = hidden[number : number + 1, : stored["final_len"]]
    assert_close(hidden, PREFILLED[f"{key}.final_hidden"], relative=HIDDEN_TOLERANCE)
  assert_close(
    logits[number : number + 1], PREFILLED[f"{key}.last_logits"], absolute=LOGIT_TOLERANCE
  )


def test_every_stored_prefill_is_compared():
  in_stages = [key for key in PREFILLED if ".stage" in key]
  assert {key.split(".stage")[0] for key in in_stages} == {row["key"] for row in PREFILLS}
  assert {key.rsplit(".", 1)[1] for key in in_stages} == {
    "kept",
    "kept_abs",
    "scores",
    "hidden_out",
  }


@pytest.mark.parametrize("run", by_key(batched_runs("eval")))
def test_padded_prompts_of_image_and_video_agree(run):
  for number_in_run, row in enumerate(batched_rows(run["key"], run["order"])):
    kind = run["key"].split(".")[1]
    number, _, _, logits, records = read(batched_setting(), kind, row)
    for stage, record in zip(run["stages"], records, strict=True):
      assert_drop(record, number, row, stored_drop(BATCHED, row, stage["stage"]))
      assert num_kept(record, number, row) == stage["valid_out"][number_in_run]
    expected = BATCHED[f"{run['key']}.last_logits"][number_in_run]
    assert_close(logits[number], expected, absolute=LOGIT_TOLERANCE)


@pytest.mark.parametrize("num_tokens, ratio, num_kept, indices", ROUNDING["rows"])
def test_counts_are_cut_off_and_even_spacing_is_that_of_the_original(
  num_tokens, ratio, num_kept, indices
):
  assert int(num_tokens * ratio) == num_kept
  if indices is not None:  # not stored for the largest numbers
    assert evenly_spaced(num_tokens, num_kept).tolist() == indices


def test_even_spacing_agrees_for_the_sizes_listed_one_by_one():
  for num_tokens, num_kept, indices in ROUNDING["explicit"]:
    assert evenly_spaced(num_tokens, num_kept).tolist() == indices
