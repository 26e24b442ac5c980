"""What int8 weights cost the model that ships: the numbers of docs/checkpoints.md.

The table there is printed by

  pytest tests/inference/int8_test.py -m slow -s
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.data.text.tokenizer import load_tokenizer
from videochat_flash_jax.evals.exact_match import evaluate
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.synthetic.training import draw_conversation

TINY = checkpoint_directory("tiny")
SEED = 90210  # of videos that training did not use
CLIPS, TOKENS = 16, 768  # all conversations are padded to these


def model(dtype=jnp.float32, weights=None):
  make = lambda config: VideoChatFlash(config, rngs=nnx.Rngs(0))  # noqa: E731
  return load_model(make, TINY, dtype, weights=weights)


@nnx.jit
def logits(model, clips, token_ids, visual_index):
  visual_tokens = model.encode(clips)
  visual_tokens = visual_tokens.reshape(1, -1, visual_tokens.shape[-1])
  return model.decoder.logits(model(token_ids[None], visual_tokens, visual_index[None]))[0]


def logits_of_answers(models, num_videos):
  """The logits of every token of the answers about some videos: by model, [tokens, vocab]."""
  rng, tokenizer = np.random.default_rng(SEED), load_tokenizer(TINY)
  found = {name: [] for name in models}
  for _ in range(num_videos):
    drawn = draw_conversation(
      rng, models["float32"].config, tokenizer, (8, 64), TOKENS, {"attribute": 1.0}
    )
    padding = TOKENS - len(drawn["token_ids"])
    clips = np.resize(drawn["frames"], (CLIPS, *drawn["frames"].shape[1:]))
    token_ids = np.pad(drawn["token_ids"], (0, padding))
    visual_index = np.pad(drawn["visual_index"], (0, padding), constant_values=-1)
    before_answers = np.flatnonzero(drawn["labels"][1:] >= 0)
    for name, model in models.items():
      found[name].append(np.asarray(logits(model, clips, token_ids, visual_index))[before_answers])
  return {name: np.concatenate(all_logits) for name, all_logits in found.items()}


def errors_of(models, num_videos):
  """By model: the largest and the mean error of a logit, and how many greedy tokens change."""
  found = logits_of_answers(models, num_videos)
  exact = found["float32"]
  print(f"\n{len(exact)} tokens, logits with a standard deviation of {exact.std():.2f}")
  errors = {}
  for name, approximate in found.items():
    error = np.abs(approximate - exact)
    changed = int((approximate.argmax(-1) != exact.argmax(-1)).sum())
    errors[name] = error.max(), error.mean(), changed
    print(f"{name}: largest {error.max():.2f}, mean {error.mean():.4f}, {changed} changed")
  return errors


def test_logits_stay_near_and_greedy_tokens_stay():
  errors = errors_of({"float32": model(), "int8": model(weights="int8")}, num_videos=6)
  largest, mean, changed = errors["int8"]
  assert 0 < mean < 0.03 and largest < 0.5
  assert changed == 0


@pytest.mark.slow
def test_int8_costs_about_as_much_as_bfloat16():
  models = {
    "float32": model(),
    "int8, computed in float32": model(weights="int8"),
    "bfloat16": model(jnp.bfloat16),
    "int8, computed in bfloat16": model(jnp.bfloat16, "int8"),
  }
  errors = errors_of(models, num_videos=55)
  means = {name: mean for name, (_, mean, _) in errors.items()}
  assert means["int8, computed in float32"] < 1.2 * means["bfloat16"]
  assert means["int8, computed in bfloat16"] < 2 * means["bfloat16"]
  assert all(changed <= 2 for *_, changed in errors.values())


def test_questions_about_videos_that_training_did_not_use_are_answered_as_well(tmp_path):
  """`cache_formats_test.py` asks about 55 videos."""
  world = ["--videos", "4", "--frames", "8:64", "--seed", str(SEED)]
  assert main(["synth", "--out", str(tmp_path / "world"), *world]) == 0
  wide, int8 = (
    evaluate(
      open_rows(read_mixture(str(tmp_path / "world" / "annotations.json"))),
      lambda weights=weights: VideoChat.from_pretrained("tiny", weights=weights),
    ).scores["all"]
    for weights in (None, "int8")
  )
  assert int8.questions == wide.questions > 12
  assert int8.accuracy >= wide.accuracy - 0.005


def test_an_engine_computes_in_the_dtype_that_was_asked_for_and_not_in_int8():
  for dtype in (jnp.float32, jnp.bfloat16):
    chat = VideoChat.from_pretrained("tiny", dtype, weights="int8")
    assert chat.engine.dtype == dtype
    clips = np.zeros((1, 4, *[chat.config.vision.image_size] * 2, 3), np.uint8)
    assert chat.engine.encode(clips).dtype == dtype
    assert chat.ask("Where?", max_new_tokens=2)
