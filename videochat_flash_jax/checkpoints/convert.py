"""Checkpoint directories in the released layout, in and out: strict, nothing left over."""

import contextlib
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from videochat_flash_jax.checkpoints.hf_config import read_config, write_config
from videochat_flash_jax.checkpoints.hf_mapping import HubTensor, hub_tensors
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATING = ("F64", "F32", "F16", "BF16")  # 8 bits and less need scales that no rule here knows


class WeightFiles:
  """The safetensors files of a checkpoint directory, opened but not read."""

  def __init__(self, directory: Path):
    """Opens `model.safetensors`, or the shards that the index names.

    Raises:
      InputError: no such files, a shard is missing, or a file is no whole safetensors file.
    """
    self.directory = directory
    self._open = contextlib.ExitStack()
    self._file_of: dict[str, safe_open] = {}
    for path in self._paths():
      try:
        file = self._open.enter_context(safe_open(path, framework="numpy"))
      except (SafetensorError, OSError) as error:
        raise InputError(
          f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from error
      for name in file.keys():  # noqa: SIM118 (not a mapping)
        if name in self._file_of:
          raise InputError(f"{path}: tensor '{name}' is in another shard, too; fetch both again")
        self._file_of[name] = file

  def _paths(self):
    if (self.directory / _ONE_FILE).is_file():
      return [self.directory / _ONE_FILE]
    index = self.directory / _INDEX
    if not index.is_file():
      raise InputError(
        f"{self.directory}: neither {_ONE_FILE} nor {_INDEX} is there; give a checkpoint directory"
      )
    try:
      shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
      missing = [name for name in shards if not (self.directory / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
      raise InputError(f"{index}: no index of shards ({error}); fetch it again") from error
    if missing:
      raise InputError(f"{index}: shards missing: {', '.join(missing)}; fetch them")
    return [self.directory / name for name in shards]

  @property
  def names(self) -> list[str]:
    """Names of all tensors stored."""
    return list(self._file_of)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it."""
    return tuple(self._file_of[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Element type of a tensor as safetensors writes it, `BF16` and so on, without reading it."""
    return self._file_of[name].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """Reads one tensor."""
    return self._file_of[name].get_tensor(name)

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._open.close()


def load_weights(
  files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], dtype=np.float32
) -> dict[str, np.ndarray]:
  """Reads every array of a model; every stored tensor is used exactly once.

  Args:
    files: an opened checkpoint.
    shapes: shape of every array of the model by its path, `decoder.norm.scale` and so on.
    dtype: of the arrays returned.

  Raises:
    InputError: names all missing, unexpected and misshapen tensors at once, and those that hold
      no floating-point numbers.
  """
  tensors = hub_tensors(dict(shapes))
  _check(files, tensors)
  arrays = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
  for name, tensor in tensors.items():
    array = arrays[tensor.path]
    target = array if tensor.layer is None else array[tensor.layer]
    target[...] = tensor.layout.from_hub(files.read(name))
  return arrays


def _check(files: WeightFiles, tensors: Mapping[str, HubTensor]):
  names = set(files.names)
  missing = [name for name in tensors if name not in names]
  unexpected = [name for name in files.names if name not in tensors]
  misshapen = [
    f"{name} (is {files.shape(name)}, should be {tensors[name].shape})"
    for name in files.names
    if name in tensors and files.shape(name) != tensors[name].shape
  ]
  not_floating = [
    f"{name} (is {files.dtype(name)})"
    for name in files.names
    if name in tensors and files.dtype(name) not in _FLOATING
  ]
  problems = [
    f"{what}: {', '.join(_fold_layers(found))}"
    for what, found in (
      ("missing", missing),
      ("unexpected", unexpected),
      ("of another shape", misshapen),
      (f"of another dtype than {', '.join(_FLOATING)}", not_floating),
    )
    if found
  ]
  if problems:
    raise InputError(
      f"{files.directory}: the tensors do not fit config.json; {'; '.join(problems)}; "
      "fetch the checkpoint again, or mend its config.json"
    )


def _fold_layers(names: Iterable[str]) -> list[str]:
  """Names that differ in their layer alone, as one: `layers.{3,4}.norm`; one layer stays as is."""
  layers = defaultdict(list)
  for name in names:
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    key = (name[: found.start()], name[found.end() :]) if found else (name, None)
    layers[key].append(found.group() if found else "")
  return [
    start
    if end is None
    else start + (numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}") + end
    for (start, end), numbers in layers.items()
  ]


def save_weights(weights: Mapping[str, np.ndarray], directory: Path) -> None:
  """Writes the arrays of a model, by their paths, as `model.safetensors` in hub names.

  The file appears whole or not at all.
  """
  tensors = hub_tensors({path: tuple(array.shape) for path, array in weights.items()})
  stored = {}
  for name, tensor in tensors.items():
    array = np.asarray(weights[tensor.path])
    array = array if tensor.layer is None else array[tensor.layer]
    stored[name] = np.ascontiguousarray(tensor.layout.to_hub(array))
  partial = directory / f".{_ONE_FILE}.partial"
  try:
    save_file(stored, partial, metadata={"format": "pt"})
    partial.rename(directory / _ONE_FILE)
  finally:
    partial.unlink(missing_ok=True)


def load_model(
  make_model: Callable[[VideoChatFlashConfig], nnx.Module], directory: Path, dtype=np.float32
) -> nnx.Module:
  """Builds the model that a checkpoint directory describes, with its weights.

  Args:
    make_model: builds a model from a config; it is only traced, so it costs no memory.
    directory: `config.json` beside `model.safetensors`, or an index with shards.
    dtype: of the weights in memory.

  Raises:
    InputError: what is wrong with the directory, all of it at once.
  """
  config = read_config(directory)
  with WeightFiles(directory) as files:
    if config.decoder.tied_embeddings and "lm_head.weight" in files.names:
      # A stored head counts, as in the released 2B, whatever the language model's config says.
      decoder = dataclasses.replace(config.decoder, tied_embeddings=False)
      config = dataclasses.replace(config, decoder=decoder)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_model(config)))
    weights = load_weights(files, {path: leaf.shape for path, leaf in flat_weights(state)}, dtype)
  filled = [
    (path, leaf.replace(jnp.asarray(weights.pop(_dotted(path)))))
    for path, leaf in nnx.to_flat_state(state)
  ]
  return nnx.merge(graph, nnx.from_flat_state(filled))


def save_model(model: nnx.Module, config: VideoChatFlashConfig, directory: Path) -> None:
  """Writes a checkpoint directory in the released layout; weights keep their dtype."""
  directory.mkdir(parents=True, exist_ok=True)
  weights = {path: np.asarray(leaf) for path, leaf in flat_weights(nnx.state(model, nnx.Param))}
  save_weights(weights, directory)
  write_config(config, directory, dtype=str(next(iter(weights.values())).dtype))


def flat_weights(state: nnx.State) -> list[tuple[str, Any]]:
  """Arrays of a model with their paths, `decoder.norm.scale` and so on."""
  return [(_dotted(path), leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]


def _dotted(path):
  return ".".join(map(str, path))
