"""Opens, loads and writes checkpoints; writing always gives the released format.

Loading is strict: each stored weight is used exactly once, and each array of the model is filled.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.checkpoints.hub.checkpoint import (
  Checkpoint,
  with_head,
  without_computed,
)
from videochat_flash_jax.checkpoints.hub.hf_config import (
  parse_config,
  read_fields,
  stated_dtype,
  write_config,
)
from videochat_flash_jax.checkpoints.hub.hf_mapping import hub_tensors
from videochat_flash_jax.checkpoints.hub.other_files import FULL_DISK, copy_other_files
from videochat_flash_jax.checkpoints.hub.safetensors_files import (
  FLOATING,
  read_directory,
  write_directory,
)
from videochat_flash_jax.checkpoints.hub.weights import (
  ShardingOf,
  check_tensors,
  hub_arrays,
  load_weights,
)
from videochat_flash_jax.checkpoints.runs.run_files import is_run, refuse_stages
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.parallel.sharding import dotted_path

# Builds a model from a config. It is only traced here, so it costs no memory.
MakeModel = Callable[[VideoChatFlashConfig], nnx.Module]


def open_checkpoint(directory: Path) -> Checkpoint:
  """Opens a checkpoint without reading its weights.

  Args:
    directory: a directory with `config.json` and either `model.safetensors` or shards with their
      index; or the WORKDIR of a training run, for its newest checkpoint; or one of the directories
      in WORKDIR/checkpoints.

  Raises:
    InputError: a file is missing or broken, or describes a model that this package does not have.
  """
  refuse_stages(directory)
  if is_run(directory):
    from videochat_flash_jax.checkpoints.runs.orbax_files import open_run  # Orbax is slow to import

    return open_run(directory)
  fields = read_fields(directory)
  config = parse_config(directory, fields)
  tensors = without_computed(directory, read_directory(directory))
  return Checkpoint(str(directory), directory, with_head(config, tensors), fields, tensors)


def load_model(
  make_model: MakeModel,
  directory: Path,
  dtype: np.dtype = np.float32,
  sharding_of: ShardingOf = lambda path, shape: None,
) -> nnx.Module:
  """Builds the model that a checkpoint directory describes, and loads its weights.

  Args:
    make_model: builds a model from a config.
    directory: see `open_checkpoint`.
    dtype: dtype of the weights in memory.
    sharding_of: returns the sharding of an array, given its path and shape. A path looks like
      `decoder.layers.stacked.q_proj.kernel`.

  Raises:
    InputError: something is wrong with the directory. All tensors that do not fit are named in one
      message.
  """
  checkpoint = open_checkpoint(directory)
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(checkpoint.config)))
  shapes = {path: leaf.shape for path, leaf in flat_weights(state)}
  weights = load_weights(checkpoint.where, checkpoint.tensors, shapes, dtype, sharding_of)
  filled = [
    (path, leaf.replace(weights.pop(dotted_path(path)))) for path, leaf in nnx.to_flat_state(state)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def save_model(
  model: nnx.Module,
  config: VideoChatFlashConfig,
  directory: Path,
  *,
  source: Path | None = None,
) -> None:
  """Writes a checkpoint directory in the released format; weights keep their dtype.

  If the directory already holds a checkpoint, its weights and config are replaced after everything
  new has been written.

  Args:
    model: the model whose parameters are written.
    config: the config of the model.
    directory: the directory to write. It is created if it is missing; other files in it are kept.
    source: the checkpoint from which the model was made. Its other files are copied, see
      `hub.other_files`, and so are the fields of its config.json that have no meaning here.

  Raises:
    InputError: the directory cannot be written or the disk is full (then the directory is
      unchanged), or a weight holds NaN or infinity.
  """
  weights = dict(flat_weights(nnx.state(model, nnx.Param)))
  dtype = str(next(iter(weights.values())).dtype)
  with _staged(directory) as partial:
    write_directory(partial, "the model", hub_arrays(weights))
    write_config(config, partial, dtype=dtype, base=source and read_fields(source))
    if source is not None:
      copy_other_files(source, partial)


def write_checkpoint(
  checkpoint: Checkpoint, make_model: MakeModel, out: Path, dtype: str | None = None
) -> int:
  """Writes a checkpoint to a new directory in the released format, tensor by tensor.

  All tensors are checked while they are copied.

  Args:
    checkpoint: the checkpoint to copy.
    make_model: builds a model from a config.
    out: a directory that does not exist yet. It appears only when all of it has been written.
    dtype: dtype to write, such as `bfloat16`; by default each tensor keeps its own.

  Returns:
    Number of bytes of all tensors.

  Raises:
    InputError: the tensors do not fit the config, a tensor holds NaN or infinity, or `out` exists,
      is inside the checkpoint, or cannot be written.
  """
  if dtype not in (None, *map(str, FLOATING.values())):
    raise InputError(f"dtype is {dtype!r}; give one of {', '.join(map(str, FLOATING.values()))}")
  if os.path.lexists(out):
    raise InputError(f"{out}: exists already; give another directory, or remove it first")
  if out.resolve().is_relative_to(checkpoint.directory.resolve()):
    raise InputError(f"{out}: inside the checkpoint {checkpoint.directory}; give another directory")
  state = nnx.state(nnx.eval_shape(lambda: make_model(checkpoint.config)))
  shapes = {path: leaf.shape for path, leaf in flat_weights(state)}
  tensors = hub_tensors(shapes, checkpoint.tensors)
  check_tensors(checkpoint.where, checkpoint.tensors, tensors)
  stored = {name: checkpoint.tensors[name] for name in tensors}
  first = str(FLOATING[next(iter(stored.values())).dtype])
  stated = stated_dtype(checkpoint.directory / "config.json", checkpoint.fields)
  with _staged(out) as partial:
    num_bytes = write_directory(partial, checkpoint.where, stored, dtype and jnp.dtype(dtype))
    write_config(checkpoint.config, partial, dtype=dtype or stated or first, base=checkpoint.fields)
    copy_other_files(checkpoint.directory, partial)
  return num_bytes


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[Path]:
  """Gives a temporary directory, and moves its files to `directory` if no error occurs."""
  directory = directory.resolve()
  partial = directory.parent / f".{directory.name}.partial"
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
  except OSError as error:
    raise _unwritable(directory, error) from error
  try:
    yield partial
    if directory.exists():
      _replace_files(partial, directory)
    else:
      partial.rename(directory)
  except OSError as error:
    if error.errno in FULL_DISK:
      raise _unwritable(directory, error) from error
    raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _unwritable(directory, error):
  return InputError(
    f"{directory}: cannot be written ({error.strerror}); nothing has changed there: make room, "
    "or give another directory"
  )


def _replace_files(partial, directory):
  """Moves files into a directory, over files of the same name.

  Old weight files with other names are removed, because they would be read together with the new.
  """
  new = {path.relative_to(partial) for path in partial.rglob("*") if path.is_file()}
  for path in new:
    (directory / path).parent.mkdir(exist_ok=True)
    (partial / path).replace(directory / path)
  for path in directory.glob("model*.safetensors*"):
    if path.relative_to(directory) not in new:
      path.unlink()


def flat_weights(state: nnx.State) -> list[tuple[str, jax.Array]]:
  """Returns the arrays of a model with their paths, such as `decoder.norm.scale`."""
  return [(dotted_path(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
