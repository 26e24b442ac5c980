"""The engine, golden family 06: which tokens stay for an answer, and which are written.

All rows of a setting are read, in pieces, and answered as one batch.
"""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from tests.conftest import assert_close
from tests.parity.golden_dropout import (
  BATCHED,
  GENERATED,
  GENERATIONS,
  PREFILLED,
  PREFILLS,
  Row,
  batched_rows,
  batched_runs,
  batched_setting,
  by_key,
  dropout_config,
  prompt_of,
  prompt_row,
  prompts,
  same_drops,
  stored_drop,
)
from tests.parity.golden_flash import (
  HIDDEN_TOLERANCE,
  LOGIT_TOLERANCE,
  MANIFEST,
  make_flash,
  prompt_ids,
  row_of,
  visual_tokens_of,
)
from videochat_flash_jax.inference import engine as engine_module
from videochat_flash_jax.inference import prefix as prefix_module
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.reading import Prompt

UNCOMPRESSED = [row for row in MANIFEST["generate"] if row["key"].startswith("none.")]
NUM_TOKENS = max(len(row["tokens"]) for row in MANIFEST["generate"])
CHUNK, SMALL_CHUNK = 256, 32  # so small that every prompt is read in several pieces


class Drop(NamedTuple):
  """A drop of a row: the visual tokens that it keeps, of those before it; scores if it ranks."""

  kept: np.ndarray
  scores: np.ndarray | None


class Answers(NamedTuple):
  """What the engine makes of a batch.

  Attributes:
    drops: for each row, its drops.
    tokens: [B, tokens].
    logits: that chose the tokens, [B, tokens, vocab].
    lengths: of every layer's caches before a token was read, [tokens, layers, B].
  """

  drops: list[list[Drop]]
  tokens: np.ndarray
  logits: np.ndarray
  lengths: np.ndarray


def answer(rows: list[Row], dropout) -> Answers:
  """Reads rows and answers them greedily, with a model of its own."""
  engine, ranked = Engine(make_flash(dropout), stop_ids=()), []

  def record(scores, is_visual, drop):
    kept = ranked_indices(scores, is_visual, drop)
    ranked.append(drop_of(is_visual, kept, scores))
    return kept

  ranked_indices = engine_module.ranked_indices
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prefix_module, "CHUNK", CHUNK)
    patch.setattr(prefix_module, "_SMALL_CHUNKS", (SMALL_CHUNK, SMALL_CHUNK))
    patch.setattr(engine_module, "DECODE_STEPS", 1)
    patch.setattr(engine_module, "ranked_indices", record)
    prefixes, texts = zip(
      *[
        engine._split_prompt(Prompt(row.token_ids, row.visual_index, visual_tokens_of(row.name)))
        for row in rows
      ],
      strict=True,
    )
    reading = engine.read(texts, NUM_TOKENS, behind=prefixes)
    steps, logits, lengths = [], [np.array(reading.logits)], [lengths_of(reading)]
    for tokens, longer in engine.write(reading, NUM_TOKENS):
      steps.append(tokens)
      logits.append(np.array(longer.logits))
      lengths.append(lengths_of(longer))
  drops = [
    even_drops(prefix) + ranked[number :: len(rows)] for number, prefix in enumerate(prefixes)
  ]
  return Answers(
    drops, np.concatenate(steps, axis=1), np.stack(logits[:-1], axis=1), np.array(lengths[:-1])
  )


def drop_of(is_visual, kept, scores=None) -> Drop:
  """A drop of tokens, from the indices of those that it keeps."""
  is_kept = np.isin(np.arange(len(is_visual)), kept)
  assert is_kept[~is_visual].all(), "text is never dropped"
  return Drop(np.flatnonzero(is_kept[is_visual]), None if scores is None else scores[is_visual])


def even_drops(prefix):
  """The drops of a prefix that keep evenly spaced tokens."""
  drops, is_visual = [], prefix.is_visual
  for part in prefix.parts[1:]:
    drops.append(drop_of(is_visual, part.kept))
    is_visual = is_visual[part.kept]
  return drops


def lengths_of(reading):
  """How many tokens every layer has read, [layers, B]."""
  return [
    (cache.length + np.concatenate([other.length for other in behind]))[:, 0]
    for cache, behind in zip(reading.caches, reading.behind, strict=True)
    for _ in range(cache.depth)
  ]


