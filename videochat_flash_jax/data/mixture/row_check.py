"""Checks an annotation row without opening its media."""

from collections.abc import Mapping

from videochat_flash_jax.data.mixture.annotations import (
  annotated_clip,
  kind_of,
  media_paths,
  nearest,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow, because
from videochat_flash_jax.data.mixture.mixture import VIDEO_READ_TYPES
from videochat_flash_jax.data.text.conversation import placed_turns


def check_row(row: object) -> None:
  """Checks all of a LLaVA row that can be checked without its media and their folder.

  Raises:
    BrokenRow: the row cannot be used.
  """
  check_object(row)
  kind = kind_of(row)
  if kind != "text":
    media_paths(row, kind)
  if row.get("image") is not None and row.get("video") is not None:
    raise BrokenRow("bad media field", "fields 'image' and 'video'; give one of them")
  word = row.get("video_read_type")
  if word is not None and word not in VIDEO_READ_TYPES:
    hint = nearest(str(word), VIDEO_READ_TYPES)
    raise BrokenRow("bad media field", f"field 'video_read_type' is {word!r:.100}; {hint}")
  with because("bad conversations"):
    placed_turns(row)
  with because("bad times"):
    clip = annotated_clip(row)
  if clip and clip[0] < 0:
    raise BrokenRow("bad times", f"field 'start' is {clip[0]:g}; correct the times")


def check_object(row: object) -> None:
  """Raises a `BrokenRow` if a row is one, as `parse_row` returns it, or not a JSON object."""
  if isinstance(row, BrokenRow):
    raise row
  if not isinstance(row, Mapping):
    raise BrokenRow("bad json", "not a JSON object; correct or remove the line")
