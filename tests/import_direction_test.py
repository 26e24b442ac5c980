"""Imports run one way: cli -> train, inference, evals -> models -> ops -> shapes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import videochat_flash_jax

PACKAGE = "videochat_flash_jax"
LEAVES = {"errors", "fields", "plain_paths", "shapes"}
BELOW_MODELS = {"models.config", *LEAVES}
MODELS = {"models", "ops", *LEAVES}
MACHINERY = {"checkpoints", "data", "parallel", "synthetic", *MODELS}
_PARALLEL_OF_CHECKPOINTS = {"parallel.agreement", "parallel.processes", "parallel.sharding"}
_LEVELS_BELOW_BATCHES = {"data.media", "data.text", "data.mixture", "data.features"}

# A room (a module or folder of the package) -> what it may import besides itself. "" is the public
# face: `import videochat_flash_jax as vcf` and the names it offers.
MAY_IMPORT = {
  "": {"lazy_names"},
  "lazy_names": set(),
  "errors": set(),
  "fields": {"errors"},
  "plain_paths": {"errors"},
  "caches": set(),
  "__main__": {"cli"},
  "shapes": set(),
  "parallel": LEAVES,
  "parallel.zigzag": LEAVES,
  "parallel.mesh_config": LEAVES,
  "ops": {"parallel", *LEAVES},
  "models.config": LEAVES,
  "models": {"ops", "parallel", "lazy_names", *LEAVES},
  # The stages of data, level by level.
  "data": set(),
  "data.media": {"models.config", "errors", "fields"},
  "data.text": {"errors", "plain_paths"},
  "data.mixture": {"data.media", "data.text", "caches", "errors"},
  "data.features": {"data.media", "models.config", "errors", "plain_paths"},
  "data.batches": {*_LEVELS_BELOW_BATCHES, "models.config", "parallel.zigzag", "errors", "fields"},
  "data.check": {"data.media", "data.mixture", "data.batches", "errors"},
  "synthetic": {"data", "models.config", "errors", "fields"},
  "checkpoints": {"models.config", *_PARALLEL_OF_CHECKPOINTS, "errors"},
  "checkpoints.hub": {"models.config", "parallel.sharding", "caches", "errors"},
  "checkpoints.runs": {
    *{"checkpoints.hub", "models.config", "errors", "plain_paths"},
    *_PARALLEL_OF_CHECKPOINTS,
  },
  "train": MACHINERY,
  "inference": MACHINERY,
  "evals": {"", "data", "inference", *LEAVES},
  "testing": {"", "checkpoints", "data", "inference", "synthetic", *MODELS},
  "benchmarks": {"", "evals", "inference", "testing", "train", *MACHINERY},
  "cli": {"", "caches", "benchmarks", "evals", "inference", "testing", "train", *MACHINERY},
}
# Host code: the readers of videos and rows run in worker processes that must not start a device.
WITHOUT_JAX = {
  "lazy_names",
  "errors",
  "fields",
  "plain_paths",
  "models.config",
  "parallel.mesh_config",
  "parallel.zigzag",
  "data",
  "synthetic",
}


def broken_rules(root: Path) -> list[str]:
  """Every import under `root`, a tree like the package's, that breaks a rule: `file:line: why`."""
  broken = []
  for path in sorted(root.rglob("*.py")):
    module = _dotted(path.relative_to(root))
    room = _room(module)
    tree = ast.parse(path.read_text())
    on_import = set(_runs_on_import(tree))
    for node in ast.walk(tree):
      for target in _imported(node, module, is_package=path.name == "__init__.py"):
        why = _why_not(room, target, at_import=node in on_import)
        if why:
          broken.append(f"{path.relative_to(root)}:{node.lineno}: {why}")
  return broken


def _why_not(room: str | None, target: str, *, at_import: bool) -> str | None:
  top = target.split(".")[0]
  if top in ("torch", "transformers") and at_import:
    return f"{top} is imported before a function asks for it"
  if top in ("jax", "jaxlib", "flax") and at_import and _is_without_jax(room):
    return f"{room or 'the public face'} must not need {top}"
  if top != PACKAGE or target == f"{PACKAGE}.__version__":
    return None
  if room is None:
    return "this room is missing in the table MAY_IMPORT"
  inner = target.removeprefix(PACKAGE).removeprefix(".")
  first = inner.split(".")[0]
  is_face = first not in {name.split(".")[0] for name in MAY_IMPORT}
  inner = "" if is_face else inner
  allowed = {room, *MAY_IMPORT[room]}
  if not any(inner == name or (name and inner.startswith(f"{name}.")) for name in allowed):
    return f"{room or 'the public face'} must not import {inner or 'the public face'}"
  return None


