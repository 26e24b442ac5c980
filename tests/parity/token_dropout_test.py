"""Dropping tokens in prompts, golden family 06: what stays, what comes out, what is written."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close, quick_jit
from tests.parity.golden_dropout import (
  BATCHED,
  assert_drop,
  batched_rows,
  batched_runs,
  batched_setting,
  dropout_config,
  embed_rows,
  plan_rows,
  prompt_row,
  recorded,
  same_drops,
  stored_drop,
)
from tests.parity.golden_flash import (
  FAMILY,
  HIDDEN_TOLERANCE,
  LOGIT_TOLERANCE,
  MANIFEST,
  load_flash,
)
from videochat_flash_jax.models.token_dropout import evenly_spaced

PREFILLED, GENERATED = FAMILY.tensors("b_prefill"), FAMILY.tensors("b_generate")
PREFILLS = MANIFEST["prefill"]
GENERATIONS = [row for row in MANIFEST["generate"] if not row["key"].startswith("none.")]
ROUNDING = FAMILY.json("uniform_and_rounding.json")
NUM_TOKENS = max(len(row["tokens"]) for row in GENERATIONS)


def prompts(setting):
  """All rows of a setting, whatever kind of dropout they are stored for, but each prompt once."""
  stored = [row for row in PREFILLS + GENERATIONS if row["key"].startswith(f"{setting}.")]
  rows = [prompt_row(row) for row in stored]
  if setting == batched_setting():
    rows += [row for run in batched_runs("eval") for row in batched_rows(run["key"], run["order"])]
  return {prompt_of(row): row for row in rows}


def prompt_of(row):
  return row.name, row.token_ids.tobytes()


@quick_jit
def prefill(decoder, sequence, lengths, plan):
  decoder = nnx.merge(*decoder)
  num_slots = sequence.shape[1] + NUM_TOKENS
  with recorded() as records:
    hidden, caches = decoder.prefill(sequence, lengths, num_slots, plan)
  last = hidden[jnp.arange(len(lengths)), caches[-1].length - 1]
  return hidden, decoder.logits(last), caches, records


@quick_jit
def extend(decoder, tokens, caches):
  decoder = nnx.merge(*decoder)
  sequence = decoder.embed(tokens[:, None])
  hidden, caches = decoder.extend(sequence, caches, jnp.ones_like(tokens))
  return decoder.logits(hidden[:, 0]), caches


@functools.cache
def prefilled(setting, kind):
  """The prompts of a setting, and what reading them as one batch gives."""
  rows = prompts(setting)
  lengths = jnp.array([len(row.token_ids) for row in rows.values()])
  width = int(lengths.max())
  plan = plan_rows(dropout_config(setting, kind), list(rows.values()), width)
  decoder, sequence = nnx.split(load_flash().decoder), embed_rows(list(rows.values()), width)
  return list(rows), prefill(decoder, sequence, lengths, plan)


def read(setting, kind, row):
  """A row's number in its batch, and hidden states, logits, cache lengths and records of all."""
  known, (hidden, logits, caches, records) = prefilled(setting, same_drops(kind, setting))
  return known.index(prompt_of(row)), hidden, logits, [cache.length for cache in caches], records


def by_key(rows):
  return [pytest.param(row, id=row["key"]) for row in rows]


@pytest.mark.parametrize("stored", by_key(PREFILLS))
def test_prompts_lose_the_same_tokens_and_give_the_same_logits(stored):
  key, row = stored["key"], prompt_row(stored)
  number, hidden, logits, lengths, records = read(*key.split(".")[:2], row)
  assert lengths[0][number] == stored["stages"][0]["len_in"]
  for stage, length, record in zip(stored["stages"], lengths[1:], records, strict=True):
    expected = stored_drop(PREFILLED, row, stage["stage"])
    assert_drop(record, number, row, expected)
    assert length[number] == stage["len_out"]
    assert ("scores" in expected) == (record.scores is not None)
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
    number, _, logits, lengths, records = read(batched_setting(), kind, row)
    for stage, length, record in zip(run["stages"], lengths[1:], records, strict=True):
      assert_drop(record, number, row, stored_drop(BATCHED, row, stage["stage"]))
      assert length[number] == stage["valid_out"][number_in_run]
    expected = BATCHED[f"{run['key']}.last_logits"][number_in_run]
    assert_close(logits[number], expected, absolute=LOGIT_TOLERANCE)


@functools.cache
def generated(setting, kind):
  """Greedy tokens [B, tokens], logits, and lengths [step, layer, B] of every layer's cache."""
  known, (_, logits, caches, _) = prefilled(setting, kind)
  all_logits, lengths = [logits], []
  for _ in range(NUM_TOKENS - 1):
    lengths.append([cache.length for cache in caches for _ in range(cache.depth)])
    tokens = all_logits[-1].argmax(-1)
    logits, caches = extend(nnx.split(load_flash().decoder), tokens, caches)
    all_logits.append(logits)
  all_logits = np.stack(all_logits, axis=1)
  return known, all_logits.argmax(-1), all_logits, np.array(lengths)


@pytest.mark.parametrize("stored", by_key(GENERATIONS))
def test_greedy_tokens_positions_and_cache_lengths_agree(stored):
  key = stored["key"]
  setting, kind = key.split(".")[:2]
  known, tokens, logits, lengths = generated(setting, same_drops(kind, setting))
  number, num_tokens = known.index(prompt_of(prompt_row(stored))), len(stored["tokens"])
  np.testing.assert_array_equal(tokens[number, :num_tokens], stored["tokens"])
  logits = logits[number, :num_tokens]
  assert_close(logits, GENERATED[f"{key}.logits"], absolute=LOGIT_TOLERANCE)
  for name in ("decode_cache_len_before", "decode_position_ids"):  # [step, layer]
    np.testing.assert_array_equal(lengths[: num_tokens - 1, :, number], GENERATED[f"{key}.{name}"])


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
