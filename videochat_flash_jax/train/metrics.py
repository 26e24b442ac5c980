"""The logs of a run: files, TensorBoard, and a progress line in a terminal.

A line of metrics is written every `log_every` steps, and when a run stops. It describes the steps
since the line before, on all processes together:

  step 20  loss 3.41  learning_rate 1e-05  grad_norm 2.1  tokens_per_second 51200  mfu 0.41  ...

  loss, grad_norm, ...  means over the steps
  targets               targets of a step: the answer tokens, or patches, whose loss counts
  seconds_per_step      without compilation before the first step, and without evaluations
  skipped               steps whose loss or gradient was not finite, if there are any; the means are
                        those of the other steps
  data_wait             share of the time in which the devices of the first process were idle
                        because the next batch was not ready
  tokens_per_second     tokens of text and pictures, without padding; and visual_tokens_per_second
  examples_per_step     examples that were read; a few of them wait in rows that are not full yet
  data/tokens_filled    share of the tokens of rows that are not padding
  data/broken_share     share of the examples whose annotation row could not be read; and by reason
  data/damaged          videos of which some frames could not be read
  data/cut              examples of which words of an answer are missing, because they do not fit
                        into a row; and by annotation file
  mfu                   model FLOPs utilisation: share of the peak operations of all chips;
                        model_tflops, operations per second and 10^12, where the peak is unknown
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from tqdm import tqdm

from videochat_flash_jax.data.batches.train_batches import batch_metrics
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_NUM_DIGITS = 5  # of numbers for people
# Counts of `batch_metrics` that are logged as rates.
_AS_RATES = ("examples", "tokens", "visual_tokens")
_IN_PROGRESS_LINE = (
  "loss", "eval/loss", "learning_rate", "tokens_per_second", "mfu", "model_tflops", "data_wait",
)  # fmt: skip
_SINCE_START = ("wall_seconds", "cpu_seconds")


class RunLog:
  """Writes `train_log.jsonl` for programs, `train_log.txt` for people, and TensorBoard's files.

  Only the first process writes; on the others all methods do nothing.
  """

  def __init__(self, workdir: Path, step: int, num_steps: int):
    """Opens the files of a run, and removes what they say about steps after `step`.

    Args:
      workdir: of the run.
      step: the last step that is done; with 0 the files are emptied.
      num_steps: of the run.
    """
    self._is_writer = jax.process_index() == 0
    self._workdir, self._board, self._purged_from = workdir, None, step + 1
    before = _records(workdir / "train_log.jsonl", step) if self._is_writer else []
    self._before = before[-1] if before else dict.fromkeys(_SINCE_START, 0.0)
    self._start = time.perf_counter(), time.process_time()
    self._files = self._rewritten(before) if self._is_writer else []
    self._shown: dict[str, Any] = {}
    hidden = not self._is_writer or not sys.stderr.isatty()
    self._progress = tqdm(
      total=num_steps, initial=step, desc=workdir.name, unit="step", disable=hidden
    )

  def __enter__(self) -> "RunLog":
    return self

  def __exit__(self, *_):
    self._progress.close()
    with contextlib.suppress(OSError):  # the disk is full: `write` has raised that already
      for file in self._files:
        file.close()
      if self._board is not None:
        self._board.close()

  def advance(self):
    """Advances the progress line by one step."""
    self._progress.update()

  def write(self, step: int, **fields: Any):
    """Writes fields, and the wall and CPU seconds since the run started.

    Numbers are also written for TensorBoard.
    CPU seconds are those of this process, without its workers. Time spent on steps that are trained
    again after a crash is not counted.

    Raises:
      InputError: the disk is full, or the directory is missing.
    """
    if not self._is_writer:
      return
    now = time.perf_counter(), time.process_time()
    fields = {"step": step} | fields
    for name, start, end in zip(_SINCE_START, self._start, now, strict=True):
      fields[name] = round(self._before[name] + end - start, 1)
    try:
      for file, line in zip(self._files, _lines(fields), strict=True):
        file.write(line)
      self._write_board(step, fields)
    except OSError as error:
      raise InputError(
        f"{self._workdir}: the log cannot be written ({error.strerror}); make room or repair the "
        "directory, and give the same command again"
      ) from error
    self._shown |= {name: _rounded(fields[name]) for name in _IN_PROGRESS_LINE if name in fields}
    self._progress.set_postfix(self._shown)
    if self._progress.disable:
      _log.info(_lines(fields)[1].rstrip())

  def _write_board(self, step, fields):
    """Writes the numbers among the fields to TensorBoard's files."""
    scalars = {
      name: value
      for name, value in fields.items()
      if isinstance(value, int | float) and name not in ("step", *_SINCE_START)
    }
    if scalars and self._board is None:
      self._board = self._open_board()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)
    if scalars:
      self._board.flush()  # raises if the disk is full; the thread that writes does not

  def _open_board(self):
    """Opens a new file for TensorBoard, when the first number is written."""
    # TensorBoard then hides what was logged of steps that are trained again.
    purged = self._purged_from if any(self._workdir.glob("events.*")) else None
    # The queue of the thread that writes has no limit: if the thread has failed, a full queue would
    # block the run forever. The library takes `s3:` at the start of a path for a bucket.
    workdir = str(self._workdir.absolute())
    return tensorboardX.SummaryWriter(workdir, purge_step=purged, max_queue=0)

  def _rewritten(self, records):
    """Replaces the files by files with these records only; returns them open for appending."""
    files = []
    for number, suffix in enumerate((".jsonl", ".txt")):
      path = self._workdir / f"train_log{suffix}"
      partial = path.with_suffix(f"{suffix}.partial")
      lines = "".join(_lines(fields)[number] for fields in records)
      partial.write_text(lines, "utf-8", "backslashreplace")
      partial.replace(path)
      files.append(path.open("a", 1, "utf-8", "backslashreplace"))  # line by line, to be followed
    return files