@functools.cache
def answers_of(setting, kind):
  """The prompts of a setting, and what the engine makes of them as one batch."""
  rows = prompts(setting)
  return list(rows), answer(list(rows.values()), dropout_config(setting, kind))


def find(setting, kind, row):
  """A row's number in its batch, and the answers of the batch."""
  known, answers = answers_of(setting, same_drops(kind, setting))
  return known.index(prompt_of(row)), answers


def assert_drops(tensors, row: Row, drops: list[Drop], stages):
  """Compares the drops of a row with what is stored of them."""
  remaining = np.arange(np.count_nonzero(row.visual_index >= 0))
  for stage, drop in zip(stages, drops, strict=True):
    expected = stored_drop(tensors, row, stage["stage"])
    np.testing.assert_array_equal(drop.kept, expected["kept"])
    remaining = remaining[drop.kept]
    if "kept_abs" in expected:
      np.testing.assert_array_equal(remaining, expected["kept_abs"])
    assert ("scores" in expected) == (drop.scores is not None)
    if "scores" in expected:
      assert_close(drop.scores, expected["scores"], relative=HIDDEN_TOLERANCE)


def assert_generation(stored, number, answers: Answers):
  """Compares tokens, logits and cache lengths of row `number` with a stored generation."""
  key, num_tokens = stored["key"], len(stored["tokens"])
  np.testing.assert_array_equal(answers.tokens[number, :num_tokens], stored["tokens"])
  np.testing.assert_array_equal(answers.tokens[number, :num_tokens], GENERATED[f"{key}.tokens"])
  logits = answers.logits[number, :num_tokens]
  assert_close(logits, GENERATED[f"{key}.logits"], absolute=LOGIT_TOLERANCE)
  for name in ("decode_cache_len_before", "decode_position_ids"):  # [step, layer]
    lengths = answers.lengths[: num_tokens - 1, :, number]
    np.testing.assert_array_equal(lengths, GENERATED[f"{key}.{name}"])


@pytest.mark.parametrize("stored", by_key(PREFILLS))
def test_prompts_lose_the_same_tokens_and_give_the_same_logits(stored):
  key, row = stored["key"], prompt_row(stored)
  number, answers = find(*key.split(".")[:2], row)
  assert_drops(PREFILLED, row, answers.drops[number], stored["stages"])
  in_stages = [stored["stages"][0]["len_in"], *(stage["len_out"] for stage in stored["stages"])]
  first_layers = [0, *(stage["rank_layer"] for stage in stored["stages"])]
  assert answers.lengths[0, first_layers, number].tolist() == in_stages
  logits = answers.logits[number : number + 1, 0]
  assert_close(logits, PREFILLED[f"{key}.last_logits"], absolute=LOGIT_TOLERANCE)


@pytest.mark.parametrize("run", by_key(batched_runs("eval")))
def test_prompts_of_image_and_video_in_one_batch_agree(run):
  kind = run["key"].split(".")[1]
  for number_in_run, row in enumerate(batched_rows(run["key"], run["order"])):
    number, answers = find(batched_setting(), kind, row)
    assert_drops(BATCHED, row, answers.drops[number], run["stages"])
    lengths = answers.lengths[0, list(dropout_config(batched_setting(), kind).layers), number]
    assert lengths.tolist() == [stage["valid_out"][number_in_run] for stage in run["stages"]]
    expected = BATCHED[f"{run['key']}.last_logits"][number_in_run]
    assert_close(answers.logits[number, 0], expected, absolute=LOGIT_TOLERANCE)


@pytest.mark.parametrize("stored", by_key(GENERATIONS))
def test_greedy_tokens_positions_and_cache_lengths_agree(stored):
  setting, kind = stored["key"].split(".")[:2]
  assert_generation(stored, *find(setting, kind, prompt_row(stored)))


def test_greedy_tokens_without_dropping_agree():
  assert UNCOMPRESSED
  rows = []
  for stored in UNCOMPRESSED:
    _, name, *prompt = stored["key"].split(".")
    rows.append(Row(stored["key"], name, *row_of(prompt_ids(stored, *prompt), name)))
  answers = answer(rows, None)
  for number, stored in enumerate(UNCOMPRESSED):
    assert_generation(stored, number, answers)
