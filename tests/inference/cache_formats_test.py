"""What rounded caches cost the model that ships: the numbers of docs/memory.md.

The table there is printed by

  pytest tests/inference/cache_formats_test.py -m slow
"""

import json

import numpy as np
import pytest

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference.chat import VideoChat

SEED = 90210  # of videos that training did not use


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("world")
  options = ["--videos", "55", "--frames", "8:64", "--seed", str(SEED)]
  assert main(["synth", "--out", str(folder), *options]) == 0
  return folder


def logits_of(rows, world, cache):
  """The logits of the first token of each answer."""
  chat, found = VideoChat.from_pretrained("tiny", cache=cache), []
  for row in rows:
    video = chat.watch(world / row["video"], progress=False)
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    behind, ids = video._behind([video._ids_of(question)])
    found.append(np.asarray(chat.engine.read(ids, 8, behind=behind).logits)[0])
  return np.stack(found)


@pytest.mark.slow
def test_rounded_caches_change_logits_and_answers_as_little_as_the_docs_say(world, capsys):
  rows = json.loads((world / "annotations.json").read_text())
  rows = {row["video"]: row for row in rows}.values()  # one of each video
  exact = logits_of(rows, world, None)
  right = {}
  for cache in ("int8", "int4"):
    error = np.abs(logits_of(rows, world, cache) - exact)
    with capsys.disabled():
      print(f"\n{cache}: largest {error.max():.3f}, mean {error.mean():.4f} of {exact.std():.2f}")
    assert 0 < error.mean() < {"int8": 0.005, "int4": 0.1}[cache]
  capsys.readouterr()
  for options in ([], ["--weights", "int8", "--cache", "int8"], ["--cache", "int4"]):
    arguments = ["evaluate", "--model", "tiny", "--annotations", str(world / "annotations.json")]
    assert main([*arguments, *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    right[" ".join(options)] = report["right"]
  with capsys.disabled():
    print(f"right of {report['questions']}: {right}")
  wide, int8, int4 = right.values()
  assert int8 >= wide - 0.005 * report["questions"]
  assert int4 >= wide - 0.01 * report["questions"]
