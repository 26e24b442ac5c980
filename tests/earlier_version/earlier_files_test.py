"""Files that an earlier version wrote are still read: `make_files.py` says how they were made."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.small_checkpoints import stored_bytes
from tests.conftest import assert_close
from tests.earlier_version.make_files import computed, get_config, logged, small_model
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.train.loop import train

FOLDER = Path(__file__).parent
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
STOPPED_AT = 3


@pytest.fixture
def files(tmp_path):
  """The directories that the earlier version wrote: `run` and `hub`."""
  with tarfile.open(FOLDER / "files.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


def test_a_run_that_an_earlier_version_began_goes_on_with_the_same_losses(files):
  run = files / "run"
  before = {name: numbers[:STOPPED_AT] for name, numbers in EXPECTED["run"].items()}
  assert logged(run) == before
  with small_model():
    assert train(get_config(), run) == run
  after = logged(run)
  assert {name: numbers[:STOPPED_AT] for name, numbers in after.items()} == before
  assert after["targets"] == EXPECTED["run"]["targets"]
  for name in ("loss", "grad_norm"):
    assert_close(after[name], EXPECTED["run"][name], absolute=1e-5)
  assert np.ptp(after["loss"][STOPPED_AT:]) > 0.01  # a batch or a step left out would show


def test_a_hub_directory_that_an_earlier_version_wrote_gives_the_same_numbers(files):
  actual, expected = computed(files / "hub"), EXPECTED["hub"]
  assert_close(actual["logits"], expected["logits"], absolute=1e-4)
  assert actual["question"] == expected["question"]
  assert actual["answer"] == expected["answer"]


def test_a_run_of_an_earlier_version_is_converted_to_the_same_bytes(files):
  out = files / "converted"
  options = ["--model", str(files / "run"), "--out", str(out), "--dtype", "bfloat16"]
  assert main(["convert", *options]) == 0
  assert stored_bytes(out) == stored_bytes(files / "hub")
  for name in ("config.json", "tokenizer.model"):
    assert (out / name).read_bytes() == (files / "hub" / name).read_bytes()
