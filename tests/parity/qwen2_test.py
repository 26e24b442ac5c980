"""The Qwen2 decoder, golden family 05: logits, hidden states, losses, rotary rows, generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import Golden, assert_close
from tests.parity.golden_models import (
  RecordedLayers,
  decode_greedily,
  decoder_config,
  load_golden,
)
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.ops.rope import rope_table
from videochat_flash_jax.train.losses import cross_entropy

RUNS = {run["name"]: run for run in Golden("05_qwen2").json()["runs"]}
ROPE_POSITIONS = [0, 1, 2, 17, 200, 511]  # of the stored rotary rows, see golden/README.md
HIDDEN_TOLERANCE = 2e-5  # relative
LOGIT_TOLERANCE = 1e-4  # absolute
LOSS_TOLERANCE = 1e-5  # absolute

pytestmark = pytest.mark.parametrize("name", RUNS)


@functools.cache
def load_run(name):
  """The model of a run, and its stored inputs and outputs."""
  config = decoder_config(RUNS[name]["config"])
  tensors = Golden("05_qwen2").tensors(f"{name}.weights")
  model = load_golden(lambda: Qwen2(config, rngs=nnx.Rngs(0)), tensors, "decoder")
  return model, Golden("05_qwen2").tensors(f"{name}.io")


@nnx.jit
def logits_of(model, token_ids, positions=None):
  return model.logits(model(model.embed(token_ids), positions=positions))


def test_logits_and_loss_agree(name):
  model, io = load_run(name)
  logits = logits_of(model, io["input_ids"], np.arange(io["input_ids"].shape[1])[None])
  assert_close(logits, io["logits"], absolute=LOGIT_TOLERANCE)
  loss, _ = cross_entropy(logits[:, :-1], io["labels"][:, 1:])
  assert_close(loss[None], io["loss"], absolute=LOSS_TOLERANCE)


def test_hidden_states_of_every_layer_agree(name):
  model, io = load_run(name)
  recorded = nnx.merge(*nnx.split(model))  # the model itself is kept for other tests
  recorded.layers = RecordedLayers(recorded.layers)

  @jax.jit
  def hidden_states(token_ids):
    last = recorded(recorded.embed(token_ids))
    return jnp.concatenate([recorded.layers.states[:-1, 0], last])

  states = hidden_states(io["input_ids"])
  assert len(states) == len(io["hidden_states"]) == model.config.depth + 1
  for state, expected in zip(states, io["hidden_states"], strict=True):
    assert_close(state, expected, relative=HIDDEN_TOLERANCE)


def test_padded_rows_agree_where_they_are_not_padding(name):
  model, io = load_run(name)
  counts = io["padded_attention_mask"] == 1
  assert counts.sum(axis=1).tolist() == RUNS[name]["lens"]
  logits = np.asarray(logits_of(model, io["padded_input_ids"]))
  assert_close(logits[counts], io["padded_logits"][counts], absolute=LOGIT_TOLERANCE)
  loss, _ = cross_entropy(logits[:, :-1], io["padded_labels"][:, 1:])
  assert_close(loss[None], io["padded_loss"], absolute=LOSS_TOLERANCE)


def test_given_positions_are_used(name):
  model, io = load_run(name)
  expected = io["halved_position_logits"]
  positions = np.arange(io["input_ids"].shape[1])[None] // 2
  logits = logits_of(model, io["input_ids"], positions)
  assert_close(logits[:, -expected.shape[1] :], expected, absolute=LOGIT_TOLERANCE)


def test_rotary_rows_agree(name):
  model, io = load_run(name)
  config = model.config
  cosines, sines = rope_table(jnp.asarray([ROPE_POSITIONS]), config.head_size, config.rope_theta)
  assert_close(cosines[0], io["rope_cos_rows"], relative=HIDDEN_TOLERANCE)
  assert_close(sines[0], io["rope_sin_rows"], relative=HIDDEN_TOLERANCE)
  frequencies = np.arctan2(sines[0, 1], cosines[0, 1])  # angles at position 1
  assert ROPE_POSITIONS[1] == 1
  assert_close(frequencies[: config.head_size // 2], io["rope_inv_freq"], relative=HIDDEN_TOLERANCE)


def test_greedy_tokens_agree_as_padded_rows_of_one_batch(name):
  model, io = load_run(name)
  keys = [key.removesuffix("_prompt") for key in io if key.endswith("_prompt")]
  assert keys
  prompts = [model.embed(jnp.asarray(io[f"{key}_prompt"]))[0] for key in keys]
  num_tokens = io[f"{keys[0]}_tokens"].shape[1]
  tokens, logits, _ = decode_greedily(model, prompts, num_tokens, max(map(len, prompts)))
  for row, key in enumerate(keys):
    np.testing.assert_array_equal(tokens[row], io[f"{key}_tokens"][0])
    assert_close(logits[row], io[f"{key}_logits"], absolute=LOGIT_TOLERANCE)


def test_manifest_and_files_tell_of_the_same_tokens(name):
  _, io = load_run(name)
  for index, tokens in enumerate(RUNS[name]["generated"]):
    assert io[f"gen{index}_tokens"][0].tolist() == tokens
