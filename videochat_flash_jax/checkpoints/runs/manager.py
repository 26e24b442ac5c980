"""Checkpoints of a run, through Orbax: written beside the training, whole or not at all.

  DIRECTORY/frozen      weights that never change, once; see `checkpoints.runs.frozen_weights`
  DIRECTORY/500/state   all others, and optimizer, by their dotted paths: `trained.connector...`
  DIRECTORY/500/data    the state of the batches, of all processes (JSON)
  DIRECTORY/500/run     what wrote it: step, config, versions of this package and of JAX (JSON)

Each is written under another name and renamed when it is whole, so what breaks off never counts;
the next `RunCheckpoints` clears it away. The frozen weights are whole before the first checkpoint
is begun, so no checkpoint is ever without them.
"""

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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

_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of what is not whole yet
_PROBE = ".probe"
# Stacked matrices are cut into their layers, so that an export reads one without the others.
_WHOLE = ocp.SaveArgs(chunk_byte_size=32 * 2**20)
_BY_LAYER = ocp.SaveArgs(chunk_byte_size=32 * 2**20, shard_axes=(0,))


class Restored(NamedTuple):
  """What `RunCheckpoints.restore` gives."""

  step: int
  state: Any  # like the shapes that were asked for
  data: dict  # state of the batches, with the streams of all processes
  run: dict


class _Manager(ocp.CheckpointManager):
  """Orbax's, but for a question to JAX of which only one in a program may count the steps."""

  def reached_preemption(self, step: int) -> bool:
    """Never, here: `train.preemption` asks, and says when to save."""
    return False


