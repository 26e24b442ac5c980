"""Writes and restores the checkpoints of a run through Orbax, while training continues.

  DIRECTORY/frozen      weights that never change, written once; see `runs.frozen_weights`
  DIRECTORY/500/state   all other weights and the optimizer, by dotted paths: `trained.connector...`
  DIRECTORY/500/data    the state of the batches of all processes (JSON)
  DIRECTORY/500/run     which run wrote it: step, config, versions of this package and JAX (JSON)

Each directory is written under a temporary name, and renamed when it is whole; before it is
removed, it is moved to `DIRECTORY/.removed`. So what an interrupted save or removal leaves is never
taken for a checkpoint, and the next `RunCheckpoints` removes it. The frozen weights are on disk
before the first checkpoint is started, so no checkpoint is ever without them.
"""

import contextlib
import dataclasses
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.runs.array_check import check_arrays
from videochat_flash_jax.checkpoints.runs.frozen_weights import (
  find_frozen,
  frozen_shapes,
  restore_frozen,
  save_frozen,
)
from videochat_flash_jax.checkpoints.runs.processes import (
  allgather_streams,
  newest_on_all_processes,
)
from videochat_flash_jax.checkpoints.runs.run_files import FROZEN, is_whole, whole_steps
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.parallel.processes import is_peer_failure
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.plain_paths import plain_path

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix for the name of an unfinished directory
_PROBE = ".probe"
_REMOVED = ".removed"
# Stacked matrices are stored layer by layer, so that an export can read a single layer.
_WHOLE = ocp.SaveArgs(chunk_byte_size=32 * 2**20)
_BY_LAYER = ocp.SaveArgs(chunk_byte_size=32 * 2**20, shard_axes=(0,))


class Restored(NamedTuple):
  """What `RunCheckpoints.restore` returns.

  Attributes:
    step: the step of the checkpoint.
    state: a tree of arrays with the structure of the given shapes.
    data: the state of the batches, with the streams of all processes.
    run: which run wrote the checkpoint: step, config and versions.
  """

  step: int
  state: Any
  data: dict
  run: dict


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, but it does not ask JAX whether the program was preempted.

  Only one caller in a program may ask this, because JAX counts the calls as steps.
  """

  def reached_preemption(self, step: int) -> bool:
    """Always returns False: `train.preemption` asks JAX, and says when to save."""
    return False


@dataclasses.dataclass(frozen=True)
class _Kept:
  """Tells Orbax which checkpoints to keep: enough whole ones, and all that are newer than these.

  Orbax's own rules would also count those of which only a part is there.
  """

  is_whole: Callable[[int], bool]
  keep: int
  keep_every: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns for each checkpoint, from old to new, whether it is kept."""
    whole = [info.step for info in checkpoints if self.is_whole(info.step)]
    oldest = whole[-self.keep] if len(whole) > self.keep else 0
    extra = {step for step in whole if self.keep_every and step % self.keep_every == 0}
    return [info.step >= oldest or info.step in extra for info in checkpoints]


