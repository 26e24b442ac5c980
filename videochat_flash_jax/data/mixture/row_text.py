"""Reads the rows of an annotation file of any size sequentially, each with its byte offset."""

import codecs
import json
import math
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError

_PIECE_BYTES = 1 << 20
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_ESCAPE = 16
_UTF16_MARKS = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
# Python converts no integer with more digits. It must not fail here, so that the end of the row is
# found.
_MOST_DIGITS = 4300


class _KeyTwice(Exception):
  """An object of a row holds a key twice."""


def _object(pairs):
  """Makes the dict of a JSON object."""
  made = dict(pairs)
  if len(made) < len(pairs):
    keys = [key for key, _ in pairs]
    raise _KeyTwice(next(key for key in keys if keys.count(key) > 1))
  return made


def _parse_int(digits):
  return int(digits) if len(digits) <= _MOST_DIGITS else math.inf


_decoder = json.JSONDecoder(object_pairs_hook=_object)
_end_decoder = json.JSONDecoder(parse_int=_parse_int)


class RowText(NamedTuple):
  """One row: the byte where it starts, its text, and what `parse_row` returns for it."""

  start: int
  text: bytes
  row: object


def parse_row(text: bytes) -> object:
  """Parses a row's JSON; if it cannot be used, returns a `BrokenRow` that says why."""
  try:
    return _decoder.decode(text.decode("utf-8-sig"))
  except _KeyTwice as error:
    problem = f"key {error.args[0]!r:.100} stands twice; remove one of them"
  except UnicodeDecodeError:
    problem = "not valid UTF-8; save the file as UTF-8, or remove the line"
  except (ValueError, RecursionError):
    problem = "not a JSON object; correct or remove the line"
  return BrokenRow("bad json", problem)


def rows_of_file(file: BinaryIO, name: str) -> Iterator[RowText]:
  """Yields the rows of a JSON list, or of a file with one JSON object on each line.

  The content decides which of the two it is, not the file's name: a list begins with `[`. There is
  one exception. If the first line is a complete list and other lines follow, it is a broken row of
  a file with one row on each line. No more than one piece of the file and one row are kept in
  memory.

  Raises:
    InputError: the JSON of a list is broken, so that the start of the next row is unknown, or
      something follows the list; or the file is UTF-16.
  """
  mark = file.read(len(codecs.BOM_UTF8))
  if mark.startswith(_UTF16_MARKS):
    raise InputError(f"{name}: the text is UTF-16; save it as UTF-8")
  start = len(mark) if mark == codecs.BOM_UTF8 else 0
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
  is_json = line.endswith(b"\n") and not isinstance(parse_row(line), BrokenRow)
  return is_json and not _is_rest_whitespace(file)


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
  offset in the file. All characters that structure JSON are ASCII, so the end of an element can be
  found; then its bytes are parsed.
  """
  text, base = file.read(_PIECE_BYTES).decode("latin-1"), start
  offset = text.index("[") + 1
  num_read = 0
  while True:
    offset = _WHITESPACE.match(text, offset).end()
    if text[offset : offset + 1] == "]":
      break
    try:
      _, end = _end_decoder.raw_decode(text, offset)
      after = _WHITESPACE.match(text, end).end()
      follower = text[after : after + 1]
    except (json.JSONDecodeError, RecursionError) as error:
      _check_rest_may_complete(error, text, base, name, num_read)
      follower = ""
    if follower and follower in ",]":
      raw = text[offset:end].encode("latin-1")
      yield RowText(base + offset, raw, parse_row(raw))
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
