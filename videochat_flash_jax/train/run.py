"""One run, started or resumed: its steps, checkpoints and evaluations, and when it stops."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from orbax.checkpoint.multihost import get_barrier_sync_fn

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.checkpoints.runs.processes import allgather_streams
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.chips import peak_flops
from videochat_flash_jax.train.batches import RunBatches, open_features
from videochat_flash_jax.train.initial_weights import initial_weights
from videochat_flash_jax.train.metrics import RunLog, StepMeter
from videochat_flash_jax.train.objectives import OBJECTIVES
from videochat_flash_jax.train.optimizer import learning_rate_at
from videochat_flash_jax.train.preemption import Preemption
from videochat_flash_jax.train.profile import Profile
from videochat_flash_jax.train.program import train_program
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainProgram, TrainState
from videochat_flash_jax.train.workdir import check_checkpoint, warn_of_room

_log = logging.getLogger("videochat_flash_jax")
_MAX_COMPILE_MILLISECONDS = 3_600_000


def train_run(
  settings: TrainSettings, config: Mapping[str, Any], workdir: Path, preemption: Preemption
) -> bool:
  """Trains to the last step, from the newest checkpoint in `workdir` or from the beginning.

  Args:
    settings: of the run.
    config: the config that the settings were made from, in JSON types. It is saved beside the
      weights.
    workdir: of the run, with `hub/`; see `train.workdir`.
    preemption: says whether to stop before the last step.

  Returns:
    Whether the last step is done; otherwise the run was stopped, and can be resumed.

  Raises:
    InputError: something that the user gave cannot be used; or a loss is no longer finite.
  """
  objective, rules = OBJECTIVES[settings.objective], settings.checkpoint
  run = {"config": dict(config)}
  program = train_program(settings, jax.devices())
  with RunCheckpoints(workdir / "checkpoints", rules.keep, rules.keep_every) as checkpoints:
    warn_of_room(workdir, program.state, rules.keep)
    restored = checkpoints.restore(program.state, functools.partial(check_checkpoint, config))
    if restored is None:
      weights = initial_weights(settings.init_from, settings.model, program.weights, settings.seed)
      step, state, data = 0, program.begin(weights), None
    else:
      step, state, data, _ = restored
    features = open_features(settings, state.frozen)
    streams = data["facts"]["streams"] if data and "facts" in data else 0
    batches = objective.run_batches(settings, program, workdir / "hub", features, streams)
    held_out = objective.held_out_batches(settings, program, workdir / "hub", features)
    with (
      contextlib.closing(batches.begin()) as iterator,
      RunLog(workdir, step, settings.num_steps) as log,
      ThreadPoolExecutor(1, "metrics") as fetcher,
    ):
      if data is not None:
        iterator.set_state(data)
      iterator.start_prefetch()  # reads batches while the step is compiled
      program, seconds = _compiled(program, state, settings, workdir, held_out is not None)
      event = {"event": "resume" if step else "start", "version": __version__}
      event |= {"jax": jax.__version__, "compile_seconds": round(seconds, 1)}
      log.write(step, **event, config=config)
      steps = _Steps(
        settings=settings,
        run=run,
        workdir=workdir,
        program=program,
        batches=batches,
        held_out=held_out,
        iterator=iterator,
        checkpoints=checkpoints,
        log=log,
        fetcher=fetcher,
        preemption=preemption,
        step_flops=objective.step_flops(settings, program.layout.sequence_shards),
      )
      return steps.train_from(step, state)


def _compiled(program: TrainProgram, state, settings, workdir, is_evaluated):
  """Compiles the step and the evaluation; returns the program with them, and the seconds it took.

  All processes return together. Otherwise the first collective operation of a step could fail: on
  CPUs, a process waits half a minute for the others, and they may compile for longer than that.
  With token dropout nothing is compiled here: the shapes depend on the batches, and a step with new
  shapes is compiled when it is called.
  """
  start = time.perf_counter()
  if settings.dropout is None:
    program = program._replace(step=program.step.lower(state, program.batch).compile())
    if is_evaluated:
      program = program._replace(evaluate=program.evaluate.lower(state, program.batch).compile())
  seconds = time.perf_counter() - start
  get_barrier_sync_fn()(key=f"compiled in {workdir}", timeout_ms=_MAX_COMPILE_MILLISECONDS)
  return program, seconds


class _DispatchedStep(NamedTuple):
  """A step that was dispatched, but whose metrics were not read yet.

  Attributes:
    step: its number.
    metrics: their values, and the time at which they were known.
    data: state of the batches after the step's batch.
  """

  step: int
  metrics: Future[tuple[dict[str, float], float]]
  data: dict[str, Any]


def _fetched(metrics: Mapping[str, jax.Array]) -> tuple[dict[str, float], float]:
  """Waits for metrics; returns their values, and the time at which they were known."""
  return {name: float(x) for name, x in jax.device_get(metrics).items()}, time.perf_counter()


@dataclasses.dataclass(kw_only=True)
class _Steps:
  """The steps of a run, and what is done between them.

  Attributes:
    run: what is saved beside the weights.
    held_out: batches of the evaluations; None: the run is not evaluated.
    iterator: of `batches`, on the devices.
    fetcher: a thread that waits for metrics, so that the time at which a step ends is known.
    step_flops: operations of a step on all devices together.
  """

  settings: TrainSettings
  run: Mapping[str, Any]
  workdir: Path
  program: TrainProgram
  batches: RunBatches
  held_out: RunBatches | None
  iterator: grain.DatasetIterator
  checkpoints: RunCheckpoints
  log: RunLog
  fetcher: ThreadPoolExecutor
  preemption: Preemption
  step_flops: float

  def __post_init__(self):
    settings, peak = self.settings, peak_flops(jax.devices()[0].device_kind)
    self._rate = learning_rate_at(settings.optimizer, settings.num_steps)
    self._meter = StepMeter(
      self.step_flops,
      peak and peak * jax.device_count(),
      allgather_streams(self.iterator.get_state()),
    )
    self._dispatched: _DispatchedStep | None = None
    self._skipped: list[float] = []  # losses of the last steps, as far as they changed nothing
    self._wait = 0.0, 0.0  # when waiting for the last batch began, and ended

  def train_from(self, step: int, state: TrainState) -> bool:
    """Trains all steps after `step`; see `train_run`."""
    settings = self.settings
    with Profile(settings.profile, self.workdir / "profile") as profile:
      while step < settings.num_steps:
        batch = self._next_batch()
        step += 1
        profile.before(step)
        with jax.transfer_guard("disallow"):
          state, metrics = self.program.step(state, batch)
        profile.after(step, metrics)
        # The metrics of the step before are read while this one is computed.
        self._read_metrics()
        self.checkpoints.check()  # finds an error of the last save before the next save
        metrics = self.fetcher.submit(_fetched, metrics)
        self._dispatched = _DispatchedStep(step, metrics, self.iterator.get_state())
        is_last, is_due = step == settings.num_steps, self.preemption.is_due()
        if is_due or is_last or step % settings.checkpoint.every == 0:
          self._save(step, state)
        if self.held_out and not is_due and (is_last or step % settings.eval.every == 0):
          self._evaluate(step, state)
          is_due = self.preemption.is_due()
        if is_due and not is_last:
          self._save(step, state)
          self._write_line(step, self.iterator.get_state())
          return False
    return True

  def _next_batch(self):
    """Waits for the next batch, and notes when; see `_read_metrics`."""
    start = time.perf_counter()
    batch = next(self.iterator)
    self._wait = start, time.perf_counter()
    if self._dispatched is None:
      self._meter.waited(self._wait[1] - start)
    return batch

  def _save(self, step, state):
    """Saves the state, unless it is saved already."""
    self._read_metrics()
    self.checkpoints.save(step, state, self.iterator.get_state(), self.run)

  def _read_metrics(self):
    """Waits for the metrics of the last dispatched step, unless they were read, and counts them.

    Raises:
      InputError: its loss or its gradient is not finite, nor are those of the `max_skipped` steps
        before it.
    """
    if self._dispatched is None:
      return
    step, metrics, data = self._dispatched
    self._dispatched = None
    values, done_at = metrics.result()
    is_finite = all(math.isfinite(values[name]) for name in ("loss", "grad_norm"))
    self._skipped = [] if is_finite else [*self._skipped, values["loss"]]
    if not is_finite:
      self._report_skipped(step, values, data)
    # The devices were idle from the end of the step to the arrival of the next batch.
    start, end = self._wait
    self._meter.waited(max(end - max(start, done_at), 0.0))
    if is_finite:
      self._meter.add(values)
    else:
      self._meter.skip()
    self.log.advance()
    if step % self.settings.log_every == 0 or step == self.settings.num_steps:
      self._write_line(step, data)

  def _write_line(self, step, data):
    """Logs the steps since the last line, if there are any; every process calls this."""
    if self._meter.num_steps:
      line = self._meter.line(allgather_streams(data))
      self.log.write(step, learning_rate=float(self._rate(step - 1)), **line)

  def _report_skipped(self, step, values, data):
    """Logs that a step is skipped, and writes the names of its examples to a file.

    Raises:
      InputError: it is one too many in a row.
    """
    process = jax.process_index()
    path = self.workdir / f"nan_step_{step}{f'.process_{process}' if process else ''}.json"
    written = {name: repr(value) for name, value in values.items()}
    names = self.batches.names(data)
    path.write_text(json.dumps({"step": step, "metrics": written, "rows": names}, indent=1) + "\n")
    number, most = len(self._skipped), self.settings.optimizer.max_skipped
    loss, norm = written["loss"], written["grad_norm"]
    found = f"the loss of step {step} is {loss}, the norm of its gradient {norm}"
    examples = f"the examples of its batch are in {path.name}"
    if number <= most:
      fields = {"skipped_loss": loss, "skipped_grad_norm": norm, "examples": path.name}
      self.log.write(step, event="skipped", **fields)
      message = "%s: it changes nothing, and is number %d of at most %d such steps in a row; %s"
      _log.warning(message, found, number, most, examples)
      return
    if most:
      losses = ", ".join(map(repr, self._skipped[:-1]))
      found += f"; it is number {number} of such steps in a row, the losses before it are {losses}"
    self.checkpoints.wait()
    newest = self.checkpoints.newest_step
    saved = "there is no checkpoint yet"
    if newest is not None:
      saved = f"the newest checkpoint is of step {newest}"
    raise InputError(
      f"{self.workdir}: {found}; {examples}, {saved}: look at the examples, or resume with a lower "
      f"config.optimizer.learning_rate, which is {self.settings.optimizer.learning_rate}; if the "
      "weights of that checkpoint are damaged already, move it away, and the run resumes from the "
      "one before"
    )

  def _evaluate(self, step, state):
    """Logs means over the targets of held-out batches, which are the same ones each time."""
    self._read_metrics()
    sums: dict[str, float] = {}
    with self._meter.paused(), contextlib.closing(self.held_out.begin()) as batches:
      for _ in range(self.settings.eval.batches):
        metrics = jax.device_get(self.program.evaluate(state, next(batches)))
        targets = float(metrics.pop("targets"))
        for name, value in {**metrics, "targets": 1.0}.items():
          sums[name] = sums.get(name, 0.0) + float(value) * targets
    total = max(sums.pop("targets"), 1.0)
    self.log.write(step, **{f"eval/{name}": value / total for name, value in sums.items()})
