"""The whole model without dropping tokens, golden family 06: from pixels to greedy tokens."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from tests.parity.golden_flash import (
  FAMILY,
  HIDDEN_TOLERANCE,
  IMAGES,
  INPUTS,
  LOGIT_TOLERANCE,
  LONGEST,
  MANIFEST,
  NAMES,
  VIDEOS,
  cut,
  embeddings_and_logits,
  encoded,
  load_flash,
  order_of,
  pad_rows,
  prompt_ids,
  row_of,
  visual_tokens_of,
)
from tests.parity.golden_models import decode_greedily

UNCOMPRESSED = FAMILY.tensors("a_uncompressed")
GENERATIONS = [row for row in MANIFEST["generate"] if row["key"].startswith("none.")]


def run(ids, name):
  """Embedded sequence [1, T, D] and logits [1, T, vocab] of a row, computed in padded rows."""
  token_ids, visual_index = row_of(ids, name)
  batch = (
    pad_rows([token_ids], 0, LONGEST),
    pad_rows([visual_tokens_of(name)], 0, max(len(order_of(name)) for name in NAMES)),
    pad_rows([visual_index], -1, LONGEST),
  )
  return tuple(out[:, : len(token_ids)] for out in embeddings_and_logits(load_flash(), *batch))


def stored(prefix):
  """Keys of outputs, the input they belong to, and what else they say."""
  keys = [key for key in UNCOMPRESSED if key.startswith(prefix)]
  params = []
  for key in keys:
    said = key.removeprefix(prefix)
    name = max((name for name in NAMES if f"{said}_".startswith(f"{name}_")), key=len)
    params.append(pytest.param(key, name, said.removeprefix(name).removeprefix("_"), id=key))
  return params


@pytest.mark.parametrize("key, name, rest", stored("tower_"))
def test_encoder_features_agree(key, name, rest):
  first, last, how = re.fullmatch(r"(?:clip|crop)(\d+)(?:to(\d+))?_?(\w*)", rest).groups()
  features = encoded(name)[0][int(first) : int(last or first) + 1]
  assert_close(cut(features, how or "sub1"), UNCOMPRESSED[key], relative=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("key, name, rest", stored("projected_"))
def test_visual_tokens_agree(key, name, rest):
  tokens = cut(encoded(name)[1], rest or "sub1")
  assert_close(tokens, UNCOMPRESSED[key], relative=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("key, name, rest", stored("inputs_embeds_"))
def test_embedded_sequences_agree(key, name, rest):
  sequence, _ = run(INPUTS["prompt_ids"][0], name)
  assert sequence.shape[1] == MANIFEST["lengths"][name]["total_len"]
  assert_close(cut(sequence, rest or "sub1"), UNCOMPRESSED[key], relative=HIDDEN_TOLERANCE)


@pytest.mark.parametrize("key, name, rest", stored("logits_"))
def test_logits_agree(key, name, rest):
  prompt, how = re.fullmatch(r"(prompt\d+)?_?(\w*)", rest).groups()
  _, logits = run(INPUTS[f"{prompt or 'prompt'}_ids"][0], name)
  assert_close(cut(logits, how or "sub1"), UNCOMPRESSED[key], absolute=LOGIT_TOLERANCE)


def test_all_outputs_without_dropping_are_compared():
  prefixes = ("tower_", "projected_", "inputs_embeds_", "logits_")
  assert all(key.startswith(prefixes) for key in UNCOMPRESSED)
  assert all(stored(prefix) for prefix in prefixes)


def test_a_clip_and_a_tile_give_as_many_tokens_as_officially():
  expected = MANIFEST["odd_inputs"]["video_4_frames"]["image_tokens"]
  assert [encoded(name)[1].shape[1] for name in VIDEOS] == [expected] * len(VIDEOS)
  expected = MANIFEST["single_image_tokens"]["one_crop_3d"]
  assert [encoded(name)[1].shape[1] for name in IMAGES] == [expected] * len(IMAGES)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_as_long_as_officially(name):
  lengths = MANIFEST["lengths"][name]
  ids = INPUTS["prompt_ids"][0]
  token_ids, visual_index = row_of(ids, name)
  assert len(ids) == lengths["prompt_len"]
  assert len(token_ids) == lengths["total_len"]
  assert sorted(visual_index[visual_index >= 0]) == list(range(lengths["image_tokens"]))
  assert np.flatnonzero(visual_index >= 0)[0] == lengths["image_token_at"]


@pytest.mark.parametrize("length", [int(length) for length in MANIFEST["truncation"]])
def test_a_row_cut_after_splicing_is_a_prefix_of_the_whole(length):
  assert MANIFEST["truncation"][str(length)] == {"total_len": length, "equals_prefix": True}
  name = next(name for name in VIDEOS if f"inputs_embeds_{name}" in UNCOMPRESSED)
  token_ids, visual_index = row_of(INPUTS["prompt_ids"][0], name)
  batch = token_ids[:length], visual_tokens_of(name), visual_index[:length]
  sequence = load_flash().embed_sequence(*(jnp.asarray(array)[None] for array in batch))
  expected = UNCOMPRESSED[f"inputs_embeds_{name}"][:, :length]
  assert_close(sequence, expected, relative=HIDDEN_TOLERANCE)


@functools.cache
def generations(*keys):
  """Tokens, logits and cache lengths of generations, decoded as one batch."""
  rows = [row for row in GENERATIONS if row["key"] in keys]
  sequences = []
  for row in rows:
    _, name, *prompt = row["key"].split(".")
    sequences.append(run(prompt_ids(row, *prompt), name)[0][0])
  num_tokens = max(len(row["tokens"]) for row in GENERATIONS)
  return decode_greedily(load_flash().decoder, sequences, num_tokens, LONGEST)


def assert_generation(row, tokens, logits, lengths):
  key = row["key"]
  tensors = FAMILY.tensors("b_generate")
  np.testing.assert_array_equal(tokens, row["tokens"])
  np.testing.assert_array_equal(tokens, tensors[f"{key}.tokens"])
  assert_close(logits, tensors[f"{key}.logits"], absolute=LOGIT_TOLERANCE)
  for kind in ("decode_cache_len_before", "decode_position_ids"):  # [step, layer]
    np.testing.assert_array_equal(lengths, tensors[f"{key}.{kind}"])


@pytest.mark.parametrize("row", GENERATIONS, ids=lambda row: row["key"])
def test_greedy_tokens_agree(row):
  tokens, logits, lengths = generations(row["key"])
  assert_generation(row, tokens[0], logits[0], lengths[..., 0])


def test_greedy_tokens_agree_as_padded_rows_of_one_batch():
  assert GENERATIONS
  tokens, logits, lengths = generations(*(row["key"] for row in GENERATIONS))
  for index, row in enumerate(GENERATIONS):
    assert_generation(row, tokens[index], logits[index], lengths[..., index])
