"""The directory of a run: it is checked and prepared before anything is computed.

  config.json    the run's config and the version of the package
  hub/           what an export needs beside weights: config.json as on the hub, tokenizer and so on
  checkpoints/   see `checkpoints.runs.manager`

All processes of a run use the same directory.
"""

import contextlib
import hashlib
import json
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.hub.hf_config import write_config
from videochat_flash_jax.checkpoints.runs.run_files import stages_in, whole_steps
from videochat_flash_jax.data.text.tokenizer import train_sentencepiece
from videochat_flash_jax.errors import InputError, is_unicode
from videochat_flash_jax.fields import OnResume
from videochat_flash_jax.parallel.agreement import allgather_text, raise_on_all_processes
from videochat_flash_jax.synthetic.training import vocabulary_lines
from videochat_flash_jax.train.config import Change, config_changes
from videochat_flash_jax.train.initial_weights import RANDOM, copy_hub_files
from videochat_flash_jax.train.objectives import OBJECTIVES
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainState

_log = logging.getLogger("videochat_flash_jax")
_SHARED = (
  "a directory on a file system that all hosts see, such as Filestore, or a bucket with "
  "hierarchical namespace, mounted with Cloud Storage FUSE"
)


def check_writable(workdir: Path):
  """Makes the directory if it is missing, and tries to write a file there.

  Raises:
    InputError: the directory cannot be written, its path is not valid UTF-8, or it is the address
      of a bucket.
  """
  if address := re.match(r"([a-z][a-z0-9]+):/+(.*)", str(workdir)):
    raise InputError(f"--workdir {address[1]}://{address[2]} is not a directory: give {_SHARED}")
  if not is_unicode(str(workdir.absolute())):
    raise InputError(
      f"--workdir {workdir.absolute()}: checkpoints cannot be written where the name of a folder "
      "is not valid UTF-8; give another directory"
    )
  with _writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".probe"):
      pass


def check_shared(workdir: Path, configs: Sequence[Mapping[str, Any]]):
  """Checks that all processes of a run have the same directory and the same config.

  Every process must call this function.

  Args:
    workdir: the directory; it can be written.
    configs: the configs of all stages, as JSON.

  Raises:
    InputError: a process has another config, or does not see a file that process 0 writes.
  """
  if jax.process_count() == 1:
    return
  digests = allgather_text(hashlib.blake2b(json.dumps(configs).encode()).hexdigest())
  for number, digest in enumerate(digests):
    if digest != digests[0]:
      raise InputError(
        f"process {number} has another config than process 0: give the same --config with the "
        "same changes on all hosts"
      )
  token = workdir / f".seen_by_all_{allgather_text(secrets.token_hex(8))[0]}"
  is_first = jax.process_index() == 0
  try:
    with raise_on_all_processes(), _writing(workdir):
      if is_first:
        token.touch()
    with raise_on_all_processes():
      if not token.exists():
        raise InputError(
          f"--workdir {workdir}: a file that process 0 writes there is not visible here: "
          f"give {_SHARED}"
        )
  finally:
    if is_first:
      token.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
  """Turns errors of the file system into an `InputError` that names the directory."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f"--workdir {workdir}: cannot be written ({error.strerror}); give another directory"
    ) from error


def check_config(workdir: Path, config: Mapping[str, Any]):
  """Checks that a directory can be used for a run with this config.

  A directory that holds no checkpoint yet can be used with any config: nothing would be lost.

  Args:
    workdir: the directory; it may be missing.
    config: the config of the run, as JSON.

  Raises:
    InputError: the directory holds a model, or a run whose config differs in a field that may not
      change; names the first such field.
  """
  if stages := stages_in(workdir):
    raise InputError(f"--workdir {workdir} holds the runs {', '.join(stages)}; give another one")
  begun = is_begun(workdir)
  if not begun and not (workdir / "config.json").exists():
    return
  changes = _changes(workdir, config)  # raises if this is not the directory of a run
  for change in changes if begun else ():
    is_free = change.on_resume == OnResume.MAY_CHANGE
    if not is_free or change.path in OBJECTIVES[config["objective"]].batch_fields:
      raise InputError(
        f"{workdir} holds a run with config.{change.path} {change.before!r:.80}, now it is "
        f"{change.now!r:.80}; give {change.before!r:.80}, or another --workdir"
      )


def _changes(workdir, config) -> list[Change]:
  """The fields whose values in the directory's config.json differ from those of `config`."""
  path = workdir / "config.json"
  try:
    saved = json.loads(path.read_text())["config"]
    return config_changes(saved, config)
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(
      f"{path}: not written by a run of this package, or damaged; give another --workdir"
    ) from error


