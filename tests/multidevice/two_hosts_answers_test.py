"""Two processes of four devices, as on two hosts, answer as one device does."""

import json

import numpy as np
import pytest
from jax.experimental.multihost_utils import process_allgather

import videochat_flash_jax as vcf
from tests.conftest import assert_close
from tests.multidevice.two_processes_test import run_two
from videochat_flash_jax.inference import prefix
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

PROCESS = """
import json, sys, jax
from pathlib import Path
from videochat_flash_jax.parallel.processes import join_processes
address, number, path, checkpoint, video = sys.argv[1:]
join_processes(address, 2, int(number))
jax.config.update("jax_default_matmul_precision", "highest")
import videochat_flash_jax as vcf
from tests.multidevice.two_hosts_answers_test import answers
assert jax.local_device_count() == 4 and jax.device_count() == 8
Path(path).write_text(json.dumps(answers(checkpoint, video, vcf.MeshConfig(sequence=4, tensor=2))))
"""
DROPOUT = DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.2))
SLOTS = 512  # of a new cache, so that it must grow


def answers(checkpoint, path, mesh=None):
  """What is answered, the scores behind the last answers, and the video's slots at last."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prefix, "CHUNK", SLOTS)
    chat = vcf.VideoChat.from_pretrained(checkpoint, mesh=mesh, dropout=DROPOUT)
    video, short = chat.watch(path, max_frames=12), {"max_new_tokens": 6, "temperature": 5.0}
    said = video.ask(["Which star moves?", "Who?"], **short)
    frames = np.random.default_rng(0).integers(0, 256, (268, 32, 32, 3), dtype=np.uint8)
    for part in (frames[:4], frames[4:]):  # the first fills only a part of the devices
      video.extend(part)
    scores = []
    for seed, question in enumerate(("Where?", "And then?", "Who?"), 1):
      if question == "Who?":
        video.reset()
      said.append(video.ask(question, seed=seed, **short))
      scores.append(process_allgather(video._reading.logits, tiled=True).tolist())
    return said, scores, video._prefix.caches[0].num_slots


@pytest.mark.slow
def test_two_hosts_answer_as_one_device(tmp_path):
  checkpoint = write_dummy_checkpoint(tmp_path / "checkpoint")
  video = write_dummy_video(tmp_path / "a.mp4")
  paths = [tmp_path / f"{number}.json" for number in range(2)]
  run_two(PROCESS, paths, checkpoint, video)
  said, scores, num_slots = answers(checkpoint, video)
  assert len(set(said)) > 2 and num_slots > SLOTS
  for path in paths:
    found, found_scores, found_slots = json.loads(path.read_text())
    assert found == said and found_slots > SLOTS
    assert_close(found_scores, scores, relative=1e-5)
