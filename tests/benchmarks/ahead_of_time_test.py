"""What `vcflash compile` says where there is no compiler for TPUs, or nothing for it to do."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.chips import CHIPS

STAGE_3 = Path(__file__).parents[2] / "configs" / "stage3_long.py"


def compile_verb(*options):
  return main(["compile", "--config", str(STAGE_3), "--topology", "v5e:4x4", *options])


LARGER_THAN_ANY = ["v5e:64x64", "v5e:32x4", "v5e:4x4x4", "v6e:16x17", "v5p:16x24x24", "v4:17x1x1"]


@pytest.mark.parametrize("topology", LARGER_THAN_ANY)
def test_a_slice_larger_than_any_is_refused_with_the_largest(topology):
  kind = topology.partition(":")[0]
  sides = "x".join(map(str, CHIPS[kind].largest_slice))
  with pytest.raises(InputError, match=rf"no such slice \(the largest is {kind}:{sides}\)"):
    ahead_of_time.topology_devices(topology)


@pytest.mark.parametrize("sides", [(16, 24, 16), (24, 16, 16), (2, 2), (1, 1, 1)])
def test_a_slice_may_be_turned(sides):
  assert CHIPS["v5p"].has_slice(sides)


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "8x8", "v5e:4", "v5e:4x4x4x4"])
def test_a_slice_that_cannot_be_is_refused_with_known_ones(topology):
  with pytest.raises(InputError, match=rf"--topology {topology}: no such slice") as error:
    ahead_of_time.topology_devices(topology)
  assert "give one such as v4:2x2x2" in str(error.value) and "\n" not in str(error.value)


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert compile_verb() == 2
  captured = capsys.readouterr()
  (line,) = captured.err.splitlines()
  assert "pip install 'videochat_flash_jax[tpu]'" in line and captured.out == ""


def test_a_wrong_field_is_told_before_a_compiler_is_looked_for(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert compile_verb("--config.optimizer.scales=(('visoin',),)") == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "config.optimizer.scales" in line


@pytest.mark.parametrize(
  "message, sizes",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(19.5G) exceeds available HBM (15.75G).",
      (19.5 * 2**30, 15.75 * 2**30),
    ),
    (
      "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 512.25M of "
      "1.5K hbm. Exceeded hbm capacity by 512.25M.",
      (512.25 * 2**20, 1.5 * 2**10),
    ),
    ("INTERNAL: something else", None),
  ],
)
def test_the_compilers_words_about_memory_are_understood(message, sizes):
  assert ahead_of_time.memory_wanted(message) == sizes


class Refused:
  """A program for which the compiler finds no room."""

  def __init__(self, wanted):
    self.wanted = wanted

  def lower(self, *arguments):
    return self

  def compile(self):
    raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Used {self.wanted} of 15.75G hbm.")


@pytest.mark.parametrize(
  "wanted, said",
  [
    ("15.78G", "15.78 GiB a chip wanted, 15.75 GiB there"),
    ("1.5T", "1536.00 GiB a chip wanted, 15.75 GiB there"),
    ("15.75G", "15.75 GiB a chip wanted, a little more than the 15.75 GiB there"),
  ],
)
def test_what_is_wanted_is_told_apart_from_what_is_there(wanted, said):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=sharding)
  with pytest.raises(ahead_of_time.OutOfMemory) as error:
    ahead_of_time.report("v5e:1x1", Refused(wanted), (shape,), remedy="fewer rows")
  assert str(error.value) == f"out of memory: {said}; try fewer rows"
