"""What fits, from sizes alone; tests/tpu/fitting_test.py compares it with the compiler."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.fitting import Fitting, Setting, check_memory, sizes_of
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig, released_configs
from videochat_flash_jax.parallel.chips import CHIPS
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint

PRESET = DropoutConfig.model_card()
GIB = 2**30
DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


@pytest.fixture(scope="module")
def seven():
  return Fitting(VideoChatFlashConfig.qwen2_7b_res224())


def test_weights_are_those_of_the_model(seven):
  assert 15.8e9 < seven.needs(64, Setting()).weights < 15.9e9
  assert 8.1e9 < seven.needs(64, Setting("int8")).weights < 8.3e9
  half = seven.needs(64, Setting(tensor=2)).weights / seven.needs(64, Setting()).weights
  assert 0.5 < half < 0.55


def test_the_cache_of_ten_thousand_frames_is_that_of_its_tokens(seven):
  values = 160_000 * 28 * 2 * 4 * 128
  wide = seven.needs(10_000, Setting()).cache
  assert 2 * values < wide < 1.03 * 2 * values
  assert 0.5 < seven.needs(10_000, Setting(cache="int8")).cache / wide < 0.53
  assert 0.25 < seven.needs(10_000, Setting(cache="int4")).cache / wide < 0.28
  assert 0.6 < seven.needs(10_000, Setting(dropout=PRESET)).cache / wide < 0.62
  assert 0.25 < seven.needs(10_000, Setting(sequence=4)).cache / wide < 0.26


def test_the_most_frames_fit_and_one_clip_more_does_not(seven):
  for setting in (Setting("int8", "int8"), Setting("int8", "int4", PRESET)):
    memory = CHIPS["v5e"].memory_bytes
    most = seven.most_frames(memory, setting)
    assert most % 4 == 0
    assert seven.needs(most, setting).total <= memory < seven.needs(most + 4096, setting).total


def test_remedies_fit_and_none_is_needless(seven):
  memory = CHIPS["v5e"].memory_bytes
  remedies = list(seven.remedies(10_000, memory, Setting()))
  flags = [remedy.flags(Setting()) for remedy in remedies]
  assert "--tensor 2" in flags and "--weights int8 --cache int8" in flags
  assert not any("--tensor 2 " in flag or "--weights int8 --cache int8 " in flag for flag in flags)
  assert all(seven.needs(10_000, remedy).total <= memory for remedy in remedies)


def test_what_does_not_fit_is_refused_with_flags_that_help(seven):
  check_memory(seven, 512, Setting(), 24 * GIB, 1)
  with pytest.raises(InputError, match=r"needs .* the device has 15.8; give --tensor 2, "):
    check_memory(seven, 10_000, Setting(), int(15.75 * GIB), 8)
  with pytest.raises(InputError, match=r"15.8; give --weights int8 --cache int8, "):
    check_memory(seven, 10_000, Setting(), int(15.75 * GIB), 1)
  with pytest.raises(InputError, match="a device with more memory"):
    check_memory(seven, 10_000, Setting(), GIB, 1)


@pytest.mark.parametrize("gib, flags", [(7, ""), (5, " --weights int8")])
def test_where_no_flag_helps_a_smaller_model_is_named(seven, gib, flags):
  name = "VideoChat-Flash-Qwen2_5-2B_res448"
  with pytest.raises(InputError, match=f"; give --model {name}{flags} \\("):
    check_memory(seven, 64, Setting(), gib * GIB, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_needs_of_the_tiny_model_are_those_of_the_arrays_that_it_has(dtype):
  config, is_int8 = sizes_of("tiny")
  assert not is_int8
  chat = VideoChat.from_pretrained("tiny", dtype=jnp.dtype(dtype))
  needs = Fitting(config, dtype).needs(64, Setting())
  weights = chat.engine._model[-1]
  assert needs.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
  stored = jax.tree.leaves(chat.engine.empty_prefix_cache(range(4), 4096).stored)
  assert 0 < needs.cache - sum(leaf.nbytes for leaf in stored) < needs.cache / 5


def test_a_folder_with_the_name_of_a_released_model_is_read(tmp_path):
  name = released_configs()[0].name
  config, is_int8 = sizes_of(str(write_dummy_checkpoint(tmp_path / name)))
  assert config.decoder.width < 100 and not is_int8


def test_a_released_model_is_known_without_its_files():
  for config in released_configs():
    for name in (config.name, f"OpenGVLab/{config.name}"):
      assert sizes_of(name) == (config, False)
  with pytest.raises(InputError, match="no such model"):
    sizes_of("VideoChat-Flesh")


def rows_of_docs():
  pattern = r"\| (\S+) \| (v\w+) \| (.+ / .+) \| (.+ / .+) \| (.+ / .+) \|\n"
  return re.findall(pattern, DOCS.read_text())


@pytest.mark.parametrize("row", rows_of_docs()[::4], ids=lambda row: "-".join(row[:2]))
def test_the_frames_in_the_docs_are_those_that_fit(row):
  model, chip, *cells = row
  (config,) = [c for c in released_configs() if c.name.endswith(model)]
  fitting, memory = Fitting(config), CHIPS[chip].memory_bytes
  for cell, quantised in zip(cells, ((), ("int8", "int8"), ("int8", "int4")), strict=True):
    settings = (Setting(*quantised), Setting(*quantised)._replace(dropout=PRESET))
    found = [f"{fitting.most_frames(memory, setting):,}" for setting in settings]
    assert " / ".join(found) == cell


def test_the_docs_have_all_released_models_on_three_chips():
  assert len(rows_of_docs()) == 3 * len(released_configs())
