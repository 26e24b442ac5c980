"""A mixture in which much is broken, each row in a known way, among healthy rows.

videos.jsonl   healthy rows, all broken rows, and a row for each broken video
pictures.json  healthy rows with one image or two
texts.jsonl    healthy rows without media
"""

import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from tests.data.media.video_files import pictures, write_video

QUESTION, ANSWER = "<image>\nWhat is to be seen?", "A thing that moves about."


class Mutated(NamedTuple):
  """A mixture's path, and what is to be expected of its rows, by their labels."""

  path: Path
  expected: dict[str, str]  # why a row is broken
  healthy: list[str]
  doubtful: list[str]  # a damaged video that may be readable in part: any outcome but a crash


def turns(*texts):
  roles = ("human", "gpt") * len(texts)
  return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


def _row(label, video):
  return {"id": label, "video": video, "conversations": turns(QUESTION, ANSWER)}


# How a row is broken: name, reason, and what replaces its fields; or, as text, the whole row.
ROWS = [
  ("json cut short", "bad json", '{"id": "cut", "video": "0.mp4", "conver'),
  ("no object", "bad json", '["0.mp4"]'),
  ("not UTF-8", "bad json", '{"id": "\udcff"}'),
  ("no conversations", "bad conversations", {"conversations": None}),
  ("empty conversations", "bad conversations", {"conversations": []}),
  ("conversations of texts", "bad conversations", {"conversations": [QUESTION, ANSWER]}),
  ("unknown role", "bad conversations", {"conversations": [{"from": "user", "value": QUESTION}]}),
  ("no text", "bad conversations", {"conversations": [{"from": "human", "value": 3}]}),
  ("no answer", "bad conversations", {"conversations": turns(QUESTION)}),
  ("no image token", "placeholders", {"conversations": turns("What is it?", ANSWER)}),
  ("two image tokens", "placeholders", {"conversations": turns(f"<image>{QUESTION}", ANSWER)}),
  ("no video field", "bad media field", {"video": None}),
  ("a number for a path", "bad media field", {"video": 3}),
  ("an empty path", "bad media field", {"video": ""}),
  ("a path that climbs out", "outside data_root", {"video": "../../0.mp4"}),
  ("a path of its own", "outside data_root", {"video": "/etc/passwd"}),
  ("start after end", "bad times", {"start": 2, "end": 1}),
  ("negative times", "bad times", {"start": -2, "end": -1}),
  ("negative start", "bad times", {"start": -2, "end": 1}),
  ("times in words", "bad times", {"start": "one", "end": "two"}),
  ("beyond the end", "bad times", {"start": 1000, "end": 1010}),
  ("no such file", "missing file", {"video": "nothing.mp4"}),
]


