"""The training loop: it owns batches, logs and files; the step it calls is pure."""

import dataclasses
import functools
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.convert import save_model
from videochat_flash_jax.checkpoints.manager import save_checkpoint
from videochat_flash_jax.data import synthetic, synthetic_training
from videochat_flash_jax.data.pipeline import clip_batches, packed_batches
from videochat_flash_jax.data.synthetic_render import COLOURS
from videochat_flash_jax.data.synthetic_shapes import KINDS
from videochat_flash_jax.data.tokenizer import Tokenizer, train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.train.config_checks import are_names, is_count, is_number, require
from videochat_flash_jax.train.losses import PatchProbe, answer_loss, patch_loss
from videochat_flash_jax.train.optimizer import make_optimizer
from videochat_flash_jax.train.step import make_step, split_state

_log = logging.getLogger("videochat_flash_jax")

_COUNTS = {  # Fields of a stage that hold positive integers, by its objective,
  "patches": ("num_steps", "log_every", "videos", "clips_per_video"),
  "answers": ("num_steps", "log_every", "rows", "tokens_per_row", "clips_per_row"),
}
_PARTS = {  # and the parts that its loss can train.
  "patches": ("vision", "heads"),
  "answers": ("vision", "connector", "decoder"),
}
_LEAST_VOCABULARY = 305  # The chat tokens, 256 bytes, and the letters of the synthetic world.
_TEXT_TOKENS = 64  # Enough for a question with all that stands around it: fewer than 55 as shipped.


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


def check_config(config: ConfigDict):
  """Refuses a config that cannot be trained, before anything is computed or written.

  Raises:
    InputError: names the first field that is missing or cannot be used, and what to give.
  """
  seed, vocab_size, stages = (config.get(name) for name in ("seed", "vocab_size", "stages"))
  require(is_count(seed, 0) and seed < 2**32, "seed", seed, "an integer from 0 to 2**32 - 1")
  enough = is_count(vocab_size, _LEAST_VOCABULARY)
  require(enough, "vocab_size", vocab_size, f"an integer of {_LEAST_VOCABULARY} or more")
  require(are_names(stages), "stages", stages, 'names of stages, such as ("encoder",)')
  for name in stages:
    stage = config.get(name)
    require(isinstance(stage, ConfigDict), name, stage, "a ConfigDict, as config.stages names it")
    _check_stage(name, stage)


def _check_stage(name, stage):
  objective, rate = stage.get("objective"), stage.get("peak_rate")
  known = isinstance(objective, str) and objective in _COUNTS
  require(known, f"{name}.objective", objective, " or ".join(_COUNTS))
  parts, trained = _PARTS[objective], stage.get("trained")
  known = are_names(trained) and set(trained) <= set(parts)
  require(known, f"{name}.trained", trained, f"names out of {parts}")
  for field in _COUNTS[objective]:
    require(is_count(stage.get(field)), f"{name}.{field}", stage.get(field), "a positive integer")
  require(is_number(rate) and rate > 0, f"{name}.peak_rate", rate, "a positive number")
  if objective == "answers":
    _check_questions(f"{name}.questions", stage.get("questions"))
    _check_frames(f"{name}.frames", stage)


def _check_questions(name, questions):
  kinds = synthetic.QUESTION_KINDS
  known = isinstance(questions, ConfigDict) and set(questions) <= set(kinds)
  require(known, name, questions, f"a weight for each kind out of {kinds}")
  weights = list(questions.values())
  usable = all(is_number(weight) and weight >= 0 for weight in weights) and sum(weights) > 0
  require(usable, name, questions, "weights from 0, one of them positive")


def _check_frames(name, stage):
  frames = stage.get("frames")
  pair = isinstance(frames, tuple | list) and len(frames) == 2 and all(map(is_count, frames))
  require(pair, name, frames, "the least and the most frames, such as (4, 16)")
  clips = frames[1] // synthetic.CLIP_SECONDS
  holds_clip = clips >= math.ceil(frames[0] / synthetic.CLIP_SECONDS)
  require(holds_clip, name, frames, "a range that holds a multiple of 4, such as (4, 16)")
  fits = clips <= stage.clips_per_row
  require(fits, name, frames, f"clips of 4 that fit clips_per_row, which is {stage.clips_per_row}")
  tokens = clips * VideoChatFlashConfig.tiny().connector.clip_tokens + _TEXT_TOKENS
  fits = tokens <= stage.tokens_per_row
  require(fits, name, frames, f"fewer frames, or tokens_per_row of {tokens} or more")


def train(config: ConfigDict, workdir: Path):
  """Trains a model stage by stage and exports it.

  Writes to `workdir`: `train_log.jsonl` and `.txt` as it goes, `checkpoints/` (Orbax) after each
  stage, and, when all is done, `export/`: a checkpoint directory in the released layout, which
  appears whole or not at all.

  Raises:
    InputError: the config cannot be trained (see `check_config`), `workdir` cannot be written or
      already holds a finished run, or a loss is no longer finite.
  """
  check_config(config)
  export, partial = workdir / "export", workdir / "export.partial"
  try:
    if export.exists():
      raise InputError(f"{export} exists: give another --workdir, or remove that directory first")
    partial.mkdir(parents=True, exist_ok=True)
    run_log = RunLog(workdir)
  except OSError as error:
    raise InputError(
      f"--workdir {workdir}: cannot be written ({error.strerror}); give another directory"
    ) from error
  with run_log as log:
    version = __version__
    log.write(event="start", version=version, jax=jax.__version__, config=config.to_dict())
    tokenizer = train_sentencepiece(
      synthetic_training.vocabulary_lines(), partial / "tokenizer.model", config.vocab_size
    )
    tiny = VideoChatFlashConfig.tiny()
    decoder = dataclasses.replace(tiny.decoder, vocab_size=config.vocab_size)
    model_config = dataclasses.replace(tiny, decoder=decoder)
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
  """Trains the parts of a model that a stage names, in place.

  Raises:
    InputError: the loss is not finite.
  """
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
      if not math.isfinite(means["loss"]):
        raise InputError(
          f"stage {name}: the loss is {means['loss']} by step {number}; "
          f"lower config.{name}.peak_rate, which is {stage.peak_rate}"
        )
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
