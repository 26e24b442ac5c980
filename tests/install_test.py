"""The package is built, and answers in new environments, in a folder that holds nothing of ours."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def run(*command, folder):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = list(map(str, command))
  result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, f"{command}: {result.stdout[-2000:]} {result.stderr[-2000:]}"
  return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """What is needed to build: a build leaves folders behind, and would pick up those of before."""
  source = tmp_path_factory.mktemp("source")
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "videochat_flash_jax", source / "videochat_flash_jax", ignore=ignored)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  return source


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
  """A folder with the source distribution, and with the wheel that was built from it."""
  folder = tmp_path_factory.mktemp("built")
  run(sys.executable, "-m", "build", "--outdir", folder, source, folder=source)
  return folder


@pytest.fixture
def environment(tmp_path):
  """A new environment; returns the path of its Python."""
  run(sys.executable, "-m", "venv", tmp_path / "new", folder=tmp_path)
  return tmp_path / "new" / "bin" / "python"


def assert_it_answers(python, folder):
  """The demo and the README's lines of Python run and are right."""
  assert "3 of 3 right" in run(python, "-m", "videochat_flash_jax", "demo", folder=folder)
  answers = run(python, "-c", "\n".join(PYTHON_BLOCKS), folder=folder)
  assert answers.startswith("cyan\n")


@pytest.mark.slow
def test_both_hold_every_module_and_the_shipped_model(source, built):
  files = {str(p.relative_to(source)) for p in source.glob("videochat_flash_jax/**/*.*")}
  assert any("assets" in Path(name).parts for name in files)
  (wheel,) = built.glob("*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  assert {name for name in names if ".dist-info/" not in name} == files
  (archive,) = built.glob("*.tar.gz")
  with tarfile.open(archive) as tar:
    assert files <= {name.partition("/")[2] for name in tar.getnames()}


@pytest.mark.slow
def test_it_answers_beside_gradio(built, environment, tmp_path):
  (wheel,) = built.glob("*.whl")
  run(environment, "-m", "pip", "install", "-q", wheel, "gradio>=6", folder=tmp_path)
  run(environment, "-m", "pip", "check", folder=tmp_path)
  run(environment, "-c", "import gradio", folder=tmp_path)
  assert_it_answers(environment, tmp_path)


@pytest.mark.slow
def test_it_answers_with_the_oldest_packages_that_it_allows(built, environment, tmp_path):
  (wheel,) = built.glob("*.whl")
  run(environment, "-m", "pip", "install", "-q", "uv", folder=tmp_path)
  install = [environment.with_name("uv"), "pip", "install", "-q", "--python", environment]
  run(*install, "--resolution", "lowest-direct", wheel, folder=tmp_path)
  assert_it_answers(environment, tmp_path)
