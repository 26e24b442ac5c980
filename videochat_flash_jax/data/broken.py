"""Why a row of training data cannot be used: one word for it everywhere.

The checker's table, the counts of a training run and its log all speak of the same reasons.
"""

import contextlib
import os
from collections.abc import Iterator

from videochat_flash_jax.data.media_files import exists
from videochat_flash_jax.errors import InputError

REASONS = (
  "bad json",  # the line is no JSON object
  "bad conversations",  # missing, empty, no answered question, or turns of another form
  "placeholders",  # not as many `<image>` as videos and images
  "bad media field",  # the file's kind of medium is missing, or is no path or list of paths
  "bad times",  # start and end are no times, negative, in the wrong order, or outside the video
  "outside data_root",  # the path climbs out of its folder
  "missing file",
  "unreadable video",
  "unreadable image",
  "no frames",  # a video without a frame
  "no features",  # the feature store has none of the row's video or image
  "too long",  # no answer is left in the tokens of a row
)


class BrokenRow(InputError):
  """A row that cannot be used; others can, so that no run need stop for it.

  Attributes:
    reason: one of `REASONS`; the message begins with it.
  """

  def __init__(self, reason: str, detail: str):
    if reason not in REASONS:
      raise ValueError(f"reason {reason!r} is none of {REASONS}")
    super().__init__(f"{reason}: {detail}")
    self.reason = reason
    self._detail = detail

  def __reduce__(self):
    return BrokenRow, (self.reason, self._detail)  # it crosses processes


@contextlib.contextmanager
def because(reason: str, *paths: str | os.PathLike) -> Iterator[None]:
  """What cannot be used inside, an `InputError`, breaks the row: `reason`.

      with because("unreadable video", path), open_video(path) as video: ...

  If one of `paths` does not exist, that is the reason: "missing file". Errors of the system pass,
  but for this one: they may not last.
  """
  try:
    yield
  except BrokenRow:
    raise
  except (InputError, FileNotFoundError) as error:
    missing = isinstance(error, FileNotFoundError) or not all(map(exists, paths))
    raise BrokenRow("missing file" if missing else reason, str(error)) from error
