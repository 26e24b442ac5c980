"""Where the files of a training run are.

WORKDIR/hub                    config.json in the released layout, and the tokenizer
WORKDIR/checkpoints/frozen     weights that the run never changes, see `frozen_weights`
WORKDIR/checkpoints/500/state  all others, and optimizer; with the next two, a whole checkpoint
WORKDIR/checkpoints/500/data   state of the batches
WORKDIR/checkpoints/500/run    what wrote it
"""

from pathlib import Path

from videochat_flash_jax.errors import InputError

FROZEN = "frozen"  # beside the checkpoints; and how paths of what is in it begin
_ITEMS = ("state", "data", "run")


def is_whole(checkpoint: Path) -> bool:
  """Whether all items of a checkpoint are there.

  What is written appears at once; but of a checkpoint that was being removed parts may be left.
  """
  return all((checkpoint / item).is_dir() for item in _ITEMS)


def whole_steps(directory: Path) -> list[int]:
  """Steps of the whole checkpoints in a directory, in their order; none if it is missing."""
  if not directory.is_dir():
    return []
  numbered = [path for path in directory.iterdir() if path.name.isdecimal()]
  return sorted(int(path.name) for path in numbered if is_whole(path))


def is_run(directory: Path) -> bool:
  """Whether this is the WORKDIR of a run, or a checkpoint in it."""
  return (directory / "checkpoints").is_dir() or is_whole(directory)


def stages_in(directory: Path) -> list[str]:
  """Names of the runs in the WORKDIR of a config with stages, in their order; none elsewhere."""
  if not directory.is_dir():
    return []
  runs = [path for path in directory.iterdir() if (path / "checkpoints").is_dir()]
  return sorted(path.name for path in runs)


def refuse_stages(directory: Path) -> None:
  """Refuses the WORKDIR of a config with stages, each of which is a model of its own.

  Raises:
    InputError: names the last of the stages.
  """
  if not (directory / "config.json").exists() and (stages := stages_in(directory)):
    raise InputError(
      f"{directory}: no model, but the stages of a training; give one of them, such as "
      f"{directory / stages[-1]}"
    )


def hub_files(directory: Path) -> Path:
  """Where config.json and tokenizer of a checkpoint directory are: there, or in the run's `hub`.

  Raises:
    InputError: see `refuse_stages`.
  """
  refuse_stages(directory)
  if not is_run(directory):
    return directory
  return (directory.absolute().parents[1] if is_whole(directory) else directory) / "hub"
