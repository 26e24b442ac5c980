"""One run: begun, or gone on with, step by step; saved, measured, and stopped when it has to be."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.chips import peak_flops
from videochat_flash_jax.train.batches import RunBatches, run_batches
from videochat_flash_jax.train.flops import step_flops
from videochat_flash_jax.train.initial_weights import initial_weights
from videochat_flash_jax.train.metrics import RunLog, StepMeter
from videochat_flash_jax.train.optimizer import learning_rate_at
from videochat_flash_jax.train.preemption import Preemption
from videochat_flash_jax.train.program import TrainProgram, train_program
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainState

_log = logging.getLogger("videochat_flash_jax")


class _Done(NamedTuple):
  """A step that was dispatched: its number, its metrics on the devices, and the batches' state."""

  step: int
  metrics: Mapping[str, jax.Array]
  data: dict[str, Any]


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
  kept = settings.checkpoint
  with RunCheckpoints(workdir / "checkpoints", kept.keep, kept.keep_every) as checkpoints:
    program = train_program(settings, jax.devices())
    restored = checkpoints.restore(program.state, run={"config": dict(config)})
    if restored is None:
      begun_from = settings.init_from, settings.model, program.weights
      weights = initial_weights(*begun_from, settings.seed)
      step, state, data = 0, program.begin(weights), None
    else:
      step, state, data, _ = restored
    streams = data["facts"]["streams"] if data and "facts" in data else 0
    sources = settings, program, workdir / "hub", {**state.trained, **state.frozen}.get("vision")
    batches = run_batches(*sources, streams)
    measured = None
    if settings.eval.mixture or settings.data.synthetic or settings.objective == "patches":
      measured = run_batches(*sources, held_out=True)
    with contextlib.closing(batches.begin()) as iterator:
      if data is not None:
        iterator.set_state(data)
      with RunLog(workdir, step, settings.num_steps) as log:
        event = {"event": "resume" if step else "start", "version": __version__}
        log.write(step, **event, jax=jax.__version__, config=config)
        steps = _Steps(settings, program, batches, measured, iterator, checkpoints, log, workdir)
        return steps.run(step, state, config, preemption)


class _Steps:
  """The steps of a run, and what is done between them."""

  def __init__(
    self,
    settings: TrainSettings,
    program: TrainProgram,
    batches: RunBatches,
    measured: RunBatches | None,
    iterator,
    checkpoints: RunCheckpoints,
    log: RunLog,
    workdir: Path,
  ):
    self._settings, self._program, self._workdir = settings, program, workdir
    self._batches, self._measured, self._iterator = batches, measured, iterator
    self._checkpoints, self._log = checkpoints, log
    self._rate = learning_rate_at(settings.optimizer, settings.num_steps)
    peak = peak_flops(jax.devices()[0].device_kind)
    self._meter = StepMeter(
      step_flops(settings, program.layout.sequence_shards),
      peak and peak * jax.device_count(),
      batches.share,
      iterator.get_state(),
    )
    self._running: _Done | None = None  # whose metrics were not looked at yet

  def run(self, step: int, state: TrainState, config, preemption: Preemption) -> bool:
    """Goes on behind `step`; see `train_run`."""
    settings, every = self._settings, self._settings.checkpoint.every
    with _Profile(settings.profile, self._workdir / "profile") as profile:
      while step < settings.num_steps:
        batch = self._next_batch(preemption)
        if batch is None:
          self._save(step, state, config)
          return False
        step += 1
        profile.before(step)
        with jax.transfer_guard("disallow"):
          state, metrics = self._program.step(state, batch)
        profile.after(step, metrics)
        # The step before is looked at while this one is computed.
        self._look_at_running()
        self._running = _Done(step, metrics, self._iterator.get_state())
        is_last, is_due = step == settings.num_steps, preemption.is_due()
        if is_due or is_last or step % every == 0:
          self._save(step, state, config)
        if is_due and not is_last:
          return False
        if self._measured and (step % settings.eval.every == 0 or is_last):
          self._look_at_running()
          with self._meter.paused():
            self._measure(step, state)
    return True

  def _save(self, step, state, config):
    self._look_at_running()
    self._checkpoints.save(step, state, self._iterator.get_state(), {"config": dict(config)})

  def _next_batch(self, preemption):
    """The next batch; none if a signal has ended the processes that read it, too."""
    start = time.perf_counter()
    try:
      return next(self._iterator)
    except InputError:
      if not preemption.is_noticed:
        raise
      return None
    finally:
      self._meter.waited(time.perf_counter() - start)

  def _look_at_running(self):
    """Fetches the metrics of the last step but one, if that was not done; refuses NaN."""
    if self._running is None:
      return
    step, metrics, data = self._running
    self._running = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
      raise self._not_finite(step, values, data)
    self._meter.add(values)
    self._log.advance()
    if step % self._settings.log_every == 0 or step == self._settings.num_steps:
      rate = float(self._rate(step - 1))
      self._log.write(step, learning_rate=rate, **self._meter.line(data))

  def _not_finite(self, step, values, data):
    number = jax.process_index()
    path = self._workdir / f"nan_step_{step}{f'.process_{number}' if number else ''}.json"
    written = {name: repr(value) for name, value in values.items()}
    names = self._batches.names(data)
    path.write_text(json.dumps({"step": step, "metrics": written, "rows": names}, indent=1) + "\n")
    self._checkpoints.wait()
    newest = self._checkpoints.newest_step
    good = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is good"
    return InputError(
      f"{self._workdir}: the loss of step {step} is {values['loss']}, the norm of its gradient "
      f"{values['grad_norm']}; the examples of its batch are in {path.name}, {good}: look at them, "
      f"or lower config.optimizer.learning_rate, which is {self._settings.optimizer.learning_rate}"
    )

  def _measure(self, step, state):
    """Means over held-out batches, the same ones each time, of what each learns from."""
    sums: dict[str, float] = {}
    with contextlib.closing(self._measured.begin()) as batches:
      for _ in range(self._settings.eval.batches):
        metrics = jax.device_get(self._program.evaluate(state, next(batches)))
        tokens = float(metrics.pop("tokens"))
        for name, value in {**metrics, "tokens": 1.0}.items():
          sums[name] = sums.get(name, 0.0) + float(value) * tokens
    total = max(sums.pop("tokens"), 1.0)
    self._log.write(step, **{f"eval/{name}": value / total for name, value in sums.items()})


class _Profile:
  """Traces some steps into a folder, for TensorBoard or xprof."""

  def __init__(self, steps: tuple[int, ...], folder: Path):
    self._first, self._last = steps or (0, 0)
    self._folder, self._is_tracing = folder, False

  def __enter__(self) -> "_Profile":
    return self

  def __exit__(self, *_):
    self._stop()

  def before(self, step: int):
    if step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._is_tracing = True

  def after(self, step: int, metrics):
    if step == self._last:
      jax.block_until_ready(metrics)
      self._stop()

  def _stop(self):
    if self._is_tracing:
      self._is_tracing = False
      jax.profiler.stop_trace()