class StepMeter:
  """Collects the metrics and the times of steps, and gives their means for each line of the log."""

  def __init__(self, flops: float, peak: float | None, state: Mapping[str, Any]):
    """Starts to measure time.

    Args:
      flops: operations of a step, on all devices together.
      peak: the most operations per second of all devices together, if that is known.
      state: of the batches of all processes, before the first step.
    """
    self._flops, self._peak, self._state = flops, peak, state
    self._reset()

  def _reset(self):
    """Forgets the steps so far."""
    self.num_steps, self._num_skipped, self._sums = 0, 0, {}
    self._waited, self._since = 0.0, time.perf_counter()

  def waited(self, seconds: float):
    """Counts time in which the devices were idle because the next batch was not ready."""
    self._waited += seconds

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """A context whose time does not count as time of steps."""
    start = time.perf_counter()
    yield
    self._since += time.perf_counter() - start

  def add(self, metrics: Mapping[str, float]):
    """Counts a step that is done, and adds up its metrics."""
    self.num_steps += 1
    for name, value in metrics.items():
      self._sums[name] = self._sums.get(name, 0.0) + value

  def skip(self):
    """Counts a step that is done, but changed nothing, since its loss was not finite."""
    self.num_steps += 1
    self._num_skipped += 1

  def line(self, state: Mapping[str, Any]) -> dict[str, float]:
    """Returns means over the `num_steps` steps since the line before, and resets the meter.

    Args:
      state: of the batches of all processes, after the last step.
    """
    seconds, steps = max(time.perf_counter() - self._since, 1e-9), max(self.num_steps, 1)
    num_finite = steps - self._num_skipped
    line = {name: value / num_finite for name, value in self._sums.items()}
    if self._num_skipped:
      line["skipped"] = self._num_skipped
    line |= {"seconds_per_step": seconds / steps, "data_wait": self._waited / seconds}
    if "streams" in state:
      line |= self._data_line(state, seconds, steps)
    flops = self._flops * self.num_steps / seconds
    line |= {"mfu": flops / self._peak} if self._peak else {"model_tflops": flops / 1e12}
    self._reset()
    return line

  def _data_line(self, state, seconds, steps):
    """The fields of a line that come from the state of the batches."""
    counts, self._state = batch_metrics(state, self._state), state
    rates = {f"{name}_per_second": counts[name] / seconds for name in ("tokens", "visual_tokens")}
    rates["examples_per_step"] = counts["examples"] / steps
    return rates | {f"data/{name}": counts[name] for name in counts if name not in _AS_RATES}


def _records(path, step):
  """The records of a log up to a step. Its last line may be incomplete, and is then left out."""
  if not step or not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if record.get("step", 0) <= step:
      records.append(record)
  return records


def _lines(fields):
  """A record as a line for programs and as one for people, which leaves out the config."""
  shown = {name: value for name, value in fields.items() if not isinstance(value, dict)}
  text = "  ".join(f"{name} {_rounded(value)}" for name, value in shown.items())
  return json.dumps(fields) + "\n", text + "\n"


def _rounded(value):
  if not isinstance(value, float) or not math.isfinite(value) or value == 0:
    return value
  return float(f"{value:.{_NUM_DIGITS}g}")
