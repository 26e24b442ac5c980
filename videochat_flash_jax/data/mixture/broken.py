"""The reasons why a row of training data cannot be used.

The report of `vcflash data check`, the counts of a training run and its log all use these reasons.
"""

import contextlib
from collections.abc import Iterator

from videochat_flash_jax.data.media.video_timeline import NoFrames
from videochat_flash_jax.data.text.conversation import WrongPlaceholders
from videochat_flash_jax.errors import InputError, one_line

REASONS = (
  "bad json",  # the line is not a JSON object
  "bad conversations",  # missing, no question with an answer, turns of another form, no UTF-8
  "placeholders",  # the number of `<image>` is not that of videos and images
  "bad media field",  # the medium of the file's kind is missing, or is not a path or list of paths
  "bad times",  # start and end are not times, negative, in the wrong order, or outside the video
  "outside data_root",  # the path leads out of its folder
  "missing file",
  "unreadable video",
  "unreadable image",
  "no frames",  # the header of the video can be read, but no frame follows it
  "no features",  # the feature store has no features of the row's video or image
  "too long",  # the tokens of the training row have no room for an answer
  "differs between hosts",  # processes that share a training row read other frames or tokens
)


_REASONS_OF_KINDS = {
  "video": "unreadable video", "image": "unreadable image", "text": "bad conversations"
}  # fmt: skip


class BrokenRow(InputError):
  """The error of a row that cannot be used. Other rows can be, so a training run need not stop.

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
    return BrokenRow, (self.reason, self.detail)  # so that it can be sent to another process


@contextlib.contextmanager
def because(reason: str) -> Iterator[None]:
  """Turns an `InputError` inside the block into a `BrokenRow` with this reason.

      with because("unreadable video"), open_video(path) as video: ...

  If a file was not found, the reason becomes "missing file"; if a video has no frames, "no frames";
  and if a row has a wrong number of placeholders, "placeholders". Other errors are not changed.
  """
  try:
    yield
  except BrokenRow:
    raise
  except (InputError, FileNotFoundError) as error:
    if isinstance(error, NoFrames):
      reason = "no frames"
    elif isinstance(error, WrongPlaceholders):
      reason = "placeholders"
    elif any(isinstance(e, FileNotFoundError) for e in (error, error.__cause__)):
      reason = "missing file"
    raise BrokenRow(reason, str(error)) from error


@contextlib.contextmanager
def any_error_breaks(kind: str) -> Iterator[None]:
  """Turns an error inside the block into a `BrokenRow`, because nobody knows which ones may come.

  An `InputError` is not changed: it is a `BrokenRow` already, or no single row causes it.

  Args:
    kind: what the row shows: "video", "image" or "text".
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    problem = f"{type(error).__name__}: {error}"
    raise BrokenRow(_REASONS_OF_KINDS[kind], problem) from error
