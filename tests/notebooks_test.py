"""The notebooks for Colab run from the first cell to the last, and say what they should."""

import os
import re
import sys
from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "launch" / "colab"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))


def code_and_text(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_both_files_of_a_notebook_say_the_same(name):
  script, notebook = (jupytext.read(NOTEBOOKS / f"{name}.{kind}") for kind in ("py", "ipynb"))
  assert code_and_text(script) == code_and_text(notebook)
  assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.fixture
def output_of(tmp_path, monkeypatch):
  """Runs a notebook elsewhere than in the repository; returns the text of its outputs by cell."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")

  def run(name):
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return text, len(pictures)

  return run


@pytest.mark.slow
def test_quickstart_answers_and_shows_frames(output_of):
  text, num_pictures = output_of("quickstart")
  assert num_pictures == 1
  assert "0000.mp4: 120.0 s, 120 frames, one every 1 s" in text
  assert "What colour is the star?\ncyan\n(" in text
  assert "Which color is the hourglass? yellow\nIs there a key in the video? no\n" in text


@pytest.mark.slow
def test_the_compression_is_seen(output_of):
  text, num_pictures = output_of("see_the_compression")
  assert num_pictures == 3
  assert "16 clips of 4 frames, 64 patches a clip" in text
  assert text.count("12.5% of the tokens are kept") == 2


@pytest.mark.slow
def test_a_model_learns_and_is_exported(output_of, tmp_path):
  text, _ = output_of("finetune")
  before, after = re.findall(r"^all +(\d+) of +(\d+) right", text, re.M)
  assert int(before[0]) < 0.8 * int(before[1]) and int(after[0]) > 0.9 * int(after[1])
  assert (tmp_path / "lessons" / "mine-hf" / "model.safetensors").is_file()
