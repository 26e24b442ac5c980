"""Writes what the check of a mixture found, as a table or as JSON."""

from collections.abc import Sequence

from videochat_flash_jax.data.check.media_check import SourceReport
from videochat_flash_jax.data.mixture.broken import REASONS
from videochat_flash_jax.errors import one_line

_HEADER = "rows", "video", "image", "text", "words", "opened", "frames", "seconds", "broken", "file"


def as_json(reports: Sequence[SourceReport]) -> dict:
  """Returns all that was found: `rows`, `broken`, `by_reason`, and each of the `sources`."""
  by_reason = {
    reason: count
    for reason in REASONS
    if (count := sum(report.broken[reason] for report in reports))
  }
  return {
    "rows": sum(report.rows for report in reports),
    "broken": sum(by_reason.values()),
    "by_reason": by_reason,
    "sources": [vars(report) for report in reports],
  }


def as_table(reports: Sequence[SourceReport]) -> str:
  """Returns a table with a line for each source and one for all, then what is broken.

  For each source and each reason it gives the number of broken rows and a few of their names.
  """
  lines = [_cells(report, one_line(report.source)) for report in reports]
  if len(reports) > 1:
    total = SourceReport("all")
    for report in reports:
      total.add(report)
    lines.append(_cells(total, "all"))
  widths = [max(map(len, column)) for column in zip(_HEADER, *lines, strict=True)]
  text = [
    "  ".join(
      [cell.rjust(width) for cell, width in zip(line[:-1], widths, strict=False)] + [line[-1]]
    )
    for line in (_HEADER, *lines)
  ]
  for report in reports:
    text += findings(report)
  if not any(map(is_broken, reports)):
    text += ["", "nothing is broken"]
  return "\n".join(text)


def is_broken(report: SourceReport) -> bool:
  """Returns whether a source, or any of its rows, cannot be used."""
  return bool(report.problem or report.broken)


def findings(report: SourceReport) -> list[str]:
  """Returns lines about rows that are used otherwise than they may seem, and about broken ones.

  Broken rows are told by reason, with a few of their names. Each paragraph begins with an empty
  line.
  """
  source, text = one_line(report.source), []
  if report.damaged:
    text += ["", f"{report.damaged:,} damaged videos in {source}; they are used"]
  if report.half_clips:
    found = f"{report.half_clips:,} rows with only one of start and end in {source}"
    text += ["", f"{found}; the whole video is taken"]
  if report.cut:
    found = f"{report.cut:,} rows with answers too long for a training row in {source}"
    text += ["", f"{found}; a run cuts them"]
  if report.problem:
    text += ["", f"nothing of {source}", f"  {report.problem}"]
  for reason in REASONS:
    if count := report.broken[reason]:
      messages = report.offenders[reason]
      text += ["", f"{count:,} x {reason} in {source}"]
      text += [f"  {message}" for message in messages]
      text += [f"  and {count - len(messages):,} more"] if count > len(messages) else []
  return text


def _cells(report, name):
  kinds = [f"{report.kinds[kind]:,}" for kind in ("video", "image", "text")]
  return (
    f"{report.rows:,}",
    *kinds,
    f"{report.words:,}",
    f"{sum(report.opened.values()):,}",
    f"{report.frames:,}",
    f"{report.seconds:,.0f}",
    "all" if report.problem else f"{report.broken.total():,}",
    name,
  )