def _cut_short(path, healthy, rng):
  data = healthy.read_bytes()  # the index of an mp4 is at its end
  path.write_bytes(data[: int(rng.integers(10, len(data) * 3 // 4))])


def _flip_bits_of_index(path, healthy, rng):
  data = bytearray(healthy.read_bytes())
  for box in (b"moov", b"trak", b"mdia", b"stbl"):
    place = data.index(box)
    data[place] ^= 1 << int(rng.integers(8))
  path.write_bytes(data)


def _flip_bits_of_pictures(path, healthy, rng):
  data = bytearray(healthy.read_bytes())
  start, stop = data.index(b"mdat") + 64, data.index(b"moov") - 64
  for place in rng.integers(start, stop, 20):
    data[place] ^= 1 << int(rng.integers(8))
  path.write_bytes(data)


def _write_text(path, healthy, rng):
  path.write_text("No video at all.\n" * int(rng.integers(1, 100)))


def _write_nothing(path, healthy, rng):
  path.write_bytes(b"")


def _make_folder(path, healthy, rng):
  path.mkdir()


def _write_noise(path, healthy, rng):
  # In some hundred bytes FFmpeg may see the header of a format, and nothing behind it.
  path.write_bytes(rng.bytes(int(rng.integers(1000, 5000))))


def _write_header_only(path, healthy, rng):
  with av.open(str(path), "w", format="matroska") as container:
    container.add_stream("libx264", rate=10).pix_fmt = "yuv420p"
    container.start_encoding()


# How a video is broken: name, reason (None if it may be readable in part), and who writes it.
VIDEOS = [
  ("truncated", "unreadable video", _cut_short),
  ("bit-flipped index", "unreadable video", _flip_bits_of_index),
  ("bit-flipped pictures", None, _flip_bits_of_pictures),
  ("wrong extension", "unreadable video", _write_text),
  ("zero bytes", "unreadable video", _write_nothing),
  ("folder", "unreadable video", _make_folder),
  ("noise", "unreadable video", _write_noise),
  ("0 frames", "no frames", _write_header_only),
]


def write_mutated_mixture(
  folder: Path, num_rows: int, num_videos: int, num_healthy: int, seed: int
) -> Mutated:
  """Writes `num_rows` broken rows, as many broken videos with a row each, and healthy rows.

  Of these half are videos, a quarter pictures and a quarter texts. Broken rows are of all kinds in
  turn, and lie among the healthy ones at random.
  """
  rng = np.random.default_rng(seed)
  media = folder / "media" / "below"
  media.mkdir(parents=True)
  sizes = (8, 16, 24, 40)
  for number, size in enumerate(sizes):
    write_video(media / f"{number}.mp4", pictures(size), codec="mpeg4")
    Image.fromarray(pictures(2)[number % 2]).save(media / f"{number}.png")
  rows, expected, healthy, doubtful = [], {}, [], []
  for number in range(num_rows):
    name, reason, change = ROWS[number % len(ROWS)]
    label = f"{name} {number}"
    rows.append((label, reason, change if isinstance(change, str) else _changed(label, change)))
  for number in range(num_videos):
    name, reason, write = VIDEOS[number % len(VIDEOS)]
    label = f"{name} {number}"
    write(media / f"{label}.mp4", media / f"{number % len(sizes)}.mp4", rng)
    rows.append((label, reason, json.dumps(_row(label, f"{label}.mp4"))))
  num_pictures = num_texts = num_healthy // 4
  for number in range(num_healthy - num_pictures - num_texts):
    label = f"healthy video {number}"
    clip = {"start": 0.5, "end": 0.8} if number % 4 == 3 else {}
    row = {**_row(label, f"{number % len(sizes)}.mp4"), **clip}
    rows.append((label, "", json.dumps(row, ensure_ascii=False)))
  lines = []
  for number, place in enumerate(rng.permutation(len(rows))):
    label, reason, line = rows[place]
    if reason == "bad json":
      label = f"row {number + 1}"
    if reason:
      expected[label] = reason
    else:
      (doubtful if reason is None else healthy).append(label)
    lines.append(line)
  text = "\n".join(lines) + "\n"
  (folder / "videos.jsonl").write_bytes(text.encode(errors="surrogateescape"))
  healthy += _write_pictures(folder / "pictures.json", num_pictures)
  healthy += _write_texts(folder / "texts.jsonl", num_texts)
  return Mutated(_write_mixture(folder), expected, healthy, doubtful)


def _changed(label, change):
  row = _row(label, "0.mp4") | change
  return json.dumps({field: value for field, value in row.items() if value is not None})


def _write_pictures(path, num_rows):
  rows = []
  for number in range(num_rows):
    names = [f"{place % 4}.png" for place in range(number, number + 1 + number % 2)]
    question = "<image>" * len(names) + "What is here?"
    rows.append(
      {
        "id": f"healthy picture {number}",
        "image": names if len(names) > 1 else names[0],
        "conversations": turns(question, ANSWER),
      }
    )
  path.write_text(json.dumps(rows, indent=1))
  return [row["id"] for row in rows]


def _write_texts(path, num_rows):
  rows = [
    {"id": f"healthy text {number}", "conversations": turns(f"How many are {number}?", str(number))}
    for number in range(num_rows)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return [row["id"] for row in rows]


def _write_mixture(folder):
  entries = [("videos.jsonl", "video"), ("pictures.json", "image"), ("texts.jsonl", "text")]
  lines = ["datasets:"]
  for name, media_type in entries:
    if _has_rows(folder / name):
      lines += [f"  - json_path: {name}", "    data_root: media/below"]
      lines += [f"    media_type: {media_type}"]
  path = folder / "mixture.yaml"
  path.write_text("\n".join(lines) + "\n")
  return path


def _has_rows(path):
  """Whether a file has any row."""
  return path.read_text(errors="replace").strip() not in ("", "[]")
