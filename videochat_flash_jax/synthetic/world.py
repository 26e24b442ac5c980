"""Draws scenes of the synthetic world, asks questions about them, and writes them to files.

A video lasts a whole number of seconds. The background is a moving texture with some grey or brown
clutter. In front of it up to twelve things appear, move and disappear, one after the other. No two
things of a video are of the same kind, so a question can name one of them:

  seconds   0  1  2  3  4  5  6  7
  events    [ red star ][key][  ][ blue moon ...   "What colour is the key?" -> its colour
"""

import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path as FilePath

import av
import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.media.files import is_address, open_media
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.synthetic.render import (
  COLOURS,
  Clutter,
  Event,
  Path,
  Scene,
  Texture,
  render,
)
from videochat_flash_jax.synthetic.shapes import KINDS

MAX_EVENTS = 12
MAX_EVENT_SECONDS = 8
MAX_SECONDS = 24 * 60 * 60
# The length of a video is a multiple of this, so that every clip of four frames is full.
CLIP_SECONDS = 4
VIDEO_SIZE = 192
VIDEO_FPS = 8
QUESTION_KINDS = ("attribute", "absence")
_COMMENT = "made by vcflash synth"

_COLOUR_NAMES = tuple(COLOURS)
_ATTRIBUTE_WORDINGS = (
  "What colour is the {0}?",
  "What color is the {0}?",
  "Which colour does the {0} have?",
  "Which color is the {0} in the video?",
  "A {0} moves through the video. What is its colour?",
  "Tell me the colour of the {0}.",
)
_ABSENCE_WORDINGS = (
  "Is there a {0} in the video?",
  "Does a {0} appear?",
  "Can you see a {0}?",
)


@dataclass(frozen=True)
class Question:
  """A question about a scene, with its answer; `kind` is one of QUESTION_KINDS."""

  kind: str
  text: str
  answer: str


