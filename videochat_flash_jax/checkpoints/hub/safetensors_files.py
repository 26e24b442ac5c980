"""Safetensors files, read and written block by block: never more than a tensor is in memory."""

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

# Element types that weights may have, as safetensors writes them. 8 bits and less need scales that
# no rule here knows.
FLOATING = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
}
SHARD_BYTES = 5_000_000_000  # of one file, as the released checkpoints are cut
# Progress is shown in a terminal only, and not of what takes a moment.
BAR = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1.0, "leave": False}

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_BLOCK_BYTES = 16 * 2**20
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how they begin


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, or elsewhere, that is read when it is asked for.

  Attributes:
    shape: as stored.
    dtype: element type as safetensors writes it, `BF16` and so on.
    blocks: gives the tensor in pieces along its first axis, from the first row to the last.
  """

  shape: tuple[int, ...]
  dtype: str
  blocks: Callable[[], Iterator[np.ndarray]]

  @classmethod
  def of(cls, array: np.ndarray) -> "StoredTensor":
    """A tensor of floating-point numbers that is in memory."""
    return cls(array.shape, floating_name(array.dtype), lambda: iter([array]))


def floating_name(dtype: np.dtype) -> str:
  """Safetensors' name of a floating-point type of numpy; `KeyError` if it is none of these."""
  return {known: name for name, known in FLOATING.items()}[np.dtype(dtype)]


def read_directory(directory: Path) -> dict[str, StoredTensor]:
  """The tensors of `model.safetensors`, or of the shards that the index names, by their names.

  Raises:
    InputError: no such files, a shard is missing, a file is no whole safetensors file, a tensor is
      in two of them, or the index names others than the shards hold.
  """
  tensors: dict[str, StoredTensor] = {}
  for path in _paths(directory):
    found = read_file(path)
    for name in sorted(tensors.keys() & found.keys())[:1]:
      raise InputError(f"{path}: tensor '{name}' is in another shard, too; fetch both again")
    tensors |= found
  if not (directory / _ONE_FILE).is_file():
    index = directory / _INDEX
    listed = json.loads(index.read_text())["weight_map"].keys()
    if differing := sorted(listed ^ tensors.keys()):
      raise InputError(
        f"{index}: the index and its shards do not name the same tensors: only one of them has "
        f"{', '.join(fold_layers(differing))}; fetch the checkpoint again"
      )
  return tensors


def is_whole(directory: Path) -> bool:
  """Whether all files of weights are there, unopened: false after a download that broke off."""
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
    held = f"only {', '.join(pickles)}, which could run code; fetch the safetensors files"
    raise InputError(
      f"{directory}: neither {_ONE_FILE} nor {_INDEX} is there, "
      + (held if pickles else "so it is no checkpoint directory; give one")
    )
  try:
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if not shards or any(Path(name).name != name for name in shards):
      raise ValueError("it names no shards beside it")
    missing = [name for name in shards if not (directory / name).is_file()]
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise InputError(f"{index}: no index of shards ({error}); fetch it again") from error
  if missing:
    raise InputError(f"{index}: shards missing: {', '.join(missing)}; fetch them")
  return [directory / name for name in shards]


def read_file(path: Path) -> dict[str, StoredTensor]:
  """The tensors of one file, by their names; only its header is read.

  Raises:
    InputError: it is no whole safetensors file.
  """
  try:
    with safe_open(path, framework="numpy"):
      pass  # the header is sound, and the file as long as it says
    with path.open("rb") as file:
      header_bytes = int.from_bytes(file.read(8), "little")
      header = json.loads(file.read(header_bytes))
  except (SafetensorError, OSError) as error:
    if _is_pickle(path):
      raise InputError(
        f"{path}: a pickle under the name of a safetensors file, which could run code; "
        "fetch the safetensors file"
      ) from error
    raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error
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
  """Plain reads: a mapped file would stay in memory, tensor after tensor."""
  dtype, (num_rows, *row_shape) = FLOATING[entry["dtype"]], entry["shape"]
  row = int(np.prod(row_shape))
  rows_per_block = max(1, _BLOCK_BYTES // max(1, row * dtype.itemsize))
  for start in range(0, num_rows, rows_per_block):
    rows = min(rows_per_block, num_rows - start)
    block = np.fromfile(path, dtype, rows * row, offset=offset + start * row * dtype.itemsize)
    yield block.reshape(rows, *row_shape)


def finite_blocks(
  name: str, tensor: StoredTensor, dtype: np.dtype, broken: list[str]
) -> Iterator[np.ndarray]:
  """Blocks of a tensor in `dtype`; its name goes to `broken` if one holds NaN or infinity."""
  for block in tensor.blocks():
    with np.errstate(over="ignore"):  # too large for float16, say: told by name below
      block = np.asarray(block).astype(dtype, copy=False)
    if not np.isfinite(block).all() and name not in broken:
      broken.append(name)
    yield block


def refuse_broken(where: Path | str, broken: list[str]) -> None:
  """Raises `InputError` if `finite_blocks` found numbers that no weight may be."""
  if broken:
    names = ", ".join(fold_layers(broken))
    raise InputError(
      f"{where}: NaN or infinity in {names}; take an earlier checkpoint, or a wider dtype"
    )


def fold_layers(names: Iterable[str]) -> list[str]:
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


def write_directory(
  directory: Path,
  where: Path | str,
  tensors: Mapping[str, StoredTensor],
  dtype: np.dtype | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> int:
  """Writes `model.safetensors`, or shards with their index where one file would be too large.

  Args:
    directory: an empty directory; after an error, what it holds is worthless.
    where: what the tensors are of, for messages.
    tensors: what to write, by name.
    dtype: to write in; by default that of each tensor.
    shard_bytes: the most bytes of tensors in one file.

  Returns:
    Bytes of all tensors.

  Raises:
    InputError: a weight holds NaN or infinity.
  """
  types = {n: dtype or FLOATING[tensor.dtype] for n, tensor in tensors.items()}
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
    home = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
  return total


def _cut(sizes, shard_bytes):
  """Names in order, cut into lists of at most `shard_bytes` (or of one tensor)."""
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
  """One safetensors file: length of the header, header, tensors without gaps."""
  names = sorted(tensors, key=lambda name: -types[name].itemsize)  # keeps all of them aligned
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name in names:
    start, end = end, end + types[name].itemsize * int(np.prod(tensors[name].shape))
    entry = {"dtype": floating_name(types[name]), "shape": list(tensors[name].shape)}
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
    os.fsync(file.fileno())  # some disks tell only now that they are full
