"""Checkpoints of a run, through Orbax: written beside the training, whole or not at all.

  DIRECTORY/500/state   weights and optimizer, arrays by their dotted paths: `trained.connector...`
  DIRECTORY/500/data    the state of the batches, of all processes (JSON)
  DIRECTORY/500/run     what wrote it: step, config, versions of this package and of JAX (JSON)

A checkpoint is written under another name and renamed when it is whole, so what breaks off never
counts; the next `RunCheckpoints` clears it away.
"""

import contextlib
import functools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.run_files import is_whole, whole_steps
from videochat_flash_jax.errors import InputError

_log = logging.getLogger("videochat_flash_jax")
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of what is not whole yet
# Stacked matrices are cut into their layers, so that an export reads one without the others.
_WHOLE = ocp.SaveArgs(chunk_byte_size=32 * 2**20)
_BY_LAYER = ocp.SaveArgs(chunk_byte_size=32 * 2**20, shard_axes=(0,))
# Fields of a config without which what is saved means something else; more than their shapes tell.
_BINDING = ("objective", "model", "lora", "optimizer.name", "optimizer.scales")


class Restored(NamedTuple):
  """What `RunCheckpoints.restore` gives."""

  step: int
  state: Any  # like the shapes that were asked for
  data: dict  # state of the batches, with the streams of all processes
  run: dict


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
    self._directory, self._saving = directory.absolute(), None
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._probe()
    except OSError as error:
      raise InputError(
        f"{directory}: checkpoints cannot be written there ({error.strerror}); "
        "give a directory that can be written, or make room"
      ) from error
    policy = ocp.checkpoint_managers
    kept = [policy.LatestN(keep), *([policy.EveryNSteps(keep_every)] if keep_every else [])]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
    )
    logging.getLogger("absl").addFilter(_is_news)
    json_files = ocp.JsonCheckpointHandler
    handlers = {"state": ocp.StandardCheckpointHandler(), "data": json_files(), "run": json_files()}
    self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, *_):
    self.close()

  @property
  def newest_step(self) -> int | None:
    """The step of the newest whole checkpoint on disk."""
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
    versions = {"step": step, "version": __version__, "jax": jax.__version__}
    arrays = _by_path(state)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(arrays, _cuts(arrays)),
      data=ocp.args.JsonSave(_of_all_processes(data_state)),
      run=ocp.args.JsonSave(run | versions),
    )
    self._saving = step
    with self._told(), jax.transfer_guard("allow"):
      self._probe()
      self._manager.save(step, args=args, force=True)

  def wait(self):
    """Waits until what is being saved is on disk.

    Raises:
      InputError: it could not be written; names the step, and the newest that is whole.
    """
    with self._told():
      self._manager.wait_until_finished()
    self._saving = None

  def restore(self, shapes: Any, run: dict | None = None) -> Restored | None:
    """Reads the newest whole checkpoint, on any mesh and any number of processes.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct` with shardings, as the state that was saved.
      run: of this run, to be compared with that of the checkpoint.

    Returns:
      None if there is no checkpoint.

    Raises:
      InputError: the checkpoint is of another config, and names the first field or array that
        differs; or its files are damaged.
    """
    self.wait()
    step = self.newest_step
    if step is None:
      return None
    where, items = self._directory / str(step), ocp.args.Composite
    wanted = _by_path(shapes)
    try:
      read = {name: ocp.args.JsonRestore() for name in ("data", "run")}
      saved = self._manager.restore(step, args=items(**read))
      if run is not None:
        _check_config(where, saved["run"].get("config"), run.get("config"))
      _check_arrays(where, dict(self._manager.item_metadata(step)["state"]), wanted)
      arrays = self._manager.restore(step, args=items(state=ocp.args.StandardRestore(wanted)))[
        "state"
      ]
    except InputError:
      raise  # of another config, but whole
    except (OSError, ValueError, KeyError) as error:
      raise InputError(
        f"{where}: the checkpoint cannot be read ({_reason(error)}); if it is damaged, move this "
        "directory away to go on from the one before"
      ) from error
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

  def _probe(self):
    """Raises `OSError` where nothing can be written: Orbax would take minutes to give up."""
    with tempfile.NamedTemporaryFile(dir=self._directory, prefix=".probe") as probe:
      probe.write(b"whether there is room for anything")

  @contextlib.contextmanager
  def _told(self) -> Iterator[None]:
    """Makes one line of what goes wrong with the disk while a checkpoint is written."""
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      failed, newest = self._saving, self.newest_step
      for path in self._directory.glob(f"{failed}{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)  # a full disk has better uses for its room
      whole = "there is no whole one" if newest is None else f"the newest whole one is {newest}"
      raise InputError(
        f"{self._directory}: the checkpoint of step {failed} could not be written "
        f"({_reason(error)}); {whole}: make room or mend the directory, and give the same "
        "command again"
      ) from error


def _by_path(tree) -> dict[str, Any]:
  """Leaves of a tree by their dotted paths: `optimizer.1.mu.decoder.norm.scale`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _cuts(arrays):
  return {
    path: _BY_LAYER if ".stacked." in path and array.ndim == 3 else _WHOLE
    for path, array in arrays.items()
  }


def _of_all_processes(state: dict) -> dict:
  """A state of batches with the `streams` of all processes, each of which calls this with its own.

  Any process, of any number of them, finds those that it reads under their names.
  """
  if jax.process_count() == 1:
    return state
  text = np.frombuffer(json.dumps(state).encode(), np.uint8)
  with jax.transfer_guard("allow"):
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, max(lengths) - len(text)))
    texts = multihost_utils.process_allgather(padded)
  states = [json.loads(bytes(text[:size])) for text, size in zip(texts, lengths, strict=True)]
  streams = [one["streams"] for one in states if "streams" in one]
  return states[0] | ({"streams": functools.reduce(dict.__or__, streams)} if streams else {})


def _check_config(where, saved, now):
  for name in _BINDING:
    before, after = (_field(config, name) for config in (saved, now))
    for path, old, new in _differences(f"config.{name}", before, after):
      raise InputError(
        f"{where}: this checkpoint was trained with {path} {old!r}, now it is {new!r}; "
        f"give {old!r}, or another --workdir"
      )


def _field(config, name):
  for part in name.split("."):
    config = (config or {}).get(part)
  return config


def _differences(path, before, after):
  """Paths of all that differs, with both values, as JSON has them."""
  if isinstance(before, dict) and isinstance(after, dict):
    for name in before | after:
      yield from _differences(f"{path}.{name}", before.get(name), after.get(name))
  elif json.dumps(before) != json.dumps(after):
    yield path, before, after


def _check_arrays(where, saved, wanted):
  for path in wanted | saved:
    held, asked = (
      f"{list(arrays[path].shape)}" if path in arrays else "none" for arrays in (saved, wanted)
    )
    if held != asked:
      raise InputError(
        f"{where}: a checkpoint of another config: of {path} it holds {held}, and this config "
        f"asks for {asked}; give the config that it was trained with, or another --workdir"
      )


def _reason(error):
  """What an error says, in one line; of tensorstore's long ones, what the system said."""
  text = str(getattr(error, "strerror", None) or error).strip().split("\n")[0]
  of_system = re.search(r"([^:]+) \[os_error_code=", text)
  return of_system[1].strip() if of_system else text[:200]


def _is_news(record: logging.LogRecord) -> bool:
  """Orbax logs errors with their whole trace before it raises them; the latter is enough."""
  return not (record.exc_info and "orbax" in record.pathname)
