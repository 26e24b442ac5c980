"""Shared fixtures: where the golden numbers are, and float32 arithmetic at full precision."""

import functools
import gc
import json
import logging
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

jax.config.update("jax_default_matmul_precision", "highest")

# For programs that take longer to compile than to run: the compiler optimises little.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
)

# Needs 8 fake devices, from the start of the process: `make test` runs it in one of its own.
collect_ignore = [] if jax.device_count() == 8 else ["multidevice"]


def pytest_collection_finish():
  """Spares thousands of tests the search of all that was imported whenever garbage is collected."""
  gc.freeze()
  gc.set_threshold(100_000)


OUR_COPY = Path(__file__).parent / "golden"


def golden_root() -> Path:
  """Directory of golden numbers: `VCF_GOLDEN_DIR`, or the copy beside the tests."""
  return Path(os.environ.get("VCF_GOLDEN_DIR", OUR_COPY))


def release_facts(name: str):
  """Facts of the release, the same for every golden set: the set's own file, or our copy's."""
  path = golden_root() / name
  return json.loads((path if path.exists() else OUR_COPY / name).read_text())


def number_written(pattern: str, text: str) -> int:
  """The number that a pattern finds in a manifest's prose."""
  match = re.search(pattern, text)
  assert match, f"{pattern} not found in: {text}"
  return int(match[1])


@pytest.fixture(autouse=True)
def _logging_as_before():
  """A command's log goes to the terminal of its test, which is closed when the test ends."""
  ours = logging.getLogger("videochat_flash_jax")
  handlers, level = logging.root.handlers[:], ours.level
  yield
  logging.root.handlers[:] = handlers
  ours.setLevel(level)


class Golden:
  """One golden family: its manifest and its tensors, all sizes read from the files."""

  def __init__(self, family: str):
    self.path = golden_root() / family

  def json(self, name: str = "manifest.json"):
    return json.loads((self.path / name).read_text())

  def tensors(self, name: str) -> dict[str, np.ndarray]:
    return load_file(self.path / f"{name}.safetensors")


@pytest.fixture
def golden():
  """`golden("03_tome")` opens a family."""
  return Golden


def assert_close(actual, expected, *, relative: float = 0.0, absolute: float = 0.0):
  """Asserts max|a-b| <= relative * max|b| + absolute (the numbers policy's measure)."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  error = np.abs(actual - expected).max(initial=0.0)
  bound = relative * np.abs(expected).max(initial=0.0) + absolute
  assert error <= bound, f"max|a-b| = {error:.3g}, allowed {bound:.3g}"
