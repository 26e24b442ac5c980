"""Makes the files that an earlier version of this package wrote, and the numbers it went on with.

They were made once, with the code of commit b2d8d2e, the last one before the packages `data`,
`synthetic` and `checkpoints` got their present form. They are not made again: the tests beside this
script say that today's code reads them. The command, in a checkout of that commit, was

  JAX_PLATFORMS=cpu PYTHONPATH=. python THIS_FILE OUT

It writes into OUT:

  files.tar.xz   run/: the WORKDIR of a run of 6 steps that was stopped after the third;
                 hub/: what `vcflash convert` made of its checkpoint
  expected.json  what the run logged of all 6 steps once it had gone on to its end; what the model
                 in hub/ makes of a clip and a few tokens
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

import videochat_flash_jax
from videochat_flash_jax.cli.config_file import load_config
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.models.config import (
  ConnectorConfig,
  DecoderConfig,
  VideoChatFlashConfig,
  VisionConfig,
)
from videochat_flash_jax.train.loop import train
from videochat_flash_jax.train.preemption import Preemption

COMMON = Path(videochat_flash_jax.__file__).parents[1] / "configs" / "common.py"
QUESTION = "What colour is the star?"
LOGGED = ("loss", "grad_norm", "targets")
_NEW_TOKENS = 4

# A model of 2,000 parameters, since the files are kept in the repository. It merges no tokens: with
# features of this width, rounding alone would now and then choose other pairs.
SMALL = VideoChatFlashConfig(
  name="tiny",
  vision=VisionConfig(
    kind="umt",
    image_size=8,
    patch_size=4,
    width=4,
    depth=1,
    num_heads=1,
    mlp_width=4,
    position_grid=2,
  ),
  connector=ConnectorConfig(clip_tokens=16, merge_heads=2),
  decoder=DecoderConfig(
    vocab_size=320,
    width=4,
    depth=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=2,
    mlp_width=4,
    tied_embeddings=True,
    max_positions=256,
  ),
)


def small_model():
  """Has the config's model "tiny" stand for `SMALL`, within a `with` block."""
  return mock.patch.object(VideoChatFlashConfig, "tiny", return_value=SMALL)


def get_config() -> ConfigDict:
  """The config of the run; encoder and embedding are frozen, so there are weights of both kinds."""
  config = load_config(COMMON)
  config.model, config.image_size = "tiny", 8
  config.compute_dtype, config.remat = "float32", "none"
  config.init_from = "random"
  config.num_steps, config.log_every = 6, 1
  config.rows, config.tokens_per_row, config.clips_per_shard, config.tiles_per_shard = 1, 512, 4, 0
  config.mesh.sequence, config.sequence_parallel = 1, "none"
  config.optimizer.learning_rate, config.optimizer.warm_up = 0.05, 0.0
  config.optimizer.scales = (("vision|embed_tokens", 0.0), ("", 1.0))
  config.data.synthetic = ConfigDict({"attribute": 0.8, "absence": 0.2})
  config.data.frames, config.data.workers = (4, 4), 0
  config.eval.batches, config.checkpoint.keep = 1, 1
  return config


def logged(workdir: Path) -> dict[str, list[float]]:
  """What a run logged of its steps: by name, a number for each step."""
  lines = map(json.loads, (workdir / "train_log.jsonl").read_text().splitlines())
  steps = [line for line in lines if "loss" in line]
  return {name: [step[name] for step in steps] for name in LOGGED}


def computed(hub: Path) -> dict[str, list[float]]:
  """What the model of a directory makes of a clip and a question: numbers and token ids."""
  chat = VideoChat.from_pretrained(hub)
  clip = (np.arange(4 * 8 * 8 * 3) * 37 % 256).astype(np.uint8).reshape(4, 8, 8, 3)
  question = chat.tokenizer.encode(QUESTION)
  prefix = Prefix(chat.engine)
  prefix.add_visual(chat.engine.encode([clip]))
  prefix.settle()
  reading = chat.engine.read([question], _NEW_TOKENS, behind=[prefix])
  logits = np.asarray(reading.logits)[0, ::40].tolist()
  ((answer, _),) = chat.engine.write(reading, _NEW_TOKENS)
  return {"question": question, "logits": logits, "answer": answer[0].tolist()}


def make(out: Path):
  """Trains until it is stopped, keeps these files, and goes on to the end."""
  run, hub = out / "run", out / "hub"
  with mock.patch.object(Preemption, "is_due", side_effect=[False, False, True]):  # at step 3
    assert train(get_config(), run) is None
  assert main(["convert", "--model", str(run), "--out", str(hub), "--dtype", "bfloat16"]) == 0
  with tarfile.open(out / "files.tar.xz", "w:xz", preset=9) as archive:
    for folder in (run, hub):
      archive.add(folder, folder.name, filter=_without_owner)
  assert train(get_config(), run) == run
  expected = {"run": logged(run), "hub": computed(hub)}
  (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
  shutil.rmtree(run)
  shutil.rmtree(hub)


def _without_owner(member):
  """Leaves out who made a file and when, and the files for TensorBoard, which nothing reads."""
  if Path(member.name).name.startswith("events."):
    return None
  member.uid = member.gid = member.mtime = 0
  member.uname = member.gname = ""
  return member


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")
  with small_model():
    make(Path(sys.argv[1]))
