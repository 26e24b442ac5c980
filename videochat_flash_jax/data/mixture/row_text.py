"""Reads the rows of an annotation file of any size sequentially, each with its byte offset."""

import json
import math
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from videochat_flash_jax.errors import InputError

_PIECE_BYTES = 1 << 20
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_ESCAPE = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Python converts no integer with more digits. It must not fail here, so that the end of the row is
# found.
_MOST_DIGITS = 4300
_decoder = json.JSONDecoder(
  parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else math.inf
)


class RowText(NamedTuple):
  """One row: the byte where it starts, its text, and its parsed JSON (None if it is not JSON)."""

  start: int
  text: bytes
  row: object


def parse_row(text: bytes) -> object:
  """Parses a row's JSON; returns None if it is not JSON."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
    return None


def rows_of_file(file: BinaryIO, name: str) -> Iterator[RowText]:
  """Yields the rows of a JSON list, or of a file with one JSON object on each line.

  The content decides which of the two it is, not the file's name: a list begins with `[`. There is
  one exception. If the first line is a complete list and other lines follow, it is a broken row of
  a file with one row on each line. No more than one piece of the file and one row are kept in
  memory.

  Raises:
    InputError: the JSON of a list is broken, so that the start of the next row is unknown, or
      something follows the list.
  """
  mark = file.read(len(_BYTE_ORDER_MARK))
  start = len(mark) if mark == _BYTE_ORDER_MARK else 0
  file.seek(start)
  is_list = file.read(_PIECE_BYTES).lstrip()[:1] == b"["
  file.seek(start)
  is_list = is_list and not _is_row_among_rows(file)
  file.seek(start)
  return _list_elements(file, name, start) if is_list else _lines(file, start)


def _is_row_among_rows(file):
  """Returns whether the first line with text is a complete list, and more text follows it."""
  line = file.readline(_PIECE_BYTES)
  while line.isspace():
    line = file.readline(_PIECE_BYTES)
  return line.endswith(b"\n") and parse_row(line) is not None and not _is_rest_whitespace(file)


def _is_rest_whitespace(file):
  return all(piece.isspace() for piece in iter(lambda: file.read(_PIECE_BYTES), b""))


def _lines(file, start):
  for line in file:
    if not line.isspace():
      text = line.rstrip(b"\r\n")
      yield RowText(start, text, parse_row(text))
    start += len(line)


def _list_elements(file, name, start):
  """Yields the elements of a list, and parses piece by piece.

  A piece is decoded as Latin-1, where each character is one byte: an offset in the text is an
  offset in the file. All characters that structure JSON are ASCII. An element with other characters
  is decoded again, as UTF-8.
  """
  text, base = file.read(_PIECE_BYTES).decode("latin-1"), start
  offset = text.index("[") + 1
  num_read = 0
  while True:
    offset = _WHITESPACE.match(text, offset).end()
    if text[offset : offset + 1] == "]":
      break
    try:
      value, end = _decoder.raw_decode(text, offset)
      after = _WHITESPACE.match(text, end).end()
      follower = text[after : after + 1]
    except (json.JSONDecodeError, RecursionError) as error:
      _check_rest_may_complete(error, text, base, name, num_read)
      follower = ""
    if follower and follower in ",]":
      raw = text[offset:end].encode("latin-1")
      yield RowText(base + offset, raw, value if raw.isascii() else parse_row(raw))
      num_read += 1
      if follower == "]":
        offset = after
        break
      offset = after + 1
    elif follower:
      raise _broken(name, num_read, base + after)
    else:  # the piece ends within the element
      more = file.read(max(_PIECE_BYTES, len(text) - offset)).decode("latin-1")
      if not more:
        raise _broken(name, num_read, base + len(text))
      text, base, offset = text[offset:] + more, base + offset, 0
  if _WHITESPACE.match(text, offset + 1).end() < len(text) or not _is_rest_whitespace(file):
    raise InputError(
      f"{name}: something follows the list of rows, which ends at byte {base + offset + 1:,}; give "
      "only one list, or one row on each line (.jsonl)"
    )


def _check_rest_may_complete(error, text, base, name, num_read):
  """Raises an `InputError` unless the text that could not be parsed may continue in the file."""
  if isinstance(error, RecursionError):
    raise _broken(name, num_read, base) from error
  ends_early = error.msg.startswith("Unterminated") or error.pos + _LONGEST_ESCAPE >= len(text)
  if not ends_early:
    raise _broken(name, num_read, base + error.pos) from error


def _broken(name, num_read, offset):
  return InputError(
    f"{name}: broken JSON at byte {offset:,}, after {num_read:,} rows; correct it, or write one "
    "row on each line (.jsonl), so that a broken row does not affect the others"
  )