def _is_without_jax(room: str | None) -> bool:
  return room == "" or any(f"{room}.".startswith(f"{name}.") for name in WITHOUT_JAX)


def _dotted(path: Path) -> str:
  """`models/umt.py` -> `models.umt`; `models/__init__.py` -> `models`; `__init__.py` -> ``."""
  parts = path.with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str | None:
  """The row of the table that speaks for a module: the longest name that is a part of its path."""
  rooms = [name for name in MAY_IMPORT if name and f"{module}.".startswith(f"{name}.")]
  return max(rooms, key=len) if rooms else "" if module == "" else None


def _imported(node: ast.AST, module: str, *, is_package: bool) -> Iterator[str]:
  """Absolute dotted names that an import statement asks for."""
  if isinstance(node, ast.Import):
    yield from (alias.name for alias in node.names)
  elif isinstance(node, ast.ImportFrom):
    source = node.module or ""
    if node.level:
      parents = [PACKAGE, *module.split(".")] if module else [PACKAGE]
      parents = parents[: len(parents) - node.level + is_package]
      source = ".".join([*parents, source] if source else parents)
    yield from (f"{source}.{alias.name}" for alias in node.names)


def _runs_on_import(node: ast.AST) -> Iterator[ast.AST]:
  """All nodes but those inside of functions: what runs when the module is imported."""
  for child in ast.iter_child_nodes(node):
    if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield child
      yield from _runs_on_import(child)


def test_imports_run_one_way():
  root = Path(videochat_flash_jax.__file__).parent
  assert len(list(root.rglob("*.py"))) > 10
  assert broken_rules(root) == []


@pytest.mark.parametrize(
  "path, line, why",
  [
    ("inference/chat.py", "from videochat_flash_jax.train import loop", "must not import train"),
    ("inference/chat.py", "import videochat_flash_jax.train.loop", "must not import train"),
    ("inference/chat.py", "def f():\n  from ..train import loop", "must not import train"),
    ("inference/chat.py", "import videochat_flash_jax", "must not import the public face"),
    (
      "data/text/tokens.py",
      "from videochat_flash_jax.models.umt import UMT",
      "data.text must not import",
    ),
    (
      "data/text/tokens.py",
      "from videochat_flash_jax.models import UMT",
      "data.text must not import",
    ),
    (
      "data/text/tokens.py",
      "from videochat_flash_jax import shapes",
      "data.text must not import shapes",
    ),
    ("data/text/tokens.py", "import jax.numpy as jnp", "data.text must not need jax"),
    ("data/__init__.py", "from ..train import loop", "data must not import train"),
    ("checkpoints/convert.py", "from ..data import tokenizer", "checkpoints must not import data"),
    ("models/qwen2.py", "from ..train import step", "models must not import train"),
    ("models/config.py", "from . import umt", "models.config must not import models.umt"),
    ("ops/rope.py", "from .. import models", "ops must not import models"),
    ("errors.py", "from videochat_flash_jax import shapes", "errors must not import shapes"),
    ("evals/needle.py", "from videochat_flash_jax.models import umt", "evals must not import"),
    ("train/loop.py", "import videochat_flash_jax.cli.main", "train must not import cli"),
    ("cli/bench.py", "import torch", "torch is imported before"),
    ("cli/bench.py", "try:\n  import torch.nn\nexcept ImportError:\n  pass", "torch is imported"),
    ("attic/old.py", "from videochat_flash_jax import errors", "missing in the table"),
  ],
)
def test_a_wrong_import_is_found(tmp_path, path, line, why):
  (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / path).write_text(f"{line}\n")
  (found,) = broken_rules(tmp_path)
  assert found.startswith(f"{path}:") and why in found


@pytest.mark.parametrize(
  "path, line",
  [
    ("cli/train.py", "from videochat_flash_jax.train import loop"),
    ("cli/bench.py", "def run(args):\n  import torch"),
    ("data/media/tiles.py", "from videochat_flash_jax.models.config import VisionConfig"),
    ("data/media/tiles.py", "from videochat_flash_jax.models import config"),
    ("data/check/report.py", "from ..batches.row_media import read_row_video"),
    ("data/text/tokens.py", "from .conversation import IGNORE_LABEL"),
    ("train/loop.py", "from videochat_flash_jax import __version__"),
    ("models/umt.py", "import jax\nfrom ..ops.attention import attention\nfrom . import config"),
    (
      "evals/needle.py",
      "import videochat_flash_jax as vcf\nfrom videochat_flash_jax import VideoChat",
    ),
  ],
)
def test_a_right_import_is_left_alone(tmp_path, path, line):
  (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / path).write_text(f"{line}\n")
  assert broken_rules(tmp_path) == []
