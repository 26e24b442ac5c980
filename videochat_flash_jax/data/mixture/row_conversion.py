r"""Turns tables and lists of questions into checked LLaVA rows, one on each line.

A table (.csv) has the names of its columns in the first line:

  video,question,answer,start,end          {"video": "a.mp4", "start": 2.0, "end": 8.5,
  a.mp4,What moves?,A cat.,2,8.5     ->     "conversations": [{"from": "human", "value":
                                            "<image>\nWhat moves?"}, {"from": "gpt", ...}]}
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videochat_flash_jax.data.mixture.annotations import has_half_clip, nearest
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.row_check import check_row
from videochat_flash_jax.data.mixture.row_text import rows_of_file
from videochat_flash_jax.data.text.conversation import PLACEHOLDER
from videochat_flash_jax.errors import InputError

_COLUMNS = ("id", "video", "image", "question", "answer", "start", "end")
_MOST_LINES = 6  # of broken rows that an error names


def convert_rows(source: Path, out: Path) -> int:
  """Writes the rows of a .json, .jsonl or .csv file as .jsonl, either all of them or none.

  The paths of media are not changed.

  Returns:
    The number of rows.

  Raises:
    InputError: a file cannot be read or written, or some rows cannot be used; names the line of the
      first such row.
  """
  if os.path.lexists(out):
    raise InputError(f"{out}: exists already; give another --out")
  rows = _table_rows if source.suffix.lower() == ".csv" else _json_rows
  partial = out.with_name(out.name + ".partial")
  try:
    # Half of a surrogate pair, as in the name of a file in another encoding, becomes "\udce9".
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
      num_rows = _write_rows(rows(source), source, file)
    partial.rename(out)
  except OSError as error:
    raise InputError(f"{error.filename or out}: {error.strerror}; check the path") from error
  finally:
    partial.unlink(missing_ok=True)
  return num_rows


def _write_rows(rows, source, file) -> int:
  num_rows, broken = 0, []
  for line, row in rows:
    num_rows += 1
    try:
      check_row(row)
      if has_half_clip(row):
        raise BrokenRow("bad times", "only one of fields 'start' and 'end'; give both, or none")
    except BrokenRow as error:
      broken.append((line, error))
      continue
    if not broken:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
  if broken:
    line, error = broken[0]
    others = ", ".join(str(line) for line, _ in broken[1:_MOST_LINES])
    others = f"; rows of these lines are broken, too: {others}" if others else ""
    others += f" and {len(broken) - _MOST_LINES:,} more" if len(broken) > _MOST_LINES else ""
    raise InputError(f"{source} line {line}: {error}; nothing was written{others}")
  if not num_rows:
    raise InputError(f"{source}: holds no row, nothing is written; give a file with rows")
  return num_rows


def _json_rows(source) -> Iterator[tuple[int, object]]:
  with open(source, "rb") as file, open(source, "rb") as counted:
    line, last_start = 1, 0
    for start, _, row in rows_of_file(file, str(source)):
      line += counted.read(start - last_start).count(b"\n")
      last_start = start
      yield line, row


def _table_rows(source) -> Iterator[tuple[int, dict[str, Any]]]:
  with open(source, encoding="utf-8-sig", newline="") as file:
    table = csv.DictReader(file, strict=True)
    try:
      columns = table.fieldnames or ()
      for column in columns:
        if column not in _COLUMNS:
          raise InputError(f"{source}: unknown column {column!r:.80}; {nearest(column, _COLUMNS)}")
        if columns.count(column) > 1:
          raise InputError(
            f"{source} line 1: column {column!r:.80} stands twice; remove one of them"
          )
      line = table.line_num + 1
      for cells in table:
        yield line, _row_of_cells(cells)
        line = table.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
      raise InputError(f"{source} line {table.line_num}: {error}; save it as CSV, UTF-8") from error


def _row_of_cells(cells: dict[str, Any]) -> dict[str, Any] | None:
  """Returns a row, or None if the line has more cells than the table has columns."""
  if None in cells:
    return None
  given = {column: cell.strip() for column, cell in cells.items() if cell and cell.strip()}
  question, answer = given.pop("question", ""), given.pop("answer", None)
  if PLACEHOLDER not in question and ("video" in given or "image" in given):
    question = f"{PLACEHOLDER}\n{question}"
  turns = [{"from": "human", "value": question}]
  if answer is not None:
    turns.append({"from": "gpt", "value": answer})
  for column in ("start", "end"):
    if column in given:
      given[column] = _number(given[column])
  return {**given, "conversations": turns}


def _number(cell: str) -> float | str:
  try:
    return float(cell)
  except ValueError:
    return cell  # `check_row` reports it