class RunCheckpoints:
  """Saves and restores the checkpoints of a run; every process of the run has such an object."""

  def __init__(self, directory: Path, keep: int = 3, keep_every: int = 0):
    """Creates the directory if it is missing, and removes what interrupted saves have left.

    Args:
      directory: directory of all checkpoints of the run; all processes must see it.
      keep: number of the newest whole checkpoints that are kept.
      keep_every: whole checkpoints of steps that are a multiple of this are kept too; 0 for none.

    Raises:
      InputError: the directory cannot be written.
    """
    self._directory = directory.absolute()
    self._saving: int | None = None  # the step that is being written
    self._frozen_id: str | None = None  # id of the frozen weights, when it is known
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._probe()
    except OSError as error:
      raise InputError(
        f"{directory}: checkpoints cannot be written there ({error.strerror}); "
        "give a directory that can be written, or make room"
      ) from error
    # Orbax would do this too, but during the first save, whose directories have the same names.
    if jax.process_index() == 0:
      self._remove_unfinished()
    kept = _Kept(self._is_whole, keep, keep_every)
    options = ocp.CheckpointManagerOptions(preservation_policy=kept, todelete_subdir=_REMOVED)
    logging.getLogger("absl").addFilter(_is_not_repeated)
    json_files = ocp.JsonCheckpointHandler
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": json_files(), "run": json_files()}
    self._manager = _Manager(plain_path(self._directory), options=options, item_handlers=handlers)

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, *_):
    self.close()

  @property
  def newest_step(self) -> int | None:
    """The step of the newest whole checkpoint that this process sees on disk."""
    return max(whole_steps(self._directory), default=None)

  def save(self, step: int, state: Any, data_state: dict, run: dict):
    """Copies the state from the devices to the host, and writes it while training continues.

    All processes must call this at the same step. Nothing happens if this step was saved before.

    Args:
      step: number of finished steps.
      state: a tree of arrays; with several processes they are global arrays.
      data_state: the state of this process's batches, as JSON values.
      run: facts about the run, as JSON values: its `config`. The step and versions are added.

    Raises:
      InputError: this checkpoint, or the one before it, could not be written.
    """
    self.wait()
    if step in self._manager.all_steps():
      if is_whole(self._directory / str(step)):
        return
      self._manager.delete(step)  # the rest of a checkpoint whose removal was interrupted
    arrays = _by_path(state)
    frozen = _frozen(arrays)
    changing = {path: array for path, array in arrays.items() if path not in frozen}
    self._saving = step
    with self._report_write_errors(), jax.transfer_guard("allow"):
      self._probe()
      written = {"step": step, "version": __version__, "jax": jax.__version__}
      if frozen:
        written[FROZEN] = self._save_frozen_once(frozen)
      args = ocp.args.Composite(
        state=_standard_save(changing),
        data=ocp.args.JsonSave(allgather_streams(data_state)),
        run=ocp.args.JsonSave(run | written),
      )
      self._manager.save(step, args=args, force=True)

  def check(self):
    """Checks, without waiting, whether the last save has failed.

    Raises:
      InputError: as `wait`.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self):
    """Waits until the checkpoint that is being saved is on disk.

    Raises:
      InputError: it could not be written. The message names the step, and the newest whole
        checkpoint.
    """
    try:
      with self._report_write_errors():
        self._manager.wait_until_finished()
    finally:
      self._saving = None
    if jax.process_index() == 0:
      shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)

  def restore(
    self, shapes: Any, check_run: Callable[[Path, Mapping[str, Any]], None] | None = None
  ) -> Restored | None:
    """Reads the newest whole checkpoint, on any mesh and with any number of processes.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct` with shardings; it has the structure of the saved
        state.
      check_run: called with the directory of the checkpoint and the `run` that `save` wrote. It
        raises an error if this checkpoint must not be restored.

    Returns:
      The restored checkpoint; None if there is none.

    Raises:
      InputError: the checkpoint belongs to another config (the message names the first field or
        array that differs), or its files are damaged.
    """
    self.wait()
    step = newest_on_all_processes(self._directory)
    if step is None:
      return None
    where, wanted = self._directory / str(step), _by_path(shapes)
    with _report_read_errors(where):
      read = {name: ocp.args.JsonRestore() for name in ("data", "run")}
      saved = self._manager.restore(step, args=ocp.args.Composite(**read))
      if check_run is not None:
        check_run(where, saved["run"])
      stored = dict(self._manager.item_metadata(step)["state"])
      frozen = find_frozen(where, saved["run"])
      check_arrays(where, stored | (frozen_shapes(frozen) if frozen else {}), wanted)
      args = ocp.args.StandardRestore({path: wanted[path] for path in stored})
      arrays = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
      if frozen:
        arrays |= restore_frozen(frozen, _frozen(wanted))
    state = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in wanted])
    return Restored(step, state, saved["data"], saved["run"])

  def close(self):
    """Waits until everything is written, and ends the threads that write.

    Raises:
      InputError: as `wait`.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _save_frozen_once(self, frozen: dict[str, Any]) -> str:
    """Returns the id of the frozen weights, and writes them before the first checkpoint."""
    if self._frozen_id is None:
      newest = newest_on_all_processes(self._directory)
      if newest is not None:
        where = plain_path(self._directory) / str(newest) / "run"
        saved = ocp.JsonCheckpointHandler().restore(where)
        self._frozen_id = saved.get(FROZEN)
    if self._frozen_id is None:
      self._frozen_id = save_frozen(self._directory, _standard_save(frozen))
    return self._frozen_id

  def _is_whole(self, step: int) -> bool:
    """Whether a checkpoint is whole, or will be when older ones are removed."""
    return step == self._saving or is_whole(self._directory / str(step))

  def _remove_unfinished(self):
    """Removes unfinished checkpoints and frozen weights, and checkpoints that are not kept."""
    for path in self._directory.glob(f"*{_UNFINISHED}*"):
      shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(self._directory / _REMOVED, ignore_errors=True)
    for path in self._directory.glob(f"{_PROBE}*"):
      path.unlink(missing_ok=True)

  def _probe(self):
    """Raises `OSError` if nothing can be written: Orbax would only give up after minutes."""
    with tempfile.NamedTemporaryFile(dir=self._directory, prefix=_PROBE) as probe:
      probe.write(b"whether there is room for anything")

  @contextlib.contextmanager
  def _report_write_errors(self) -> Iterator[None]:
    """Turns errors of the disk while a checkpoint is written into an `InputError` of one line."""
    try:
      yield
    except InputError:
      raise
    except (OSError, ValueError, RuntimeError) as error:
      if is_peer_failure(error):
        raise  # the disk is not the reason
      failed, newest = self._saving, self.newest_step
      self._remove_unfinished()  # if the disk is full, this makes room
      whole = "there is no whole one" if newest is None else f"the newest whole one is {newest}"
      raise InputError(
        f"{self._directory}: the checkpoint of step {failed} could not be written "
        f"({_reason(error)}); {whole}: make room or repair the directory, and run the same "
        "command again"
      ) from error


@contextlib.contextmanager
def _report_read_errors(checkpoint: Path) -> Iterator[None]:
  """Turns errors while a checkpoint is read into an `InputError` of one line."""
  try:
    yield
  except InputError:
    raise  # the checkpoint is whole, but belongs to another config
  except (OSError, ValueError, KeyError) as error:
    if is_peer_failure(error):
      raise
    raise InputError(
      f"{checkpoint}: the checkpoint cannot be read ({_reason(error)}); if it is damaged, move "
      "this directory away to continue from the one before"
    ) from error


def _by_path(tree) -> dict[str, Any]:
  """The leaves of a tree by their dotted paths, such as `optimizer.1.mu.decoder.norm.scale`."""
  return {dotted_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _frozen(arrays):
  return {path: array for path, array in arrays.items() if path.startswith(f"{FROZEN}.")}


def _standard_save(arrays):
  save_args = {
    path: _BY_LAYER if ".stacked." in path and array.ndim == 3 else _WHOLE
    for path, array in arrays.items()
  }
  return ocp.args.StandardSave(arrays, save_args)


def _reason(error):
  """The message of an error in one line; of tensorstore's long messages, only the system's part."""
  text = str(getattr(error, "strerror", None) or error).strip().split("\n")[0]
  system_text = re.search(r"([^:]+) \[os_error_code=", text)
  return system_text[1].strip() if system_text else text[:200]


def _is_not_repeated(record: logging.LogRecord) -> bool:
  """Returns False for errors that Orbax logs with a traceback before it raises them."""
  return not (record.exc_info and "orbax" in record.pathname)
