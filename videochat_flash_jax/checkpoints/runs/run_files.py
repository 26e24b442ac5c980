"""Knows where the files of a training run are.

WORKDIR/hub                    config.json in the released format, the tokenizer and so on
WORKDIR/checkpoints/frozen     weights that the run never changes; see `frozen_weights`
WORKDIR/checkpoints/500/state  all other weights, and the state of the optimizer
WORKDIR/checkpoints/500/data   state of the batches
WORKDIR/checkpoints/500/run    which run wrote the checkpoint: step, config and versions

A checkpoint is called whole if all three of `state`, `data` and `run` are complete.
"""

from pathlib import Path

from videochat_flash_jax.errors import InputError

FROZEN = "frozen"  # name of that directory, and first part of the paths of the arrays in it
# The file of each item without which it cannot be read.
_FILES = ("state/manifest.ocdbt", "data/metadata", "run/metadata")


def is_whole(checkpoint: Path) -> bool:
  """Returns whether a checkpoint has all of its items.

  A new checkpoint appears with all items at once, and vanishes at once. But copying one may have
  been interrupted, and earlier versions of this package could be killed while they removed one.
  """
  return all((checkpoint / file).is_file() for file in _FILES)


def whole_steps(directory: Path) -> list[int]:
  """Returns the steps of the whole checkpoints in a directory, rising; [] if it is missing."""
  if not directory.is_dir():
    return []
  numbered = [path for path in directory.iterdir() if path.name.isdecimal()]
  return sorted(int(path.name) for path in numbered if is_whole(path))


def is_run(directory: Path) -> bool:
  """Returns whether a directory is the WORKDIR of a run, or a checkpoint in it."""
  return (directory / "checkpoints").is_dir() or is_whole(directory)


def stages_in(directory: Path) -> list[str]:
  """Returns the names of the runs (one for each stage) in the WORKDIR of a config with stages.

  They are in order of the stages. Other directories give [].
  """
  if not directory.is_dir():
    return []
  runs = [path for path in directory.iterdir() if (path / "checkpoints").is_dir()]
  return sorted(path.name for path in runs)


def refuse_stages(directory: Path) -> None:
  """Raises an error for the WORKDIR of a config with stages: each stage is a model of its own.

  Raises:
    InputError: it is such a directory. The message suggests its last stage.
  """
  if not (directory / "config.json").exists() and (stages := stages_in(directory)):
    raise InputError(
      f"{directory}: not a model, but the directory of several training stages; give one of them, "
      f"such as {directory / stages[-1]}"
    )


def hub_files(directory: Path) -> Path:
  """Returns the directory with the config.json and the tokenizer of a checkpoint directory.

  For a training run that is WORKDIR/hub, for other checkpoints the directory itself.

  Raises:
    InputError: see `refuse_stages`.
  """
  refuse_stages(directory)
  if not is_run(directory):
    return directory
  return (directory.absolute().parents[1] if is_whole(directory) else directory) / "hub"