def draw_scene(rng: np.random.Generator, num_seconds: int) -> Scene:
  """Draws a random scene of `num_seconds`: about one event in 3 to 8 seconds, but at most 12."""
  max_events = min(MAX_EVENTS, max(2, num_seconds // 3))
  num_events = int(rng.integers(min(max_events, max(2, num_seconds // 8)), max_events + 1))
  lengths = rng.integers(1, MAX_EVENT_SECONDS + 1, num_events)
  while lengths.sum() > num_seconds:
    lengths[rng.choice(np.flatnonzero(lengths > 1))] -= 1
  # The remaining seconds go to a few gaps between events; most events follow each other directly.
  spare = num_seconds - int(lengths.sum())
  open_gaps = rng.choice(num_events + 1, min(num_events + 1, 1 + num_events // 4), replace=False)
  gaps = np.zeros(num_events + 1, int)
  gaps[open_gaps] = rng.multinomial(spare, np.full(len(open_gaps), 1 / len(open_gaps)))
  starts = np.cumsum(gaps[:-1]) + np.concatenate([[0], np.cumsum(lengths)[:-1]])
  kinds = rng.choice(len(KINDS), num_events, replace=False)
  return Scene(
    num_seconds=num_seconds,
    texture=_draw_texture(rng),
    clutter=tuple(_draw_clutter(rng) for _ in range(rng.integers(1, 5))),
    events=tuple(
      _draw_event(rng, int(kind), int(start), int(length))
      for kind, start, length in zip(kinds, starts, lengths, strict=True)
    ),
  )


def _draw_texture(rng: np.random.Generator) -> Texture:
  """Draws stripes, plaid, honeycomb or clouds in two muted colours."""
  num_waves = int(rng.integers(1, 5))
  if num_waves == 4:  # Clouds: waves of different directions and wavelengths.
    angles = rng.uniform(0, 2 * np.pi, 4)
    cycles = rng.uniform(0.5, 3.0, 4)
  else:
    angles = rng.uniform(0, np.pi) + np.arange(4) * np.pi / max(num_waves, 2)
    cycles = np.full(4, rng.uniform(1.0, 4.5))
  base = rng.uniform(50, 190) + rng.uniform(-35, 35, 3)
  contrast = rng.uniform(10, 35) * rng.choice([-1, 1]) + rng.uniform(-12, 12, 3)
  return Texture(
    waves=np.stack([np.cos(angles), np.sin(angles)], axis=1) * cycles[:, None],
    drift=rng.uniform(-0.3, 0.3, 4),
    phase=rng.uniform(0, 1, 4),
    weight=(np.arange(4) < num_waves) / num_waves,
    sharpness=float(rng.uniform(1.0, 5.0)),
    colours=np.clip(np.stack([base - contrast, base + contrast]), 10, 240),
  )


def _draw_path(rng, low, high, max_speed, wiggle) -> Path:
  corner = rng.uniform(low, high, (2, 2))
  span = np.maximum(np.abs(corner[0] - corner[1]), 0.05)
  return Path(
    low=corner.min(axis=0),
    high=corner.max(axis=0),
    speed=np.minimum(rng.uniform(0.3, 1.0, 2) * max_speed / span, 1.5),
    phase=rng.uniform(0, 2, 2),
    wiggle=(float(rng.uniform(0, wiggle)), float(rng.uniform(0.3, 1.2))),
  )


def _draw_clutter(rng: np.random.Generator) -> Clutter:
  grey = rng.uniform(40, 200)
  brown = rng.uniform(0, 1)  # 0 is grey, 1 is brown.
  half_size = rng.uniform(0.01, 0.10, 2)
  return Clutter(
    path=_draw_path(rng, 0.05, 0.95, 0.2, 0.02),
    half_size=half_size,
    rounding=float(rng.uniform(0.01, 0.06)),
    turn=(float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(-0.6, 0.6))),
    colour=grey * (1 + brown * np.array([0.12, -0.08, -0.28])),
  )


def _draw_event(rng: np.random.Generator, kind: int, start: int, length: int) -> Event:
  radius = float(rng.uniform(0.21, 0.30))
  angle = rng.uniform(0, 2 * np.pi)
  slides = rng.random() < 0.5
  dark = rng.random() < 0.7
  fill = np.array(COLOURS[_COLOUR_NAMES[colour := int(rng.integers(len(COLOURS)))]], float)
  return Event(
    kind=kind,
    colour=colour,
    start=start,
    length=length,
    path=_draw_path(rng, radius, 1 - radius, 0.4, 0.03),
    radius=radius,
    slide=slides * np.array([np.cos(angle), np.sin(angle)]),
    tilt=(float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0, 0.2)), float(rng.uniform(0.2, 1))),
    fill=np.clip(fill * rng.uniform(0.88, 1.08) + rng.uniform(-12, 12, 3), 0, 255),
    outline=np.full(3, rng.uniform(0, 40) if dark else rng.uniform(225, 255)),
  )


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> list[Question]:
  """Returns all questions of one kind about a scene, in random order, each about another thing.

  "attribute" asks for the colour of a thing that appears. "absence" asks whether a kind of thing
  appears; there are as many "no" as "yes" answers, if enough kinds do not appear.

  Raises:
    InputError: the kind of question is unknown.
  """
  shown = [KINDS[event.kind] for event in scene.events]
  questions = []

  def add(wordings, thing, answer):
    """Adds a question about a thing, in one of the wordings."""
    questions.append(Question(kind, str(rng.choice(wordings)).format(thing), answer))

  if kind == "attribute":
    for event in scene.events:
      add(_ATTRIBUTE_WORDINGS, KINDS[event.kind], _COLOUR_NAMES[event.colour])
  elif kind == "absence":
    missing = [name for name in KINDS if name not in shown]
    num_each = min(len(shown), len(missing))
    for things, answer in ((shown, "yes"), (missing, "no")):
      for thing in rng.permutation(things)[:num_each]:
        add(_ABSENCE_WORDINGS, thing, answer)
  else:
    raise InputError(f"unknown question kind {kind!r:.80}: choose from {', '.join(QUESTION_KINDS)}")
  rng.shuffle(questions)
  return questions


def draw_num_frames(rng: np.random.Generator, min_frames: int, max_frames: int) -> int:
  """Draws a multiple of CLIP_SECONDS from `min_frames` to `max_frames`, both included.

  Raises:
    InputError: the range contains no such number, or the video would last more than a day.
  """
  if max_frames > MAX_SECONDS:
    raise InputError(
      f"a video of {max_frames} frames, one a second, lasts more than a day; give fewer"
    )
  low, high = -(-min_frames // CLIP_SECONDS), max_frames // CLIP_SECONDS
  if min_frames < 1 or low > high:
    raise InputError(
      f"no multiple of {CLIP_SECONDS} lies in the range of frames {min_frames}:{max_frames}; "
      f"give a range that contains one, such as 8:64"
    )
  return CLIP_SECONDS * int(rng.integers(low, high + 1))


def write_video(scene: Scene, path: FilePath):
  """Writes a scene as an H.264 mp4 of 192 x 192 pixels and 8 frames a second."""
  with av.open(f"file:{path}", "w") as container:  # a colon in the path begins no address then
    container.metadata["comment"] = _COMMENT
    stream = container.add_stream("libx264", rate=VIDEO_FPS)
    stream.width = stream.height = VIDEO_SIZE
    stream.pix_fmt = "yuv420p"
    stream.options = {
      "crf": "23",
      "preset": "veryfast",
      # Otherwise the bytes depend on the processor, and even on the memory address of a frame.
      "x264-params": "cpu-independent=1",
    }
    stream.codec_context.time_base = Fraction(1, VIDEO_FPS)
    for second in range(scene.num_seconds):
      moments = second + (np.arange(VIDEO_FPS) + 0.5) / VIDEO_FPS
      for picture in render(scene, moments, VIDEO_SIZE)[0]:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())


def is_synthetic(path: str | os.PathLike) -> bool:
  """Whether a file or an address is a video of `write_video`, or a conversion of one."""
  try:
    with av.open(open_media(path) if is_address(path) else f"file:{path}") as container:
      return container.metadata.get("comment") == _COMMENT
  except (av.error.FFmpegError, OSError, InputError):
    return False


def write_dataset(
  out: FilePath,
  num_videos: int,
  frames: tuple[int, int],
  seed: int,
  question_kinds: tuple[str, ...] = ("attribute",),
  questions_per_video: int = 4,
) -> int:
  """Writes `out/videos/*.mp4` and `out/annotations.json` (LLaVA rows, one question each).

  Video i depends only on (seed, i). Its questions are taken from each of `question_kinds` in turn.
  A video with fewer events than questions gets fewer rows.

  Args:
    out: the directory to write.
    num_videos: number of videos.
    frames: smallest and largest number of frames of a video, at one frame a second.
    seed: seed of everything that is drawn.
    question_kinds: kinds of questions, out of QUESTION_KINDS.
    questions_per_video: number of questions about each video.

  Returns:
    The number of annotation rows.

  Raises:
    InputError: `out` already holds annotations or cannot be written, or a range or a kind cannot be
      used.
  """
  annotations = out / "annotations.json"
  if os.path.exists(annotations):  # unlike Path.exists, it does not raise for a path too long
    raise InputError(f"{annotations} exists: give another --out, or remove that directory first")
  # This finds a range or a kind that cannot be used before anything is written.
  rng = np.random.default_rng(seed)
  for kind in question_kinds:
    ask(draw_scene(rng, draw_num_frames(rng, *frames)), rng, kind)
  try:
    (out / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(num_videos), "writing videos", unit="video", leave=False, disable=None):
      rng = np.random.default_rng([seed, index])
      scene = draw_scene(rng, draw_num_frames(rng, *frames))
      name = f"videos/{index:04d}.mp4"
      write_video(scene, out / name)
      decks = [ask(scene, rng, kind) for kind in question_kinds]
      dealt = [deck[turn] for turn in range(MAX_EVENTS * 2) for deck in decks if turn < len(deck)]
      for number, question in enumerate(dealt[:questions_per_video]):
        rows.append(_row(f"{index:04d}-{number}", name, question))
    partial = annotations.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.rename(annotations)
  except OSError as error:  # FFmpeg's write errors are also of this class
    raise InputError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
  return len(rows)


def _row(identity: str, video: str, question: Question) -> dict:
  return {
    "id": identity,
    "video": video,
    "kind": question.kind,
    "conversations": [
      {"from": "human", "value": f"<image>\n{question.text}"},
      {"from": "gpt", "value": question.answer},
    ],
  }
