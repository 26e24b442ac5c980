"""Opens, loads and writes checkpoints; writing always gives the released format.

Loading is strict: each stored weight is used exactly once, and each array of the model is filled.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

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
from videochat_flash_jax.checkpoints.hub.hf_options import INT8_FIELD, has_int8
from videochat_flash_jax.checkpoints.hub.int8_tensors import in_int8, int8_shapes
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
  weights: Literal["int8"] | None = None,
) -> nnx.Module:
  """Builds the model that a checkpoint directory describes, and loads its weights.

  Args:
    make_model: builds a model from a config.
    directory: see `open_checkpoint`.
    dtype: dtype of the weights in memory; of int8 weights, that of their scales.
    sharding_of: returns the sharding of an array, given its path and shape. A path looks like
      `decoder.layers.stacked.q_proj.kernel`.
    weights: "int8" makes the matrices of the decoder int8 while they are read, see
      `hub.int8_tensors`; None keeps what the checkpoint has.

  Raises:
    InputError: something is wrong with the directory. All tensors that do not fit are named in one
      message.
  """
  checkpoint = open_checkpoint(directory)
  if weights == "int8":
    checkpoint = in_int8(checkpoint)
  graph, nested = _shapes(checkpoint, make_model)
  flat = _flat(nested)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  dtypes = {path: leaf.dtype if leaf.dtype == jnp.int8 else dtype for path, leaf in flat.items()}
  arrays = load_weights(checkpoint.where, checkpoint.tensors, shapes, dtypes, sharding_of)
  return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(nested), map(arrays.pop, flat)))


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
  dtypes = [array.dtype for array in weights.values()]
  dtype = next(str(dtype) for dtype in dtypes if dtype != jnp.int8)
  quantization = INT8_FIELD if jnp.int8 in dtypes else {}
  with _staged(directory) as partial:
    write_directory(partial, "the model", hub_arrays(weights))
    fields = (read_fields(source) if source else {}) | quantization
    write_config(config, partial, dtype=dtype, base=fields)
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
    raise InputError(
      f"dtype is {dtype!r:.80}; give one of {', '.join(map(str, FLOATING.values()))}"
    )
  if os.path.lexists(out):
    raise InputError(f"{out}: exists already; give another directory, or remove it first")
  if out.resolve().is_relative_to(checkpoint.directory.resolve()):
    raise InputError(f"{out}: inside the checkpoint {checkpoint.directory}; give another directory")
  _, nested = _shapes(checkpoint, make_model)
  shapes = {path: leaf.shape for path, leaf in _flat(nested).items()}
  tensors = hub_tensors(shapes, checkpoint.tensors)
  check_tensors(checkpoint.where, checkpoint.tensors, tensors)
  stored = {name: checkpoint.tensors[name] for name in tensors}
  first = next(str(FLOATING[t.dtype]) for t in stored.values() if t.dtype in FLOATING)
  stated = stated_dtype(checkpoint.directory / "config.json", checkpoint.fields)
  with _staged(out) as partial:
    num_bytes = write_directory(partial, checkpoint.where, stored, dtype and jnp.dtype(dtype))
    write_config(checkpoint.config, partial, dtype=dtype or stated or first, base=checkpoint.fields)
    copy_other_files(checkpoint.directory, partial)
  return num_bytes


def _shapes(checkpoint, make_model):
  """The graph of a model, and the shapes of its weights in nested dicts."""
  graph, state = nnx.split(nnx.eval_shape(lambda: make_model(checkpoint.config)))
  weights = nnx.to_pure_dict(state)
  return graph, int8_shapes(weights) if has_int8(checkpoint.fields) else weights


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
  """Returns the arrays of a model with their paths, such as `decoder.norm.scale`.

  An int8 weight has two: `decoder.lm_head.kernel.qvalue` and `decoder.lm_head.kernel.scale`.
  """
  return list(_flat(nnx.to_pure_dict(state)).items())


def _flat(nested):
  leaves = jax.tree_util.tree_leaves_with_path(nested)
  return {dotted_path(path): leaf for path, leaf in leaves}
