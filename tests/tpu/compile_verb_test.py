"""`vcflash compile` (`make test-tpu`)."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu

STAGE_3 = Path(__file__).parents[2] / "configs" / "stage3_long.py"
TINY = ["--config.model=tiny", "--config.image_size=32", "--config.clips_per_shard=8"]


def compile_verb(topology, *options):
  return main(["compile", "--config", str(STAGE_3), "--topology", topology, *options])


def test_compile_prints_one_json_object(capsys, in_haste):
  assert compile_verb("v5e:2x2", *TINY, "--config.rows=2", "--config.tokens_per_row=2048") == 0
  report = json.loads(capsys.readouterr().out)
  assert report["topology"] == "v5e:2x2" and report["chips"] == 4 and report["num_slices"] == 1
  parts = ("argument_bytes", "temporary_bytes", "peak_bytes", "flops", "bytes_accessed")
  assert all(report[part] > 0 for part in parts)
  whole = report["argument_bytes"] + report["temporary_bytes"]
  assert report["argument_bytes"] < report["peak_bytes"] <= 1.1 * whole
  assert report["collectives"]["collective-permute"]["bytes"] > 0
  assert report["roofline"]["bound_by"] in ("compute", "memory", "link")


@pytest.mark.parametrize("name", ["stage1_align", "stage2_pretrain", "stage4_highres", "finetune"])
def test_the_step_of_every_other_config_compiles(name, capsys, in_haste):
  """With the tiny model; docs/memory.md has them at their sizes."""
  config = ["--config", str(STAGE_3.with_name(f"{name}.py"))]
  sizes = [*TINY, "--config.rows=4", "--config.tokens_per_row=512", "--config.mesh.sequence=1"]
  assert main(["compile", *config, "--topology", "v5e:2x2", "--table", *sizes]) == 0
  assert capsys.readouterr().out.startswith(f"| {name}.py ")


@pytest.mark.parametrize(
  "program, sizes, what_helps",
  [
    ("train", [*TINY, "--config.rows=1024"], "mesh.sequence"),
    ("decode", ["--config.rows=4"], "mesh.tensor"),  # of the 7B: its weights fill the chip
  ],
)
def test_too_little_memory_is_told_with_what_is_wanted_and_what_helps(
  program, sizes, what_helps, capsys
):
  options = ["--config.mesh.sequence=1", *sizes, "--program", program]
  assert compile_verb("v5e:1x1", *options) == 2
  captured = capsys.readouterr()
  report = json.loads(captured.out)
  assert report["wanted_bytes"] > report["available_bytes"] > 15 * 2**30
  assert what_helps in report["error"] and "Traceback" not in captured.err


def test_mistakes_found_after_the_compiler_is_loaded_are_one_line():
  """In a process of its own, for the compiler speaks once, and to the process's own stderr."""
  mistakes = {
    "sequence 3": ["--topology", "v5e:2x2", "--config.mesh.sequence=3"],
    "no such slice": ["--topology", "v5e:3x5"],
    "clips_per_shard": [
      *("--topology", "v5e:1x1", "--program", "prefill", "--config.mesh.sequence=1"),
      *("--config.rows=1", "--config.tokens_per_row=64"),
    ],
  }
  verb = "import sys; from videochat_flash_jax.cli.main import main; sys.exit(main())"
  command = [sys.executable, "-c", verb, "compile", "--config", str(STAGE_3)]
  processes = {
    word: subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    for word, options in mistakes.items()
  }
  for word, process in processes.items():
    _, errors = process.communicate()
    (line,) = errors.splitlines()
    assert process.returncode == 2 and line.startswith("vcflash: ") and word in line


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_prefill_and_decode_share_heads_and_print_a_row_of_a_table(program, capsys):
  mesh = ["--config.mesh.fsdp=1", "--config.mesh.sequence=1", "--config.mesh.tensor=2"]
  sizes = ["--config.mesh.data=2", "--config.rows=2", "--config.tokens_per_row=512"]
  assert compile_verb("v5e:2x2", *TINY, *mesh, *sizes, "--program", program, "--table") == 0
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("| stage3_long.py ") and f"--program {program} | v5e:2x2 |" in line


def test_each_stage_of_a_config_has_a_row(capsys, monkeypatch):
  """Lowered only: to compile all five takes minutes."""

  def lower(topology, program, arguments, remedy):
    assert "func.func public @main" in program.lower(*arguments).as_text()
    report = {"topology": topology, "num_slices": 1, "error": "not compiled"}
    raise ahead_of_time.OutOfMemory(report | {"wanted_bytes": 2**34, "available_bytes": 2**33})

  monkeypatch.setattr(ahead_of_time, "report", lower)
  options = ["--topology", "v5e:1x1", "--table"]
  assert main(["compile", "--config", str(STAGE_3.with_name("tiny.py")), *options]) == 2
  rows = capsys.readouterr().out.splitlines()
  stages = ["stage0_encoder", "stage1_align", "stage2_pretrain", "stage3_long", "stage4_highres"]
  assert [row.split(" | ")[0] for row in rows] == [f"| tiny.py {stage}" for stage in stages]


def test_a_mistake_in_the_last_stage_is_told_before_the_first_is_compiled(capsys, monkeypatch):
  monkeypatch.setattr(ahead_of_time, "report", lambda *_: pytest.fail("a stage was compiled"))
  config = ["--config", str(STAGE_3.with_name("tiny.py")), "--topology", "v5e:1x1"]
  assert main(["compile", *config, "--config.stages.stage4_highres.mesh.sequence=3"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert "sequence 3" in line


def test_several_slices_are_one_mesh():
  devices = ahead_of_time.topology_devices("v5e:2x2", num_slices=2)
  mesh = make_mesh(MeshConfig(data=2, num_slices=2), devices)
  slices = [{chip.slice_index for chip in half.flat} for half in mesh.devices]
  assert slices == [{0}, {1}]


@pytest.mark.parametrize("topology", ["v5e:3x5", "v9:2x2", "v5e", "8x8"])
def test_an_unknown_slice_is_refused_with_known_ones(topology):
  with pytest.raises(
    InputError, match=r"--topology \S+ no such slice .* give one such as .*v5e:4x4"
  ):
    ahead_of_time.topology_devices(topology)


def test_memory_of_a_product_is_reported_per_chip():
  (device,) = ahead_of_time.topology_devices("v5e:1x1")
  sharding = jax.sharding.SingleDeviceSharding(device)
  square = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=sharding)
  report = ahead_of_time.report("v5e:1x1", jax.jit(jnp.matmul), (square, square))
  assert report["argument_bytes"] == 2 * report["output_bytes"] == 2 * 4096**2 * 2
  assert report["peak_bytes"] >= 3 * 4096**2 * 2
  assert report["flops"] == 2 * 4096**3
