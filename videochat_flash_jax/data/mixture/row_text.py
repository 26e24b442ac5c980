"""The rows of an annotation file of any size, one after the other, with their place in it."""

import json
import math
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from videochat_flash_jax.errors import InputError

_PIECE_BYTES = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")
_LONGEST_ESCAPE = 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MOST_DIGITS = 4300  # Python makes no number of more; yet it has to be told where the row ends
_decoder = json.JSONDecoder(
  parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else math.inf
)


class RowText(NamedTuple):
  """A row: where it starts (bytes), its text, and what that means; None if it is no JSON."""

  start: int
  text: bytes
  row: object


def parse_row(text: bytes) -> object:
  """What a row's JSON means, or None if it is none."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
    return None


def rows_of_file(file: BinaryIO, name: str) -> Iterator[RowText]:
  """Yields the rows of a JSON list, or of a file with one JSON object on each line.

  Which of the two it is shows in the beginning, not in the file's name: a list opens with `[`. But
  where the first line is a whole list and others follow, it is a broken row among rows. No more
  than a piece of the file and one row are held.

  Raises:
    InputError: a list's JSON is broken, so that where its rows begin cannot be told, or something
      follows it.
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
  """Whether the first line that is not blank is a whole list, and not all that there is."""
  line = file.readline(_PIECE_BYTES)
  while line.isspace():
    line = file.readline(_PIECE_BYTES)
  return line.endswith(b"\n") and parse_row(line) is not None and not _is_rest_blank(file)


def _is_rest_blank(file):
  return all(piece.isspace() for piece in iter(lambda: file.read(_PIECE_BYTES), b""))


def _lines(file, start):
  for line in file:
    if not line.isspace():
      text = line.rstrip(b"\r\n")
      yield RowText(start, text, parse_row(text))
    start += len(line)


def _list_elements(file, name, start):
  """Yields the elements of a list, parsing piece by piece.

  A piece is decoded as Latin-1, in which a character is a byte: places in the text are places in
  the file. All that structures JSON is ASCII, and an element that is not is decoded again.
  """
  text, base, place = file.read(_PIECE_BYTES).decode("latin-1"), start, 0
  place = text.index("[") + 1
  num_read = 0
  while True:
    place = _BLANKS.match(text, place).end()
    if text[place : place + 1] == "]":
      break
    try:
      value, end = _decoder.raw_decode(text, place)
      after = _BLANKS.match(text, end).end()
      follower = text[after : after + 1]
    except (json.JSONDecodeError, RecursionError) as error:
      _refuse_broken(error, text, base, name, num_read)
      follower = ""
    if follower and follower in ",]":
      raw = text[place:end].encode("latin-1")
      yield RowText(base + place, raw, value if raw.isascii() else parse_row(raw))
      num_read += 1
      if follower == "]":
        place = after
        break
      place = after + 1
    elif follower:
      raise _broken(name, num_read, base + after)
    else:  # the piece ends within the element
      more = file.read(max(_PIECE_BYTES, len(text) - place)).decode("latin-1")
      if not more:
        raise _broken(name, num_read, base + len(text))
      text, base, place = text[place:] + more, base + place, 0
  if _BLANKS.match(text, place + 1).end() < len(text) or not _is_rest_blank(file):
    raise InputError(
      f"{name}: something follows the list of rows, which ends at byte {base + place + 1:,}; give "
      "one list, or one row on each line (.jsonl)"
    )


def _refuse_broken(error, text, base, name, num_read):
  """Raises an `InputError` unless the rest of the file may complete what could not be parsed."""
  if isinstance(error, RecursionError):
    raise _broken(name, num_read, base) from error
  ends_early = error.msg.startswith("Unterminated") or error.pos + _LONGEST_ESCAPE >= len(text)
  if not ends_early:
    raise _broken(name, num_read, base + error.pos) from error


def _broken(name, num_read, place):
  return InputError(
    f"{name}: broken JSON at byte {place:,}, after {num_read:,} rows; mend it, or write one row on "
    "each line (.jsonl), where a broken one harms no other"
  )