class RunCheckpoints:
  """Saves and restores the checkpoints of a run; every process of the run has one."""

  def __init__(self, directory: Path, keep: int = 3, keep_every: int = 0):
    """Makes the directory if it is missing, and clears what earlier saves left unfinished.

    Args:
      directory: of all checkpoints of the run, seen by all processes.
      keep: so many of the newest stay.
      keep_every: steps that are a multiple of it stay, too; 0 for none.

    Raises:
      InputError: the directory cannot be written.
    """
    self._directory = directory.absolute()
    self._saving: int | None = None  # the step that is being written
    self._frozen_id: str | None = None  # of the frozen weights, once that is known
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._probe()
    except OSError as error:
      raise InputError(
        f"{directory}: checkpoints cannot be written there ({error.strerror}); "
        "give a directory that can be written, or make room"
      ) from error
    if jax.process_index() == 0:  # Orbax would do it beside the first save, of the same names
      self._clear()
    policy = ocp.checkpoint_managers
    kept = [policy.LatestN(keep), *([policy.EveryNSteps(keep_every)] if keep_every else [])]
    options = ocp.CheckpointManagerOptions(preservation_policy=policy.AnyPreservationPolicy(kept))
    logging.getLogger("absl").addFilter(_is_news)
    json_files = ocp.JsonCheckpointHandler
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": json_files(), "run": json_files()}
    self._manager = _Manager(self._directory, options=options, item_handlers=handlers)

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, *_):
    self.close()

  @property
  def newest_step(self) -> int | None:
    """The step of the newest whole checkpoint that this process sees on disk."""
    return max(whole_steps(self._directory), default=None)

  def save(self, step: int, state: Any, data_state: dict, run: dict):
    """Copies the state off the devices, and writes it while training goes on.

    Every process calls it, at the same step. If the step is saved already, nothing happens.

    Args:
      step: steps that have been done.
      state: a tree of arrays; those of several processes are global.
      data_state: of this process's batches, fit for JSON.
      run: what to know of the run, fit for JSON: its `config`; versions are added.

    Raises:
      InputError: this checkpoint, or the one before, could not be written.
    """
    self.wait()
    if step in self._manager.all_steps():
      if is_whole(self._directory / str(step)):
        return
      self._manager.delete(step)  # what is left of one that was being removed
    arrays = _by_path(state)
    frozen = _frozen(arrays)
    changing = {path: array for path, array in arrays.items() if path not in frozen}
    self._saving = step
    with self._told(), jax.transfer_guard("allow"):
      self._probe()
      written = {"step": step, "version": __version__, "jax": jax.__version__}
      if frozen:
        written[FROZEN] = self._id_of(frozen)
      args = ocp.args.Composite(
        state=_standard_save(changing),
        data=ocp.args.JsonSave(allgather_streams(data_state)),
        run=ocp.args.JsonSave(run | written),
      )
      self._manager.save(step, args=args, force=True)

  def check(self):
    """Finds out, without waiting, whether the last save has failed.

    Raises:
      InputError: as `wait`.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self):
    """Waits until what is being saved is on disk.

    Raises:
      InputError: it could not be written; names the step, and the newest that is whole.
    """
    try:
      with self._told():
        self._manager.wait_until_finished()
    finally:
      self._saving = None

  def restore(
    self, shapes: Any, check_run: Callable[[Path, Mapping[str, Any]], None] | None = None
  ) -> Restored | None:
    """Reads the newest whole checkpoint, on any mesh and any number of processes.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct` with shardings, as the state that was saved.
      check_run: called with the checkpoint and what `save` wrote of its run; it may refuse it.

    Returns:
      None if there is no checkpoint.

    Raises:
      InputError: the checkpoint is of another config, and names the first field or array that
        differs; or its files are damaged.
    """
    self.wait()
    step = newest_on_all_processes(self._directory)
    if step is None:
      return None
    where, wanted = self._directory / str(step), _by_path(shapes)
    with _told_as_damaged(where):
      read = {name: ocp.args.JsonRestore() for name in ("data", "run")}
      saved = self._manager.restore(step, args=ocp.args.Composite(**read))
      if check_run is not None:
        check_run(where, saved["run"])
      held = dict(self._manager.item_metadata(step)["state"])
      beside = find_frozen(where, saved["run"])
      check_arrays(where, held | (frozen_shapes(beside) if beside else {}), wanted)
      args = ocp.args.StandardRestore({path: wanted[path] for path in held})
      arrays = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
      if beside:
        arrays |= restore_frozen(beside, _frozen(wanted))
    state = jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in wanted])
    return Restored(step, state, saved["data"], saved["run"])

  def close(self):
    """Waits until all is written, and ends the threads that write.

    Raises:
      InputError: as `wait`.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def _id_of(self, frozen: dict[str, Any]) -> str:
    """The id of the frozen weights, which are written if no checkpoint needs them yet."""
    if self._frozen_id is None:
      newest = newest_on_all_processes(self._directory)
      if newest is not None:
        saved = ocp.JsonCheckpointHandler().restore(self._directory / str(newest) / "run")
        self._frozen_id = saved.get(FROZEN)
    if self._frozen_id is None:
      self._frozen_id = save_frozen(self._directory, _standard_save(frozen))
    return self._frozen_id

  def _clear(self):
    """Removes what is not whole: checkpoints, or frozen weights."""
    for path in self._directory.glob(f"*{_UNFINISHED}*"):
      shutil.rmtree(path, ignore_errors=True)
    for path in self._directory.glob(f"{_PROBE}*"):
      path.unlink(missing_ok=True)

  def _probe(self):
    """Raises `OSError` where nothing can be written: Orbax would take minutes to give up."""
    with tempfile.NamedTemporaryFile(dir=self._directory, prefix=_PROBE) as probe:
      probe.write(b"whether there is room for anything")

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """Makes one line of what goes wrong with the disk while a checkpoint is written."""
    try:
      yield
    except InputError:
      raise
    except (OSError, ValueError, RuntimeError) as error:
      if is_peer_failure(error):
        raise  # there is nothing wrong with the disk
      failed, newest = self._saving, self.newest_step
      self._clear()  # a full disk has better uses for its room
      whole = "there is no whole one" if newest is None else f"the newest whole one is {newest}"
      raise InputError(
        f"{self._directory}: the checkpoint of step {failed} could not be written "
        f"({_reason(error)}); {whole}: make room or mend the directory, and give the same "
        "command again"
      ) from error


@contextlib.contextmanager
def _told_as_damaged(checkpoint: Path) -> Iterator[None]:
  """Makes one line of what goes wrong while a checkpoint is read."""
  try:
    yield
  except InputError:
    raise  # of another config, but whole
  except (OSError, ValueError, KeyError) as error:
    if is_peer_failure(error):
      raise
    raise InputError(
      f"{checkpoint}: the checkpoint cannot be read ({_reason(error)}); if it is damaged, move "
      "this directory away to go on from the one before"
    ) from error


def _by_path(tree) -> dict[str, Any]:
  """Leaves of a tree by their dotted paths: `optimizer.1.mu.decoder.norm.scale`."""
  return {dotted_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _frozen(arrays):
  return {path: array for path, array in arrays.items() if path.startswith(f"{FROZEN}.")}


def _standard_save(arrays):
  cuts = {
    path: _BY_LAYER if ".stacked." in path and array.ndim == 3 else _WHOLE
    for path, array in arrays.items()
  }
  return ocp.args.StandardSave(arrays, cuts)


def _reason(error):
  """What an error says, in one line; of tensorstore's long ones, what the system said."""
  text = str(getattr(error, "strerror", None) or error).strip().split("\n")[0]
  of_system = re.search(r"([^:]+) \[os_error_code=", text)
  return of_system[1].strip() if of_system else text[:200]


def _is_news(record: logging.LogRecord) -> bool:
  """Orbax logs errors with their whole trace before it raises them; the latter is enough."""
  return not (record.exc_info and "orbax" in record.pathname)
