"""Checkpoint directories in the released layout, in and out: strict, nothing left over."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint, with_head
from videochat_flash_jax.checkpoints.hub.hf_config import parse_config, read_fields, write_config
from videochat_flash_jax.checkpoints.hub.hf_mapping import hub_tensors
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

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What goes along with the weights, as it is: the tokenizer, and the original's code if it is there.
_COPIED = (
  "added_tokens.json",
  "generation_config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
  "*.py",
)


def open_checkpoint(directory: Path) -> Checkpoint:
  """Opens a directory with `config.json` and `model.safetensors`, or shards and their index.

  Or a training run: its WORKDIR, for the newest checkpoint, or one of WORKDIR/checkpoints.

  Raises:
    InputError: a file is missing, broken, or describes a model that this package does not have.
  """
  refuse_stages(directory)
  if is_run(directory):
    from videochat_flash_jax.checkpoints.runs.orbax_files import open_run  # Orbax is slow to import

    return open_run(directory)
  fields = read_fields(directory)
  config = parse_config(directory, fields)
  tensors = read_directory(directory)
  return Checkpoint(str(directory), directory, with_head(config, tensors), fields, tensors)


def load_model(
  make_model: MakeModel,
  directory: Path,
  dtype: np.dtype = np.float32,
  sharding_of: ShardingOf = lambda path, shape: None,
) -> nnx.Module:
  """Builds the model that a checkpoint directory describes, with its weights.

  Args:
    make_model: builds a model from a config.
    directory: see `open_checkpoint`.
    dtype: of the weights in memory.
    sharding_of: where the array of a path and shape goes; paths are such as
      `decoder.layers.stacked.q_proj.kernel`.

  Raises:
    InputError: what is wrong with the directory, all of it at once.
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
  """Writes a checkpoint directory in the released layout; weights keep their dtype.

  Weights and config of an earlier checkpoint are replaced once all is written.

  Args:
    model: its parameters are written.
    config: of the model.
    directory: made if it is missing; other files in it stay.
    source: the checkpoint that the model was made of: its tokenizer is copied, and the fields of
      its config.json that mean nothing here survive.

  Raises:
    InputError: the directory cannot be written or the disk is full, and it is as it was; or a
      weight holds NaN or infinity.
  """
  weights = dict(flat_weights(nnx.state(model, nnx.Param)))
  dtype = str(next(iter(weights.values())).dtype)
  with _staged(directory) as partial:
    write_directory(partial, "the model", hub_arrays(weights))
    write_config(config, partial, dtype=dtype, base=source and read_fields(source))
    if source is not None:
      copy_beside(source, partial)


def write_checkpoint(
  checkpoint: Checkpoint, make_model: MakeModel, out: Path, dtype: str | None = None
) -> int:
  """Writes a checkpoint anew, tensor by tensor: in the released layout, and checked on the way.

  Args:
    checkpoint: what to write.
    make_model: builds a model from a config.
    out: a directory that does not exist yet; it appears whole or not at all.
    dtype: `bfloat16` and so on; by default every tensor stays as it is.

  Returns:
    Bytes of all tensors.

  Raises:
    InputError: the tensors do not fit the config, one holds NaN or infinity, or `out` exists, is
      inside the checkpoint, or cannot be written.
  """
  if os.path.lexists(out):
    raise InputError(f"{out}: exists already; give another directory, or remove it first")
  if out.resolve().is_relative_to(checkpoint.directory.resolve()):
    raise InputError(f"{out}: inside the checkpoint {checkpoint.directory}; give another place")
  state = nnx.state(nnx.eval_shape(lambda: make_model(checkpoint.config)))
  shapes = {path: leaf.shape for path, leaf in flat_weights(state)}
  tensors = hub_tensors(shapes, checkpoint.tensors)
  check_tensors(checkpoint.where, checkpoint.tensors, tensors)
  stored = {name: checkpoint.tensors[name] for name in tensors}
  first = str(FLOATING[next(iter(stored.values())).dtype])
  told = dtype or checkpoint.fields.get("torch_dtype", first)
  with _staged(out) as partial:
    num_bytes = write_directory(partial, checkpoint.where, stored, dtype and jnp.dtype(dtype))
    write_config(checkpoint.config, partial, dtype=told, base=checkpoint.fields)
    copy_beside(checkpoint.directory, partial)
  return num_bytes


def copy_beside(source: Path, target: Path):
  """Copies what goes along with the weights of a checkpoint: the tokenizer above all."""
  for pattern in _COPIED:
    for path in source.glob(pattern):
      shutil.copyfile(path, target / path.name)


@contextlib.contextmanager
def _staged(directory: Path) -> Iterator[Path]:
  """A directory to write into; what is there at the end appears in `directory`, or nothing does."""
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
    if error.errno in _FULL_DISK:
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
  """Moves files over those of the same name; weights under other names would count, and go."""
  new = {path.name for path in partial.iterdir()}
  for name in new:
    (partial / name).replace(directory / name)
  for path in directory.glob("model*.safetensors*"):
    if path.name not in new:
      path.unlink()


def flat_weights(state: nnx.State) -> list[tuple[str, jax.Array]]:
  """Arrays of a model with their paths, `decoder.norm.scale` and so on."""
  return [(dotted_path(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
