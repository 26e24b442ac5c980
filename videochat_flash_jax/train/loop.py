"""Training from a config: one run, or stages, each of which starts with the weights of the last."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from videochat_flash_jax.checkpoints.runs.run_files import whole_steps
from videochat_flash_jax.data.check.media_check import check_roots
from videochat_flash_jax.data.media.files import is_address
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.parallel.agreement import raise_on_all_processes
from videochat_flash_jax.train.config import require, run_configs, train_settings
from videochat_flash_jax.train.initial_weights import check_init_from
from videochat_flash_jax.train.objectives import OBJECTIVES, Objective
from videochat_flash_jax.train.preemption import Preemption
from videochat_flash_jax.train.program import train_program
from videochat_flash_jax.train.run import train_run
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.workdir import (
  check_config,
  check_shared,
  check_writable,
  is_begun,
  prepare,
)

_log = logging.getLogger("videochat_flash_jax")


class _Run(NamedTuple):
  """A run: its settings, its config in JSON types, and its directory."""

  settings: TrainSettings
  config: dict[str, Any]
  workdir: Path

  @property
  def objective(self) -> Objective:
    """What the run trains its model to do."""
    return OBJECTIVES[self.settings.objective]

  @property
  def is_finished(self) -> bool:
    """Whether there is a checkpoint of its last step."""
    return max(whole_steps(self.workdir / "checkpoints"), default=-1) >= self.settings.num_steps


def train(config: ConfigDict, workdir: Path) -> Path | None:
  """Trains as a config says; resumes where the last call with the same directory stopped.

  Writes to `workdir`, or, for a config with `stages`, to a directory of each stage in it:
  `config.json`, `hub/`, `checkpoints/`, `train_log.jsonl` and `.txt`, and events for TensorBoard.

  Args:
    config: of a run, see configs/common.py; or `stages`, a ConfigDict of them.
    workdir: of the run; the same on all processes.

  Returns:
    The directory of the last run, or None if a signal ended it before its last step.

  Raises:
    InputError: something that the user gave cannot be used, or a loss is no longer finite. Almost
      all checks come before anything is computed; then all processes raise the error together.
  """
  with raise_on_all_processes():
    runs = [_checked(*named) for named in _runs(config, workdir)]
    for run in runs:
      if not run.is_finished:
        _check_program(run)
        _check_mixtures(run)
    if jax.process_index() == 0:  # so that only one process downloads from the hub
      _check_init_from(runs)
    for run in runs:
      check_writable(run.workdir)
  check_shared(workdir, [run.config for run in runs])
  with Preemption() as preemption:
    for run in runs:
      if multihost_utils.broadcast_one_to_all(np.int32(run.is_finished)):
        _log.info("%s: is finished already", run.workdir)
        continue
      _log.info("%s: to step %d", run.workdir, run.settings.num_steps)
      prepare(run.workdir, run.settings, run.config)
      if not train_run(run.settings, run.config, run.workdir, preemption):
        step = max(whole_steps(run.workdir / "checkpoints"))
        _log.info(
          "%s: stopped and saved at step %d; the same command resumes it", run.workdir, step
        )
        return None
      if run is not runs[-1] and preemption.is_due():
        _log.info("%s: finished, then stopped; the same command resumes", run.workdir)
        return None
  return runs[-1].workdir


def heartbeat_seconds(config: ConfigDict) -> int:
  """After how many seconds without a message a process counts as dead: the least of all stages."""
  runs = _runs(config, Path())
  return min(train_settings(run).heartbeat_seconds for run, _ in runs)


def _runs(config, workdir) -> Iterator[tuple[ConfigDict, Path]]:
  """The config of each run, and its directory; a stage without `init_from` gets the one before."""
  previous = None
  for name, stage in run_configs(config).items():
    if stage.get("init_from") is None and previous is not None:
      stage.init_from = str(previous)
    previous = workdir.absolute() / name  # a relative path could read like the name of a model
    yield stage, workdir / name


def _checked(config, workdir) -> _Run:
  """Checks all that can be checked without opening any other file."""
  settings = train_settings(config)
  remedy = "a model on the hub, a checkpoint, or the --workdir of another run"
  require(bool(settings.init_from), "init_from", None, remedy)
  run = _Run(settings, json.loads(config.to_json_best_effort()), workdir)
  if run.objective.reads_mixtures and not settings.data.synthetic:
    require(bool(settings.data.mixture), "data.mixture", None, "a file: see docs/data_format.md")
  check_config(workdir, run.config)
  return run


def _check_program(run):
  """Builds the shapes of a run, which is quick, so that errors of a late stage are found early."""
  run.objective.check(run.settings, train_program(run.settings, jax.devices()))


def _check_init_from(runs):
  """Checks `init_from` of runs without a checkpoint, unless an earlier stage will write it."""
  for number, run in enumerate(runs):
    settings = run.settings
    start = Path(settings.init_from).absolute()
    made = [start.is_relative_to(earlier.workdir.absolute()) for earlier in runs[:number]]
    if not is_begun(run.workdir) and not any(made):
      check_init_from(settings.init_from, settings.model, run.objective.reads_mixtures)


def _check_mixtures(run):
  """Opens the mixtures that a run reads."""
  if not run.objective.reads_mixtures:
    return
  settings = run.settings
  mixtures = {"data.mixture": settings.data.mixture, "eval.mixture": settings.eval.mixture}
  if settings.data.synthetic:
    del mixtures["data.mixture"]
  given = {field: mixture for field, mixture in mixtures.items() if mixture}
  for field, mixture in given.items():
    is_there = is_address(mixture) or Path(mixture).is_file()
    require(is_there, field, mixture, "a file that exists")
  for mixture in given.values():
    check_roots(open_rows(read_mixture(mixture), max_frames=settings.data.frames[1]))
