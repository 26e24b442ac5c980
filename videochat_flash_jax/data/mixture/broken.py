"""Why a row of training data cannot be used: one word for it everywhere.

The checker's table, the counts of a training run and its log all speak of the same reasons.
"""

import contextlib
from collections.abc import Iterator

from videochat_flash_jax.data.media.video_timeline import NoFrames
from videochat_flash_jax.errors import InputError, one_line

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
  "no frames",  # of a video: its header is sound, and nothing follows
  "no features",  # the feature store has none of the row's video or image
  "too long",  # no answer is left in the tokens of a row
)


class BrokenRow(InputError):
  """A row that cannot be used; others can, so that no run need stop for it.

  Attributes:
    reason: one of `REASONS`; the message begins with it.
    detail: the rest of the message.
  """

  def __init__(self, reason: str, detail: str):
    if reason not in REASONS:
      raise ValueError(f"reason {reason!r} is none of {REASONS}")
    super().__init__(f"{reason}: {detail}")
    self.reason = reason
    self.detail = one_line(detail)

  def __reduce__(self):
    return BrokenRow, (self.reason, self.detail)  # it crosses processes


@contextlib.contextmanager
def because(reason: str) -> Iterator[None]:
  """What cannot be used inside, an `InputError`, breaks the row: `reason`.

      with because("unreadable video"), open_video(path) as video: ...

  If a file was not found, that is the reason: "missing file"; of a video without frames it is "no
  frames". Other errors of the system pass: they may not last.
  """
  try:
    yield
  except BrokenRow:
    raise
  except (InputError, FileNotFoundError) as error:
    if isinstance(error, NoFrames):
      reason = "no frames"
    elif any(isinstance(e, FileNotFoundError) for e in (error, error.__cause__)):
      reason = "missing file"
    raise BrokenRow(reason, str(error)) from error
