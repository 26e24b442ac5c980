"""One run: begun, or gone on with, step by step; saved, measured, and stopped when it has to be."""

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
from videochat_flash_jax.train.batches import (
  RunBatches,
  held_out_batches,
  open_features,
  run_batches,
)
from videochat_flash_jax.train.flops import step_flops
from videochat_flash_jax.train.initial_weights import initial_weights
from videochat_flash_jax.train.metrics import RunLog, StepMeter
from videochat_flash_jax.train.optimizer import learning_rate_at
from videochat_flash_jax.train.preemption import Preemption
from videochat_flash_jax.train.profile import Profile
from videochat_flash_jax.train.program import TrainProgram, train_program
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainState
from videochat_flash_jax.train.workdir import check_checkpoint, warn_of_room

_log = logging.getLogger("videochat_flash_jax")
_LONGEST_COMPILING = 3_600_000  # milliseconds


def train_run(
  settings: TrainSettings, config: Mapping[str, Any], workdir: Path, preemption: Preemption
) -> bool:
  """Trains to the last step, from the newest checkpoint in `workdir` or from the beginning.

  Args:
    settings: of the run.
    config: what they were made of, as JSON has it: it is saved beside the weights.
    workdir: of the run, with `hub/`; see `train.workdir`.
    preemption: tells when to stop before.

  Returns:
    Whether the last step is done, and not one before it.

  Raises:
    InputError: something the user gave cannot be used; or a loss is no longer finite.
  """
  kept, run = settings.checkpoint, {"config": dict(config)}
  program = train_program(settings, jax.devices())
  with RunCheckpoints(workdir / "checkpoints", kept.keep, kept.keep_every) as checkpoints:
    warn_of_room(workdir, program.state, kept.keep)
    restored = checkpoints.restore(program.state, functools.partial(check_checkpoint, config))
    if restored is None:
      weights = initial_weights(settings.init_from, settings.model, program.weights, settings.seed)
      step, state, data = 0, program.begin(weights), None
    else:
      step, state, data, _ = restored
    features = open_features(settings, state.frozen)
    streams = data["facts"]["streams"] if data and "facts" in data else 0
    batches = run_batches(settings, program, workdir / "hub", features, streams)
    held_out = held_out_batches(settings, program, workdir / "hub", features)
    with (
      contextlib.closing(batches.begin()) as iterator,
      RunLog(workdir, step, settings.num_steps) as log,
      ThreadPoolExecutor(1, "metrics") as fetcher,
    ):
      if data is not None:
        iterator.set_state(data)
      iterator.start_prefetch()  # while the step is compiled
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
      )
      return steps.go_on(step, state)


def _compiled(program: TrainProgram, state, settings, workdir, is_measured):
  """The program with its step and evaluation compiled, and the seconds that took.

  All processes leave together: when they meet within a step, CPUs wait half a minute for each
  other, and compiling may take them longer. With dropout of tokens nothing is compiled here: then
  the shapes depend on the batches, and a step that meets new ones takes longer.
  """
  start = time.perf_counter()
  if settings.dropout is None:
    program = program._replace(step=program.step.lower(state, program.batch).compile())
    if is_measured:
      program = program._replace(evaluate=program.evaluate.lower(state, program.batch).compile())
  seconds = time.perf_counter() - start
  get_barrier_sync_fn()(key=f"compiled in {workdir}", timeout_ms=_LONGEST_COMPILING)
  return program, seconds


class _Running(NamedTuple):
  """A step that was dispatched, and whose metrics were not looked at yet.

  Attributes:
    step: its number.
    metrics: their values, and when they were there.
    data: state of the batches behind the step's.
  """

  step: int
  metrics: Future[tuple[dict[str, float], float]]
  data: dict[str, Any]


def _fetched(metrics: Mapping[str, jax.Array]) -> tuple[dict[str, float], float]:
  return {name: float(x) for name, x in jax.device_get(metrics).items()}, time.perf_counter()


