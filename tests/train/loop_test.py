"""The loop: what it refuses before it starts, and when it stops."""

import itertools
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from videochat_flash_jax.cli.config_file import load_config
from videochat_flash_jax.data.synthetic_training import vocabulary_lines
from videochat_flash_jax.data.tokenizer import train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import loop

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


def test_the_shipped_config_can_be_trained():
  loop.check_config(load_config(TINY))


@pytest.mark.parametrize(
  "field, value",
  [
    ("seed", -1),
    ("seed", 2**32),
    ("seed", True),
    ("vocab_size", 304),
    ("vocab_size", None),
    ("stages", ()),
    ("stages", "encoder"),
    ("encoder", None),
    ("encoder.objective", "pictures"),
    ("encoder.trained", ()),
    ("encoder.trained", "vision"),
    ("encoder.trained", ("decoder",)),
    ("encoder.videos", 0),
    ("encoder.clips_per_video", None),
    ("short.trained", ("heads",)),
    ("short.num_steps", 0),
    ("short.log_every", 0),
    ("short.rows", 1.5),
    ("short.peak_rate", 0.0),
    ("short.peak_rate", float("nan")),
    ("short.questions", None),
    ("short.questions", ConfigDict({"colour": 1.0})),
    ("short.questions", ConfigDict({"attribute": -1.0, "absence": 2.0})),
    ("short.questions", ConfigDict({"absence": 0.0})),
    ("short.frames", (16,)),
    ("short.frames", (0, 16)),
    ("short.frames", (5, 7)),
    ("short.frames", (16, 4)),
    ("short.frames", (4, 20)),
    ("short.tokens_per_row", 100),
  ],
)
def test_a_field_that_cannot_be_used_is_named_in_one_line(field, value):
  config = load_config(TINY)
  *sections, name = field.split(".")
  with config.ignore_type():
    section = config[sections[0]] if sections else config
    section[name] = value
  named = "short.frames" if field == "short.tokens_per_row" else field
  with pytest.raises(InputError, match=rf"^config\.{named} is .*: give [^\n]+$"):
    loop.check_config(config)


def test_a_stage_without_a_section_is_refused():
  config = load_config(TINY)
  config.stages = ("encoder", "shrt")
  with pytest.raises(InputError, match=r"config\.shrt is missing"):
    loop.check_config(config)


def test_the_least_vocabulary_is_the_least_that_can_be_made(tmp_path):
  lines, least = vocabulary_lines(), loop._LEAST_VOCABULARY
  assert train_sentencepiece(lines, tmp_path / "least", least).vocab_size == least
  with pytest.raises(InputError):
    train_sentencepiece(lines, tmp_path / "less", least - 1)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_exports(tmp_path, monkeypatch):
  losses = itertools.chain([1.0] * 5, itertools.repeat(float("nan")))
  monkeypatch.setattr(loop, "split_state", lambda *_: (None, None))
  monkeypatch.setattr(loop, "make_step", lambda *_: lambda *_: (None, {"loss": next(losses)}))
  monkeypatch.setattr(loop, "_batches", lambda *_: itertools.repeat({}))
  config = load_config(TINY)
  config.stages, config.short.log_every = ("short",), 4
  complaint = r"stage short: the loss is nan by step 8; lower config\.short\.peak_rate"
  with pytest.raises(InputError, match=complaint):
    loop.train(config, tmp_path)
  assert '"step": 4' in (tmp_path / "train_log.jsonl").read_text().splitlines()[-1]
  assert not (tmp_path / "export").exists()
