"""Files of annotations for the mixtures of golden family 10, made from what is stored of them.

A mixture is a list of files: the rows of each, and its entry in the mixture.
"""

import os
import re
from pathlib import Path

from tests.conftest import Golden
from videochat_flash_jax.data.mixture.annotations import kept_rows

FAMILY = Golden("10_sampling").json("sampling.json")


def rows_of(kind, ids, paths="f0.bin"):
  """Rows of a file: each has a path of its own, ending with the row's id, or all share a list."""

  def of_row(number):
    return (
      paths
      if isinstance(paths, list)
      else re.sub(r"\d+(?=\D*(\.\w+)?$)", str(number), paths, count=1)
    )

  return [{"id": number, **({kind: of_row(number)} if kind else {})} for number in ids]


def medium_of(row):
  """Kind and path, or paths, of a row's medium; None and None of a text."""
  kind = next((kind for kind in ("image", "video") if kind in row), None)
  return kind, row.get(kind)


def below(folder, paths):
  """Paths as they were before `folder` was put before them."""
  if isinstance(paths, list):
    return [below(folder, path) for path in paths]
  return os.path.relpath(paths, folder) if folder and paths.startswith(folder) else paths


def with_entry(case):
  """The file of a case that names its entry: six rows, or as many as give the case's ids."""
  entry = case["entry"]
  if "error" in case:
    return [(rows_of(case["sample_key"], range(6)), entry)]
  strategy, least = entry.get("sampling_strategy", "all"), max(case["ids"]) + 1
  sizes = [size for size in (6, *range(least, 1000)) if size >= least]
  size = next(size for size in sizes if list(kept_rows(size, strategy)) == case["ids"])
  paths = below(entry.get("data_root"), medium_of(case["first"])[1] or "f0.bin")
  return [(rows_of(case["sample_key"], range(size), paths), entry)]


def without_entry(case):
  """Files that give a case's rows: ids of one file share their hundreds and begin at the first."""
  kind, paths = medium_of(case["first"])
  paths = paths or "f0.bin"
  folder = os.path.dirname(paths[0] if isinstance(paths, list) else paths)
  entry = {"data_root": folder, "video_read_type": case["first"].get("video_read_type")}
  kinds, paths, files = kinds_of_lengths(), below(folder, paths), []
  for start in dict.fromkeys(100 * (number // 100) for number in case["ids"]):
    ids = [number for number in case["ids"] if start <= number < start + 100]
    if start != case["ids"][0]:
      kind = kinds.get(ids[0], kind)
    if ids[0] > start:
      ids, strategy = range(start, ids[-1] + 1), f"end:{len(ids)}"
    elif kind and len(ids) < len(case["ids"]):
      ids, strategy = range(start, ids[-1] + 4), f"first:{len(ids)}"
    else:
      strategy = "all"
    files.append((rows_of(kind, ids, paths), {**entry, "sampling_strategy": strategy}))
  return files


def kinds_of_lengths():
  """What the rows of the stored lengths have, by their ids: beyond its words an image has 128."""
  stored = FAMILY["lengths"]
  extra = [
    length - abs(words)
    for length, words in zip(stored["lengths"], stored["modality_lengths"], strict=True)
  ]
  kinds = ["video" if more > 128 else "image" if more else None for more in extra]
  return dict(zip(stored["ids"], kinds, strict=True))


def refused(case, root):
  """All mixtures that fail as a case without an entry says."""
  media = {"data_root": f"{root}/media"}
  nowhere = {"data_root": f"{root}/nothing"}
  if case["error"] == "KeyError":  # the first row decides which medium all rows have
    (kind,) = re.findall("image|video", case["message"])
    other = {"image": "video", "video": "image"}[kind]
    return [[(rows_of(kind, [0]) + rows_of(other, [1]), media)]]
  if case["error"] == "IndexError":  # no row is left, or fewer than three and none has a file
    return [
      [(rows_of("video", range(6)), {**media, "sampling_strategy": "first:0"})],
      [(rows_of("video", range(2)), nowhere)],
    ]
  assert case["error"] == "AssertionError", case
  if case["message"] == "[]":
    return [[([], media)]]
  return [[(rows_of("video", range(6)), nowhere)]]


def touch_files(rows, folder):
  """Makes the files that rows name below a folder."""
  for row in rows:
    paths = medium_of(row)[1] or []
    for path in [paths] if isinstance(paths, str) else paths:
      path = Path(folder, path)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()
