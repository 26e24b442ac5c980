"""The directory of a run: what has to be there, and be right, before anything is computed.

  config.json    the run's config and the version of the package
  hub/           what an export needs beside weights: config.json as on the hub, and the tokenizer
  checkpoints/   see `checkpoints.manager`

All processes of a run see the same directory.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from videochat_flash_jax import __version__
from videochat_flash_jax.checkpoints.hf_config import write_config
from videochat_flash_jax.checkpoints.run_files import whole_steps
from videochat_flash_jax.data.synthetic_training import vocabulary_lines
from videochat_flash_jax.data.tokenizer import train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.initial_weights import RANDOM, copy_hub_files
from videochat_flash_jax.train.settings import TrainSettings

# Fields that may be others when a run goes on, since its numbers do not depend on them; but for
# `mesh.sequence`, by which rows are packed: the state of the batches refuses another one.
_FREE = (
  "checkpoint", "data.max_broken_share", "data.workers", "eval", "heartbeat_seconds", "log_every",
  "mesh", "profile", "remat", "sequence_parallel",
)  # fmt: skip


def check_writable(workdir: Path):
  """Makes the directory, if need be, and writes something into it.

  Raises:
    InputError: that fails.
  """
  with _told(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=workdir, prefix=".probe"):
      pass


@contextlib.contextmanager
def _told(workdir: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise InputError(
      f"--workdir {workdir}: cannot be written ({error.strerror}); give another directory"
    ) from error


def check_config(workdir: Path, config: Mapping[str, Any]):
  """Refuses the directory of a run with another config.

  Without a checkpoint nothing is lost, whatever was tried there before.

  Args:
    workdir: of the run; nothing need be there.
    config: as JSON has it.

  Raises:
    InputError: names the first field that differs.
  """
  if not is_begun(workdir):
    return
  path = workdir / "config.json"
  try:
    saved = json.loads(path.read_text())["config"]
    differences = list(_differences("", saved, dict(config)))
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(
      f"{path}: not of a run of this package, or damaged; give another --workdir"
    ) from error
  for field, before, now in differences:
    if not any(field == free or field.startswith(f"{free}.") for free in _FREE):
      raise InputError(
        f"{workdir} holds a run with config.{field} {before!r}, now it is {now!r}; "
        f"give {before!r}, or another --workdir"
      )


def is_begun(workdir: Path) -> bool:
  """Whether there is a checkpoint to go on from."""
  return bool(whole_steps(workdir / "checkpoints"))


def prepare(workdir: Path, settings: TrainSettings, config: Mapping[str, Any]):
  """Writes the config of a run, and the files that go with its weights, if it is a new one.

  Raises:
    InputError: `init_from` is no model, or lacks a part; or nothing can be written.
  """
  if jax.process_index() == 0 and not is_begun(workdir):
    with _told(workdir):
      _write(workdir, settings, config)
  multihost_utils.sync_global_devices("workdir")


def _write(workdir, settings, config):
  hub = workdir / "hub"
  if settings.init_from == RANDOM:
    hub.mkdir(exist_ok=True)
    vocabulary = settings.model.decoder.vocab_size
    train_sentencepiece(vocabulary_lines(), hub / "tokenizer.model", vocabulary)
    write_config(settings.model, hub, dtype="float32")
  else:
    copy_hub_files(settings.init_from, settings.model, hub)
  partial = workdir / "config.json.partial"
  partial.write_text(json.dumps({"version": __version__, "config": config}, indent=1) + "\n")
  partial.replace(workdir / "config.json")


def _differences(field, before, now) -> Iterator[tuple[str, Any, Any]]:
  if isinstance(before, dict) and isinstance(now, dict):
    for name in [*now, *(name for name in before if name not in now)]:
      path = f"{field}.{name}" if field else name
      yield from _differences(path, before.get(name), now.get(name))
  elif before != now:
    yield field, before, now
