"""The training loop: it owns batches, logs and files; the step it calls is pure."""

import functools
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.convert import save_model
from videochat_flash_jax.checkpoints.manager import save_checkpoint
from videochat_flash_jax.data import synthetic_training
from videochat_flash_jax.data.pipeline import clip_batches, packed_batches
from videochat_flash_jax.data.synthetic_render import COLOURS
from videochat_flash_jax.data.synthetic_shapes import KINDS
from videochat_flash_jax.data.tokenizer import Tokenizer, train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train.losses import PatchProbe, answer_loss, patch_loss
from videochat_flash_jax.train.optimizer import make_optimizer
from videochat_flash_jax.train.step import make_step, split_state

_log = logging.getLogger("videochat_flash_jax")


class RunLog:
  """Writes what happens to `train_log.jsonl`, for programs, and to `train_log.txt`, for people."""

  def __init__(self, workdir: Path):
    # Line by line, so that a run can be followed.
    self._records = (workdir / "train_log.jsonl").open("w", buffering=1)
    self._text = (workdir / "train_log.txt").open("w", buffering=1)
    self._start = time.perf_counter(), time.process_time()

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_):
    self._records.close()
    self._text.close()

  def write(self, **fields: Any):
    """Adds wall and CPU seconds since the start of the run to `fields` and writes them."""
    wall, cpu = self._start
    fields["wall_seconds"] = round(time.perf_counter() - wall, 1)
    fields["cpu_seconds"] = round(time.process_time() - cpu, 1)
    self._records.write(json.dumps(fields) + "\n")
    line = "  ".join(f"{name} {value}" for name, value in fields.items())
    self._text.write(line + "\n")
    _log.info(line)


def train(config: ConfigDict, workdir: Path):
  """Trains a model stage by stage and exports it.

  Writes to `workdir`: `train_log.jsonl` and `.txt` as it goes, `checkpoints/` (Orbax) after each
  stage, and, when all is done, `export/`: a checkpoint directory in the released layout, which
  appears whole or not at all.

  Raises:
    InputError: `workdir` already holds a finished run.
  """
  export = workdir / "export"
  if export.exists():
    raise InputError(f"{export} exists: give another --workdir, or remove that directory first")
  partial = workdir / "export.partial"
  partial.mkdir(parents=True, exist_ok=True)
  with RunLog(workdir) as log:
    version = __version__
    log.write(event="start", version=version, jax=jax.__version__, config=config.to_dict())
    tokenizer = train_sentencepiece(
      synthetic_training.vocabulary_lines(), partial / "tokenizer.model", config.vocab_size
    )
    model_config = VideoChatFlashConfig.tiny()
    model = VideoChatFlash(model_config, rngs=nnx.Rngs(config.seed))
    for number, name in enumerate(config.stages):
      train_stage(model, tokenizer, name, config[name], config.seed + number, log)
      save_checkpoint(workdir / "checkpoints", number, nnx.to_pure_dict(nnx.state(model)))
    save_model(model, model_config, partial)
    log.write(event="end")
  partial.rename(export)


def train_stage(
  model: VideoChatFlash,
  tokenizer: Tokenizer,
  name: str,
  stage: ConfigDict,
  seed: int,
  log: RunLog,
):
  """Trains the parts of a model that a stage names, in place."""
  if stage.objective == "patches":
    classes = {"kinds": len(KINDS) + 1, "colours": len(COLOURS) + 1}
    module, loss = PatchProbe(model, classes, rngs=nnx.Rngs(seed)), patch_loss
  else:
    module, loss = model, answer_loss
  optimizer = make_optimizer(stage.num_steps, stage.peak_rate)
  graph, state = split_state(module, stage.trained, optimizer)
  step = make_step(graph, loss, optimizer)
  batches = _batches(model.config, tokenizer, stage, seed)
  recent = []
  for number in range(1, stage.num_steps + 1):
    # Steps are dispatched, not awaited: the next batch is drawn while the last one is computed.
    state, metrics = step(state, next(batches))
    recent.append(metrics)
    if number % stage.log_every == 0 or number == stage.num_steps:
      means = {key: round(float(sum(m[key] for m in recent)) / len(recent), 4) for key in metrics}
      log.write(stage=name, step=number, **means)
      recent = []
  nnx.update(module, state.trained, state.frozen)


def _batches(model_config, tokenizer, stage, seed):
  """The batches that a stage's objective asks for."""
  if stage.objective == "patches":
    draw = functools.partial(
      synthetic_training.draw_clips, config=model_config, num_clips=stage.clips_per_video
    )
    return clip_batches(draw, stage.videos, seed)
  draw = functools.partial(
    synthetic_training.draw_conversation,
    config=model_config,
    tokenizer=tokenizer,
    frames=tuple(stage.frames),
    max_tokens=stage.tokens_per_row,
    question_weights=stage.questions.to_dict(),
  )
  return packed_batches(
    draw,
    num_rows=stage.rows,
    num_tokens=stage.tokens_per_row,
    num_clips=stage.clips_per_row,
    clip_tokens=model_config.connector.clip_tokens,
    seed=seed,
  )
