"""Where the files of a training run are.

WORKDIR/hub                    config.json in the released layout, and the tokenizer
WORKDIR/checkpoints/frozen     weights that the run never changes; see `checkpoints.frozen_weights`
WORKDIR/checkpoints/500/state  all others, and optimizer; with the next two, a whole checkpoint
WORKDIR/checkpoints/500/data   state of the batches
WORKDIR/checkpoints/500/run    what wrote it
"""

from pathlib import Path

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


def hub_files(directory: Path) -> Path:
  """Where config.json and tokenizer of a checkpoint directory are: there, or in the run's `hub`."""
  if not is_run(directory):
    return directory
  return (directory.absolute().parents[1] if is_whole(directory) else directory) / "hub"
