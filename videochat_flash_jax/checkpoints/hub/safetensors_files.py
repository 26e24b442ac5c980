"""Reads and writes safetensors files block by block; at most one tensor is in memory."""

import dataclasses
import functools
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from videochat_flash_jax.errors import InputError

# The allowed dtypes of weights, by their names in safetensors; see `int8_tensors` for the last one.
FLOATING = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
INT8 = "I8"
_DTYPES = FLOATING | {INT8: np.dtype(np.int8)}
SHARD_BYTES = 5_000_000_000  # largest size of one file, as in the released checkpoints
# Progress is shown only in a terminal, and only if the work takes longer than a moment.
BAR = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1.0, "leave": False}

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BLOCK_BYTES = 16 * 2**20
# The first bytes of pickles, and of zip files with pickles in them.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, in memory or on a device that is read only when `blocks` is called.

  Attributes:
    shape: its shape in the file.
    dtype: its dtype by its name in safetensors, such as `BF16`.
    blocks: iterates over the tensor in pieces along its first axis, from the first row to the last.
  """

  shape: tuple[int, ...]
  dtype: str
  blocks: Callable[[], Iterator[np.ndarray]]

  @classmethod
  def of(cls, array: np.ndarray) -> "StoredTensor":
    """Returns a tensor that is in memory."""
    return cls(array.shape, dtype_name(array.dtype), lambda: iter([array]))


def dtype_name(dtype: np.dtype) -> str:
  """Returns the name in safetensors of a dtype.

  Raises:
    KeyError: it is none of the allowed dtypes.
  """
  return {known: name for name, known in _DTYPES.items()}[np.dtype(dtype)]


def read_directory(directory: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of `model.safetensors`, or of all shards of an index, by their names.

  Raises:
    InputError: there are no such files, a shard is missing, a file is not a complete safetensors
      file, a tensor is in two shards, or index and shards do not name the same tensors.
  """
  tensors: dict[str, StoredTensor] = {}
  for path in _paths(directory):
    found = read_file(path)
    for name in sorted(tensors.keys() & found.keys())[:1]:
      raise InputError(f"{path}: tensor '{name}' is also in another shard; download both again")
    tensors |= found
  if not (directory / _ONE_FILE).is_file():
    index = directory / _INDEX
    listed = json.loads(index.read_bytes())["weight_map"].keys()
    if differing := sorted(listed ^ tensors.keys()):
      raise InputError(
        f"{index}: the index and its shards do not name the same tensors: only one of them has "
        f"{', '.join(fold_layers(differing))}; download the checkpoint again"
      )
  return tensors


def is_whole(directory: Path) -> bool:
  """Returns whether all weight files exist, without opening them.

  This is false after a download that was interrupted.
  """
  try:
    return bool(_paths(directory))
  except InputError:
    return False


def _paths(directory):
  if (directory / _ONE_FILE).is_file():
    return [directory / _ONE_FILE]
  index = directory / _INDEX
  if not index.is_file():
    pickles = sorted(p.name for kind in ("bin", "pt", "pth") for p in directory.glob(f"*.{kind}"))
    only = f"only {', '.join(pickles)}, which could run code; download the safetensors files"
    raise InputError(
      f"{directory}: neither {_ONE_FILE} nor {_INDEX} is there, "
      + (only if pickles else "so it is no checkpoint directory; give one")
    )
  try:
    shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if not shards or any(Path(name).name != name for name in shards):
      raise ValueError("it names no shards in its own directory")
    missing = [name for name in shards if not (directory / name).is_file()]
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise InputError(f"{index}: not an index of shards ({error}); download it again") from error
  if missing:
    raise InputError(f"{index}: shards missing: {', '.join(missing)}; download them")
  return [directory / name for name in shards]