@dataclasses.dataclass(kw_only=True)
class _Steps:
  """The steps of a run, and what is done between them.

  Attributes:
    run: what is saved beside the weights.
    iterator: of `batches`, on the devices.
    fetcher: waits for metrics, so that it is known when a step is done.
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

  def __post_init__(self):
    settings, peak = self.settings, peak_flops(jax.devices()[0].device_kind)
    self._rate = learning_rate_at(settings.optimizer, settings.num_steps)
    self._meter = StepMeter(
      step_flops(settings, self.program.layout.sequence_shards),
      peak and peak * jax.device_count(),
      allgather_streams(self.iterator.get_state()),
    )
    self._running: _Running | None = None
    self._wait = 0.0, 0.0  # when waiting for the last batch began, and ended

  def go_on(self, step: int, state: TrainState) -> bool:
    """Goes on behind `step`; see `train_run`."""
    settings = self.settings
    with Profile(settings.profile, self.workdir / "profile") as profile:
      while step < settings.num_steps:
        batch = self._next_batch()
        step += 1
        profile.before(step)
        with jax.transfer_guard("disallow"):
          state, metrics = self.program.step(state, batch)
        profile.after(step, metrics)
        # The step before is looked at while this one is computed.
        self._look_at_running()
        self.checkpoints.check()  # not as late as the next save
        metrics = self.fetcher.submit(_fetched, metrics)
        self._running = _Running(step, metrics, self.iterator.get_state())
        is_last, is_due = step == settings.num_steps, self.preemption.is_due()
        if is_due or is_last or step % settings.checkpoint.every == 0:
          self._save(step, state)
        if self.held_out and not is_due and (is_last or step % settings.eval.every == 0):
          self._measure(step, state)
          is_due = self.preemption.is_due()
        if is_due and not is_last:
          self._save(step, state)
          self._write_line(step, self.iterator.get_state())
          return False
    return True

  def _next_batch(self):
    start = time.perf_counter()
    batch = next(self.iterator)
    self._wait = start, time.perf_counter()
    if self._running is None:
      self._meter.waited(self._wait[1] - start)
    return batch

  def _save(self, step, state):
    """Saves, unless that was done; a loss that is not finite is refused before."""
    self._look_at_running()
    self.checkpoints.save(step, state, self.iterator.get_state(), self.run)

  def _look_at_running(self):
    """Waits for the metrics of the last step that was dispatched, if nobody did; refuses NaN."""
    if self._running is None:
      return
    step, metrics, data = self._running
    self._running = None
    values, done_at = metrics.result()
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
      raise self._not_finite(step, values, data)
    start, end = self._wait
    self._meter.waited(max(end - max(start, done_at), 0.0))
    self._meter.add(values)
    self.log.advance()
    if step % self.settings.log_every == 0 or step == self.settings.num_steps:
      self._write_line(step, data)

  def _write_line(self, step, data):
    """Writes what was counted since the last line, if anything was; every process calls this."""
    if self._meter.num_steps:
      line = self._meter.line(allgather_streams(data))
      self.log.write(step, learning_rate=float(self._rate(step - 1)), **line)

  def _not_finite(self, step, values, data):
    number = jax.process_index()
    path = self.workdir / f"nan_step_{step}{f'.process_{number}' if number else ''}.json"
    written = {name: repr(value) for name, value in values.items()}
    names = self.batches.names(data)
    path.write_text(json.dumps({"step": step, "metrics": written, "rows": names}, indent=1) + "\n")
    self.checkpoints.wait()
    newest = self.checkpoints.newest_step
    saved = "there is no checkpoint yet"
    if newest is not None:
      saved = f"the newest checkpoint is of step {newest}"
    return InputError(
      f"{self.workdir}: the loss of step {step} is {values['loss']}, the norm of its gradient "
      f"{values['grad_norm']}; the examples of its batch are in {path.name}, {saved}: look at the "
      "examples, or go on with a lower config.optimizer.learning_rate, which is "
      f"{self.settings.optimizer.learning_rate}; if its weights are spoilt already, move it away, "
      "and the one before counts"
    )

  def _measure(self, step, state):
    """Means over held-out batches, the same ones each time, of what each learns from."""
    self._look_at_running()
    sums: dict[str, float] = {}
    with self._meter.paused(), contextlib.closing(self.held_out.begin()) as batches:
      for _ in range(self.settings.eval.batches):
        metrics = jax.device_get(self.program.evaluate(state, next(batches)))
        targets = float(metrics.pop("targets"))
        for name, value in {**metrics, "targets": 1.0}.items():
          sums[name] = sums.get(name, 0.0) + float(value) * targets
    total = max(sums.pop("targets"), 1.0)
    self.log.write(step, **{f"eval/{name}": value / total for name, value in sums.items()})
