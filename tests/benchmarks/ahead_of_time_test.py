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


FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
CUBES = "2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of 4 along three sides, of at most "


@pytest.mark.parametrize(
  "kind, shapes, message",
  [
    ("v5e", "0x4 1x2 2x16 3x5 6x6 10x10 12x12 14x14 32x4 64x64 4x4x4", FLAT),
    ("v6e", "6x6 16x17 2x2x1", FLAT),
    ("v5p", "0x4x4 1x2x1 2x2 4x4x6 6x6x6 16x24x24", CUBES + "6,144 chips"),
    ("v4", "17x1x1 16x16x20", CUBES + "4,096 chips"),
  ],
)
def test_a_slice_that_cannot_be_rented_is_refused_with_those_that_can(kind, shapes, message):
  for shape in shapes.split():
    with pytest.raises(InputError) as error:
      ahead_of_time.topology_devices(f"{kind}:{shape}")
    assert f"{kind}:{shape}: no such slice (slices of {kind} are {message}); give" in str(
      error.value
    )


@pytest.mark.parametrize(
  "kind, shapes",
  [
    ("v5e", "1x1 2x2 2x4 4x2 4x4 4x8 8x8 8x16 16x16"),
    ("v5p", "2x2x1 2x2x2 2x4x4 4x2x4 4x4x4 4x4x28 16x16x24 24x16x16"),
    ("v4", "2x2x1 12x12x24 16x16x16"),
  ],
)
def test_slices_that_can_be_rented_are_known_turned_too(kind, shapes):
  for shape in shapes.split():
    assert CHIPS[kind].has_slice(map(int, shape.split("x")))


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


def test_the_error_for_a_missing_config_recommends_one_that_can_be_compiled(capsys):
  assert main(["compile", "--config", "nowhere.py", "--topology", "v5e:4x4"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "nowhere.py: no such file" in line and "configs/stage3_long.py" in line


def test_a_wrong_field_is_reported_before_the_compiler_is_searched_for(monkeypatch, capsys):
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
def test_the_compilers_messages_about_memory_are_understood(message, sizes):
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
  "wanted, message",
  [
    ("15.78G", "15.78 GiB needed per chip, 15.75 GiB available"),
    ("1.5T", "1536.00 GiB needed per chip, 15.75 GiB available"),
    ("15.75G", "a little more than 15.75 GiB needed per chip, 15.75 GiB available"),
  ],
)
def test_the_error_says_how_much_is_needed_and_how_much_is_available(wanted, message):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = jax.ShapeDtypeStruct((1,), jnp.float32, sharding=sharding)
  with pytest.raises(ahead_of_time.OutOfMemory) as error:
    ahead_of_time.report("v5e:1x1", Refused(wanted), (shape,), remedy="fewer rows")
  assert str(error.value) == f"out of memory: {message}; try fewer rows"


RESULT = {
  "topology": "v5e:2x2",
  "num_slices": 1,
  "chips": 4,
  "peak_bytes": 2**30,
  "argument_bytes": 2**29,
  "temporary_bytes": 2**28,
  "flops": 2.5e12,
  "bytes_accessed": 3e9,
  "collectives": {"all-gather": {"count": 1234, "bytes": 6e9}},
  "roofline": dict.fromkeys(("compute_seconds", "memory_seconds", "link_seconds"), 0.25)
  | {"data_centre_seconds": 0.001},
}


@pytest.mark.parametrize(
  "changed, row",
  [
    ({}, "| v5e:2x2 | 1.00 | 0.50 | 0.25 | 2.5 | 3 | all-gather 6 (1,234) | 250 / 250 / 250 |"),
    (
      {"num_slices": 2, "collectives": {}},
      "| 2 x v5e:2x2 | 1.00 | 0.50 | 0.25 | 2.5 | 3 | - | 250 / 250 / 250 / 1 |",
    ),
    (
      {"num_slices": 2, "roofline": {**RESULT["roofline"], "data_centre_seconds": None}},
      "| 2 x v5e:2x2 | 1.00 | 0.50 | 0.25 | 2.5 | 3 | all-gather 6 (1,234) | 250 / 250 / 250 / ? |",
    ),
    (
      {"error": "out of memory", "wanted_bytes": 18.7 * 2**30, "available_bytes": 15.75 * 2**30},
      "| v5e:2x2 | does not fit: 18.70 of 15.75 GiB | | | | | | |",
    ),
  ],
)
def test_a_row_of_the_table_has_all_columns(changed, row):
  printed = ahead_of_time.table_row("a run", {**RESULT, **changed})
  assert printed == f"| a run {row}" and printed.count("|") == 10
