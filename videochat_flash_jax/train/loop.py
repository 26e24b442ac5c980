"""Training from a config: one run, or several stages, each of which begins where the last ended."""

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
from videochat_flash_jax.train.batches import check_features
from videochat_flash_jax.train.config import require, run_configs, train_settings
from videochat_flash_jax.train.initial_weights import check_init_from
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
  """A run: its settings, its config as JSON has it, and its directory."""

  settings: TrainSettings
  config: dict[str, Any]
  workdir: Path

  @property
  def is_finished(self) -> bool:
    """Whether there is a checkpoint of its last step."""
    return max(whole_steps(self.workdir / "checkpoints"), default=-1) >= self.settings.num_steps


def train(config: ConfigDict, workdir: Path) -> Path | None:
  """Trains what a config says, from where the last call with the same directory stopped.

  Writes to `workdir`, or, of a config with `stages`, to a directory of each stage in it:
  `config.json`, `hub/`, `checkpoints/`, `train_log.jsonl` and `.txt`, and events for TensorBoard.

  Args:
    config: of a run, see configs/common.py; or `stages`, a ConfigDict of them.
    workdir: of the run; the same on all processes.

  Returns:
    The directory of the last run, or None if a signal ended it before its last step.

  Raises:
    InputError: something the user gave cannot be used: almost always before anything is computed,
      on all processes if on one; or a loss is no longer finite.
  """
  with raise_on_all_processes():
    runs = [_checked(*named) for named in _runs(config, workdir)]
    for run in runs:
      if not run.is_finished:
        _check_sizes(run.settings)
        _check_data(run.settings)
    if jax.process_index() == 0:  # the first to fetch what is on the hub
      _check_beginnings(runs)
    for run in runs:
      check_writable(run.workdir)
  check_shared(workdir, [run.config for run in runs])
  with Preemption() as preemption:
    for run in runs:
      if multihost_utils.broadcast_one_to_all(np.int32(run.is_finished)):
        _log.info("%s: finished before", run.workdir)
        continue
      _log.info("%s: to step %d", run.workdir, run.settings.num_steps)
      prepare(run.workdir, run.settings, run.config)
      if not train_run(run.settings, run.config, run.workdir, preemption):
        step = max(whole_steps(run.workdir / "checkpoints"))
        _log.info("%s: stopped and saved at step %d; the same command goes on", run.workdir, step)
        return None
      if run is not runs[-1] and preemption.is_due():
        _log.info("%s: finished, and stopped; the same command goes on", run.workdir)
        return None
  return runs[-1].workdir


def heartbeat_seconds(config: ConfigDict) -> int:
  """After how long a process that says nothing is taken for dead: the shortest of all stages."""
  runs = _runs(config, Path())
  return min(train_settings(run).heartbeat_seconds for run, _ in runs)


def _runs(config, workdir) -> Iterator[tuple[ConfigDict, Path]]:
  """The config of each run, and its directory."""
  previous = None
  for name, stage in run_configs(config).items():
    if stage.get("init_from") is None and previous is not None:
      stage.init_from = str(previous)
    previous = workdir / name
    yield stage, previous


def _checked(config, workdir) -> _Run:
  settings = train_settings(config)
  remedy = "a model on the hub, a checkpoint, or the --workdir of another run"
  require(bool(settings.init_from), "init_from", None, remedy)
  if settings.objective == "answers" and not settings.data.synthetic:
    require(bool(settings.data.mixture), "data.mixture", None, "a file: see docs/data_format.md")
  plain = json.loads(config.to_json_best_effort())
  check_config(workdir, plain)
  return _Run(settings, plain, workdir)


def _check_sizes(settings):
  """Builds the shapes of a run, which takes no time: a later stage is refused before the first."""
  check_features(settings, train_program(settings, jax.devices()))


def _check_beginnings(runs):
  """Looks at what runs begin with that have no checkpoint yet, unless a stage before makes it."""
  for number, (settings, _, workdir) in enumerate(runs):
    made = [Path(settings.init_from).is_relative_to(run.workdir) for run in runs[:number]]
    if not is_begun(workdir) and not any(made):
      check_init_from(settings.init_from, settings.model)


def _check_data(settings):
  """Opens the mixtures of a run."""
  if settings.objective != "answers":
    return
  mixtures = {"data.mixture": settings.data.mixture, "eval.mixture": settings.eval.mixture}
  if settings.data.synthetic:
    del mixtures["data.mixture"]
  given = {field: mixture for field, mixture in mixtures.items() if mixture}
  for field, mixture in given.items():
    missing = not is_address(mixture) and not Path(mixture).is_file()
    require(not missing, field, mixture, "a file that is there")
  for mixture in given.values():
    check_roots(open_rows(read_mixture(mixture), max_frames=settings.data.frames[1]))