def check_checkpoint(config: Mapping[str, Any], where: Path, saved: Mapping[str, Any]):
  """Checks that the arrays of a checkpoint mean the same in this run.

  Args:
    config: the config of this run, as JSON.
    where: the checkpoint, for messages.
    saved: what the checkpoint says about the run that wrote it, with its `config`.

  Raises:
    InputError: names the first field that differs.
  """
  for change in config_changes(saved.get("config", {}), config):
    if change.on_resume == OnResume.FIXED_BY_WEIGHTS:
      raise InputError(
        f"{where}: this checkpoint was trained with config.{change.path} {change.before!r:.80}, "
        f"now it is {change.now!r:.80}; give {change.before!r:.80}, or another --workdir"
      )


def is_begun(workdir: Path) -> bool:
  """Whether the directory holds a checkpoint from which the run can continue."""
  return bool(whole_steps(workdir / "checkpoints"))


def warn_of_room(workdir: Path, state: TrainState, keep: int):
  """Logs a warning if the checkpoints of a run will not fit on the disk.

  There is one checkpoint more than are kept, until the oldest one is removed. Compression is not
  counted.

  Args:
    workdir: the directory of the run; it exists.
    state: the state of the run, or its shapes.
    keep: how many of the newest checkpoints are kept.
  """
  there = len(whole_steps(workdir / "checkpoints"))
  frozen = 0 if there else _num_bytes(state.frozen)
  changing = _num_bytes((state.trained, state.optimizer))
  wanted, free = frozen + max(keep + 1 - there, 1) * changing, shutil.disk_usage(workdir).free
  if free < wanted and jax.process_index() == 0:
    _log.warning(
      "%s: the checkpoints of this run take up to %.2f GiB more, but only %.2f GiB are free: make "
      "room, or lower config.checkpoint.keep, or a save will fail",
      *(workdir, wanted / 2**30, free / 2**30),
    )


def _num_bytes(arrays):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def prepare(workdir: Path, settings: TrainSettings, config: Mapping[str, Any]):
  """Writes the config of a run, and for a new run the files that belong to its weights.

  Every process must call this function; process 0 writes. If a run continues, the fields of its
  config that have changed are logged.

  Raises:
    InputError: `init_from` is not a model, or lacks a part; or the directory cannot be written.
  """
  with raise_on_all_processes():
    if jax.process_index() == 0:
      with _writing(workdir):
        if is_begun(workdir):
          for change in _changes(workdir, config):
            _log.info("config.%s was %r, now %r", change.path, change.before, change.now)
        else:
          write_hub(workdir / "hub", settings)
        _write_config(workdir, config)


def write_hub(hub: Path, settings: TrainSettings):
  """Writes the tokenizer of a run and the config.json of its model into the directory `hub`.

  Raises:
    InputError: `init_from` is not a model, or lacks a part.
  """
  shutil.rmtree(
    hub, ignore_errors=True
  )  # files of an earlier attempt, which may have had another model
  if settings.init_from != RANDOM:
    copy_hub_files(settings.init_from, settings.model, hub)
    return
  hub.mkdir(exist_ok=True)
  vocabulary = settings.model.decoder.vocab_size
  train_sentencepiece(vocabulary_lines(), hub / "tokenizer.model", vocabulary)
  write_config(settings.model, hub, dtype="float32")


def _write_config(workdir, config):
  partial = workdir / "config.json.partial"
  partial.write_text(json.dumps({"version": __version__, "config": config}, indent=1) + "\n")
  partial.replace(workdir / "config.json")
