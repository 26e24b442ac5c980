"""The directory of a run: what is refused and not changed, what is removed, and early warnings."""

import shutil
import types

import jax
import numpy as np
import pytest

from tests.train.loop_test import as_if_begun, small
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import loop
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.step import TrainState
from videochat_flash_jax.train.workdir import warn_of_room


def test_the_directory_of_a_model_is_refused_as_a_workdir_and_not_changed(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "videochat_flash_qwen"}')
  with pytest.raises(InputError, match=r"config\.json: not written by a run .* another --workdir"):
    loop.train(small(init_from=str(tmp_path)), tmp_path)
  (left,) = tmp_path.iterdir()
  assert left.read_text() == '{"model_type": "videochat_flash_qwen"}'


def test_the_directory_of_stages_is_refused_as_a_workdir(tmp_path):
  as_if_begun(tmp_path / "first", small())
  with pytest.raises(InputError, match=r"--workdir .* holds the runs first; give another one"):
    loop.train(small(), tmp_path)


def test_the_files_of_an_attempt_with_another_tokenizer_are_removed(tmp_path):
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "tokenizer.json").write_text("{}")
  loop.prepare(tmp_path, train_settings(small()), {})
  names = {path.name for path in (tmp_path / "hub").iterdir()}
  assert "config.json" in names and "tokenizer.json" not in names


@pytest.mark.parametrize("free, warns", [(10**9, True), (2 * 10**9, False)])
def test_a_warning_of_too_little_disk_space_comes_before_the_first_step(
  tmp_path, monkeypatch, caplog, free, warns
):
  usage = types.SimpleNamespace(free=free)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  weights = {"a": jax.ShapeDtypeStruct((10**8,), np.float32)}
  state = TrainState(weights, {}, {})
  warn_of_room(tmp_path, state, keep=2)
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == warns and all("take up to 1.12 GiB more, but only 0.93" in s for s in said)