def read_file(path: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of one file by their names; only its header is read.

  Raises:
    InputError: it is not a complete safetensors file.
  """
  try:
    with safe_open(path, framework="numpy"):
      pass  # this checks the header, and that the file has the length given there
    with path.open("rb") as file:
      header_bytes = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(header_bytes))
  except (SafetensorError, OSError) as error:
    if _is_pickle(path):
      raise InputError(
        f"{path}: a pickle with the name of a safetensors file, which could run code; "
        "download the safetensors file"
      ) from error
    raise InputError(
      f"{path}: not a complete safetensors file ({error}); download it again"
    ) from error
  header.pop("__metadata__", None)
  start = 8 + header_bytes
  return {
    name: StoredTensor(
      tuple(entry["shape"]),
      entry["dtype"],
      functools.partial(_blocks, path, start + entry["data_offsets"][0], entry),
    )
    for name, entry in header.items()
  }


def _is_pickle(path):
  try:
    with path.open("rb") as file:
      return file.read(4).startswith(_PICKLES)
  except OSError:
    return False


def _blocks(path, offset, entry):
  """Reads a tensor in blocks.

  The file is not memory-mapped: otherwise all tensors read so far would stay in memory.
  """
  dtype, (num_rows, *row_shape) = _DTYPES[entry["dtype"]], entry["shape"]
  row_size = int(np.prod(row_shape))
  row_bytes = row_size * dtype.itemsize
  rows_per_block = max(1, _BLOCK_BYTES // max(1, row_bytes))
  for start in range(0, num_rows, rows_per_block):
    rows = min(rows_per_block, num_rows - start)
    block = np.fromfile(path, dtype, rows * row_size, offset=offset + start * row_bytes)
    yield block.reshape(rows, *row_shape)


def finite_blocks(
  name: str, tensor: StoredTensor, dtype: np.dtype, broken: list[str]
) -> Iterator[np.ndarray]:
  """Iterates over the blocks of a tensor, and looks for NaN and infinity in them.

  Args:
    name: name of the tensor.
    tensor: the tensor.
    dtype: dtype to which the blocks are converted.
    broken: the name is added to this list if a block holds NaN or infinity.
  """
  for block in tensor.blocks():
    with np.errstate(over="ignore"):  # a number too large for `dtype` is reported by name below
      block = np.asarray(block).astype(dtype, copy=False)
    if not np.isfinite(block).all() and name not in broken:
      broken.append(name)
    yield block


def refuse_broken(where: Path | str, broken: list[str]) -> None:
  """Raises `InputError` if `finite_blocks` found NaN or infinity; names the tensors."""
  if broken:
    names = ", ".join(fold_layers(broken))
    raise InputError(
      f"{where}: NaN or infinity in {names}; use an earlier checkpoint, or a wider dtype"
    )


def fold_layers(names: Iterable[str]) -> list[str]:
  """Joins names that differ only in their layer: `layers.{3,4}.norm`; others are unchanged."""
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


def write_directory(
  directory: Path,
  where: Path | str,
  tensors: Mapping[str, StoredTensor],
  dtype: np.dtype | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> int:
  """Writes `model.safetensors`, or shards and their index if one file would be too large.

  Args:
    directory: an empty directory. After an error its content must not be used.
    where: what the tensors belong to, for error messages.
    tensors: the tensors to write, by name.
    dtype: dtype to write; by default each tensor keeps its own, as int8 always does.
    shard_bytes: largest number of bytes of tensors in one file.

  Returns:
    Number of bytes of all tensors.

  Raises:
    InputError: a weight holds NaN or infinity.
  """
  types = {n: dtype or _DTYPES[t.dtype] for n, t in tensors.items()}
  types |= {n: _DTYPES[INT8] for n, t in tensors.items() if t.dtype == INT8}
  sizes = {n: types[n].itemsize * int(np.prod(t.shape)) for n, t in tensors.items()}
  shards = _cut(sizes, shard_bytes)
  names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
  names = names if len(shards) > 1 else [_ONE_FILE]
  broken: list[str] = []
  total = sum(sizes.values())
  with tqdm(desc="writing", total=total, **BAR) as bar:
    for file_name, shard in zip(names, shards, strict=True):
      _write_file(directory / file_name, {n: tensors[n] for n in shard}, types, broken, bar)
  refuse_broken(where, broken)
  if len(shards) > 1:
    file_of = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return total


def _cut(sizes, shard_bytes):
  """Cuts the names, in order, into lists of at most `shard_bytes`, or of one larger tensor."""
  shards: list[list[str]] = [[]]
  room = shard_bytes
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  return shards


def _write_file(path, tensors, types, broken, bar):
  """Writes one safetensors file: length of the header, header, tensors without gaps."""
  names = sorted(tensors, key=lambda name: -types[name].itemsize)  # so that all are aligned
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name in names:
    start, end = end, end + types[name].itemsize * int(np.prod(tensors[name].shape))
    entry = {"dtype": dtype_name(types[name]), "shape": list(tensors[name].shape)}
    header[name] = entry | {"data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      for block in finite_blocks(name, tensors[name], types[name], broken):
        file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        bar.update(block.nbytes)
    file.flush()
    os.fsync(file.fileno())  # some disks report only now that they are full
