"""Conversations: questions and answers about videos, about images, or about neither."""

import contextlib
import functools
import itertools
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.features.feature_store import FeatureStore
from videochat_flash_jax.data.media.frame_source import FrameSource, is_array
from videochat_flash_jax.data.media.image_reader import ImageSource, read_image
from videochat_flash_jax.data.media.image_tiling import (
  choose_grid,
  cut_tiles,
  pad_to_square,
  sequence_order,
)
from videochat_flash_jax.data.media.open_source import Watchable, open_source
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.text.conversation import (
  PLACEHOLDER,
  VISUAL_SLOT,
  after_media,
  image_opening,
  inference_prompt,
  media_prompt,
)
from videochat_flash_jax.data.text.tokenizer import Tokenizer, stream_text
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import argument, count, flag, is_sequence, number, optional
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import video_features
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.inference.reading import Reading
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.inference.seen import Frame, Images, Video
from videochat_flash_jax.inference.turns import Stream, Turns
from videochat_flash_jax.inference.watching import (
  LEAST_WINDOW,
  Window,
  check_frames,
  read_groups,
  watch_frames,
)
from videochat_flash_jax.synthetic.world import is_synthetic

SHAPES_ONLY = (
  "this model knows the coloured things of `vcflash synth` only; what it says about other videos "
  "and images means nothing. A real model is VideoChat-Flash-Qwen2_5-2B_res448; docs/models.md "
  "tells which one fits your machine."
)
THUMBNAIL_SIZE = 224  # pixels
MAX_NEW_TOKENS = 256


class Conversation:
  """A conversation, about videos and images if there are any.

  All videos and images stand before the first question, in the order in which they were shown, even
  if there were questions between them.

  Every question continues the conversation; `reset` begins a new one. What was read is kept in KV
  caches, so a later question only costs its own tokens. Where attention to the question chooses
  which visual tokens stay, it also costs the layers above that choice.

  Threads may share a conversation: each call waits until those of other threads have ended, and
  streams of theirs are read, closed or forgotten.

  Attributes:
    history: the (question, answer) pairs so far.
    seen: the videos and images.
    prefill_seconds: wall time of reading the last question.
    decode_seconds: wall time of generating the last answer.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    features: FeatureStore | None = None,
    shapes_only: bool = False,
  ):
    """Begins a conversation.

    Args:
      engine: runs the model.
      tokenizer: the tokenizer of the model.
      features: keeps the output of the encoder.
      shapes_only: whether the model knows the synthetic world only; a video or an image from
        elsewhere then gets a warning.
    """
    self.history: list[tuple[str, str]] = []
    self.seen: list[Video | Images] = []
    self.prefill_seconds = self.decode_seconds = 0.0
    self._engine = engine
    self._tokenizer = tokenizer
    self._features = features
    self._shapes_only = shapes_only
    self._prefix: Prefix | None = None  # what the engine has read up to the last video or image
    self._num_seen = 0  # its length, without what follows the last video or image
    self._lead: list[int] = []  # ids behind it in the prefix, with which every question begins
    self._turns = Turns()
    self._reading: Reading | None = None
    self._cached: list[int] = []  # ids of the text in the reading's caches

  def ask(
    self,
    question: str | Sequence[str],
    *,
    stream: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> str | list[str] | Iterator[str]:
    """Answers the next question of the conversation, or several questions at once.

    Args:
      question: a text. Or a list of texts: each is answered as if it were the next question, all
        together in one batch, and the conversation stays as it is.
      stream: if True, return an iterator over pieces of the answer instead of the whole answer; for
        a single question only.
      max_new_tokens: the most tokens of an answer.
      temperature: 0 is greedy; see `Sampling`.
      top_p: sample from the most likely tokens whose probabilities sum to this.
      seed: of the sampling.

    Raises:
      InputError: a question is empty or no text, it does not fit into the context, or an option is
        not valid.
    """
    stream = argument("stream", stream, flag())
    max_new_tokens = argument("max_new_tokens", max_new_tokens, count())
    sampling = Sampling(temperature, top_p, seed).check()
    if isinstance(question, list | tuple):
      if stream:
        raise InputError("stream=True is for one question; ask them one by one, or leave it out")
      return self._answer_all(question, max_new_tokens, sampling)
    turn = self._turns.begin()
    end = functools.partial(self._turns.end, turn)
    try:
      ids = self._ids_of(question)
    except BaseException:
      end()
      raise
    pieces = Stream(self._answer(turn, question, ids, max_new_tokens, sampling), end)
    return pieces if stream else "".join(pieces)

  @property
  def cache_bytes(self) -> int:
    """Memory of the keys and values of the video or images; it is kept for the next question."""
    caches = () if self._prefix is None else self._prefix.caches
    return sum(x.nbytes for x in jax.tree.leaves(caches))

  def reset(self) -> None:
    """Begins a new conversation about the same video or images; nothing is encoded again."""
    with self._turns.one():
      self.history = []

  def watch(
    self,
    source: Watchable,
    max_frames: int | None = None,
    *,
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    window: int | None = None,
    stall_seconds: float | None = None,
    progress: bool = True,
  ) -> None:
    """Shows a video to the conversation; see `VideoChat.watch`.

    If an error or Ctrl-C stops it, the conversation stays as it was.
    """
    progress = argument("progress", progress, flag())
    window = argument("window", window, optional(count(LEAST_WINDOW)))
    if window is not None:
      self._engine.check_window()
      max_frames = sys.maxsize if max_frames is None else max_frames
    opened = open_source(
      source,
      sampling=self._engine.config.sampling,
      start=start,
      end=end,
      fps=fps,
      times=times,
      max_frames=max_frames,
      stall_seconds=stall_seconds,
      known_info=None if self._features is None else self._features.video_info,
    )
    self.watch_source(opened, window, progress=progress)

  def watch_source(
    self, source: FrameSource, window_frames: int | None = None, *, progress: bool = True
  ) -> None:
    """As `watch`, for a source that is open; it is closed at the end."""
    if self._shapes_only and source.path is not None and not is_synthetic(source.path):
      warnings.warn(SHAPES_ONLY, stacklevel=2)
    engine, config, began = self._engine, self._engine.config, time.perf_counter()
    window, quiet = None, None if progress else True  # None: tqdm shows a bar only on a terminal
    if window_frames is not None:
      window = Window(window_frames // config.vision.clip_frames, config.clip_tokens)
    named = f"watching {source.name}"
    bar = tqdm(desc=named, total=source.num_frames, unit="frame", leave=False, disable=quiet)
    with source, bar, self._showing(PLACEHOLDER, window) as (*text, _):
      prefix = self._prefix
      prefix.add_text(text)
      known = [count for count in (source.num_frames, window_frames) if count is not None]
      if known:
        check_frames(config, prefix, min(known))
      if self._features is None or source.path is None:
        frames = source.frames(config.vision.image_size)
        watch_frames(engine, prefix, frames, source.num_frames, window, bar.update)
      else:
        features = video_features(source, engine, self._features)
        groups = engine.project_groups(features)
        read_groups(engine, prefix, groups, source.num_frames, window, bar.update)
      video = Video(source.name, config.vision.clip_frames, window, prefix.num_forgotten)
      video.add(source, len(source.times))
      video.watch_seconds = time.perf_counter() - began
      self.seen.append(video)

  def look(self, images: ImageSource | Sequence[ImageSource]) -> None:
    """Shows an image, or several, to the conversation; see `VideoChat.look`."""
    images = images if isinstance(images, list | tuple) else [images]
    if not images:
      raise InputError("there is no image to look at; give at least one")
    if self._shapes_only:
      warnings.warn(SHAPES_ONLY, stacklevel=2)
    config = self._engine.config
    size = config.vision.image_size
    if len(images) > 1:
      tiles = (resize(pad_to_square(read_image(image)), size)[None] for image in images)
      visual_tokens, num_tiles = self._engine.encode(tiles), len(images)
    else:
      image = read_image(images[0])
      grid = choose_grid(image.shape[1], image.shape[0], config.tiling, size)
      tiles = cut_tiles(image, *grid, size)
      visual_tokens, num_tiles = self._engine.encode(tiles[:, None]), len(tiles)
      visual_tokens = visual_tokens[sequence_order(*grid, config.tile_tokens)]
    of_images = iter(np.split(visual_tokens, len(images)))
    with self._showing(image_opening(len(images))) as ids:
      for is_slot, tokens in itertools.groupby(ids, lambda token: token == VISUAL_SLOT):
        if is_slot:
          for _ in tokens:
            self._prefix.add_visual(next(of_images))
        else:
          self._prefix.add_text(list(tokens))
      self._prefix.settle()
      self.seen.append(Images(len(images), num_tiles))

  def extend(
    self, frames: Watchable, fps: float = 1.0, *, stall_seconds: float | None = None
  ) -> None:
    """Appends frames to the video that was seen last; only these are encoded and read.

    If an error stops it, all whole clips before it are kept. If Ctrl-C stops it, those that were
    read until then are; some frames may have been taken from the iterator or the queue, and are
    lost.

    Args:
      frames: whatever `VideoChat.watch` takes. An array or a list must have whole clips of 4
        frames. The last frame of an iterator, a queue or a video is repeated to fill its clip.
      fps: frames a second of `frames`; of a video, the most frames a second to watch.
      stall_seconds: see `VideoChat.watch`.

    Raises:
      InputError: `frames` is nothing of this kind, one of them cannot be read, `fps` is not
        positive, the context has no room for them, or no video was seen last.
    """
    config = self._engine.config
    clip_frames = config.vision.clip_frames
    fps = argument("fps", fps, number(above=0))
    source = open_source(
      frames,
      sampling=config.sampling,
      fps=fps,
      max_frames=sys.maxsize,
      stall_seconds=stall_seconds,
    )
    if (is_array(frames) or is_sequence(frames)) and len(frames) % clip_frames:
      raise InputError(
        f"{len(frames)} frames were given; give a multiple of {clip_frames}, or an iterator of "
        "them, whose last frame is repeated"
      )
    with self._turns.one(), source:
      video = self.seen[-1] if self.seen else None
      if not isinstance(video, Video):
        raise InputError("extend adds to the video that was seen last, and none was; watch one")
      self._forget_lead()
      before = self._num_watched()
      try:
        resized = source.frames(config.vision.image_size)
        watch_frames(self._engine, self._prefix, resized, source.num_frames, video.window)
      finally:
        video.add(source, self._num_watched() - before)
        video.num_forgotten = self._prefix.num_forgotten
        self._num_seen = self._prefix.num_tokens

  @contextlib.contextmanager
  def _showing(self, opening, window=None):
    """A block that reads a video or images behind those that were seen before.

    Yields the ids of the prompt from there on, up to the last slot of the opening.
    """
    with self._turns.one():
      if self.seen and (window or getattr(self.seen[0], "window", None)):
        raise InputError(
          "a window is for a conversation about one video; begin another conversation, or leave "
          "out the window"
        )
      if self._prefix is None:
        self._prefix = Prefix(self._engine)
      self._forget_lead()
      num_slots = self._opening().count(PLACEHOLDER)
      ids = np.array(media_prompt(self._tokenizer, self._opening() + opening))
      first = np.flatnonzero(ids == VISUAL_SLOT)[num_slots - 1] + 1 if num_slots else 0
      try:
        yield ids[first:].tolist()
      except BaseException:
        if self.seen:
          self._prefix.rewind(self._num_seen)
        else:
          self._prefix = None
        raise
      self._num_seen = self._prefix.num_tokens

  def _num_watched(self):
    """Frames whose tokens are in the prefix, or were."""
    config = self._engine.config
    num_tokens = int(self._prefix.is_visual.sum()) + self._prefix.num_forgotten
    return num_tokens // config.clip_tokens * config.vision.clip_frames

  def _opening(self):
    """The text before the first question, with one slot for each video or image."""
    return "".join(seen.opening for seen in self.seen)

  def _ids_of(self, question):
    """Ids of the text behind the last video or image, up to the start of the answer."""
    if not isinstance(question, str):
      raise InputError(f"the question is {question!r:.100}; give a text")
    return after_media(inference_prompt(question, self._tokenizer, self._opening(), self.history))

  def _behind(self, rows):
    """The prefix, if there is any, ready for questions; and what of their ids stands behind it.

    All questions begin with the same text, such as the length of the video. It is read once, with
    the prefix.
    """
    if self._prefix is None:
      return (), rows
    others = [
      after_media(inference_prompt(text, self._tokenizer, self._opening())) for text in "aZ"
    ]
    lead = functools.reduce(_common, [*rows, *others])
    if self._prefix.num_tokens == self._num_seen or lead[: len(self._lead)] != self._lead:
      self._forget_lead()
      self._prefix.add_text(lead)
      self._lead = lead
    self._prefix.settle()
    return (self._prefix,), [row[len(self._lead) :] for row in rows]

  def _forget_lead(self):
    """Takes the prefix back to the last video or image, for another opening or more frames."""
    if self._prefix.num_tokens > self._num_seen:
      self._prefix.rewind(self._num_seen)
    self._reading, self._cached, self._lead = None, [], []

  def _answer_all(self, questions, max_new_tokens, sampling):
    """The answers to several questions, each behind the same prefix and history."""
    if not questions:
      raise InputError("there is no question in the list; give at least one")
    with self._turns.one():
      behind, rows = self._behind([self._ids_of(question) for question in questions])
      reading = self._engine.read(rows, max_new_tokens, behind=behind)
      answers = self._engine.answers(reading, max_new_tokens, sampling)
    return [self._tokenizer.decode(tokens) for tokens in answers]

  def _answer(self, turn, question, ids, max_new_tokens, sampling):
    """Yields the answer in pieces of text, then adds question and answer to the history."""
    stop_ids = self._tokenizer.stop_ids
    new_ids = (t for t in self._generate(turn, ids, max_new_tokens, sampling) if t not in stop_ids)
    answer = ""
    for piece in stream_text(self._tokenizer, new_ids):
      answer += piece
      yield piece
    self._turns.check(turn)
    self.history.append((question, answer))

  def _generate(self, turn, ids, max_new_tokens, sampling):
    """Yields the token ids of an answer; `_reading` and `_cached` agree at every yield.

    It stops after a later call, since the caches then have the tokens of that call.
    """
    self._turns.check(turn)
    engine = self._engine
    start = time.perf_counter()
    behind, (ids,) = self._behind([ids])
    num_cached = self._num_cached(ids)
    num_tokens = sum(prefix.num_tokens for prefix in behind) + len(ids)
    engine.check_context(num_tokens, max_new_tokens)  # an error here changes nothing
    if num_cached:  # slots of the caches behind these tokens are overwritten
      self._reading, self._cached = self._reading.rewound(num_cached), ids[:num_cached]
    before = self._reading if num_cached else None
    reading = engine.read([ids[num_cached:]], max_new_tokens, behind=behind, after=before)
    self._reading, self._cached = jax.block_until_ready(reading), ids
    self.prefill_seconds = time.perf_counter() - start
    self.decode_seconds = 0.0
    start = time.perf_counter()
    for tokens, longer in engine.write(reading, max_new_tokens, sampling):
      self._reading = longer
      new = tokens[0][tokens[0] >= 0].tolist()
      self._cached = self._cached + new
      self.decode_seconds += time.perf_counter() - start
      yield from new
      self._turns.check(turn)
      start = time.perf_counter()

  def _num_cached(self, ids):
    """How many of the first ids need not be read again.

    The last token is always read, since its logits are needed.
    """
    if self._reading is None or self._reading.is_lost:
      return 0
    most = min(self._reading.num_kept(len(self._cached)), len(ids) - 1)
    pairs = zip(self._cached[:most], ids[:most], strict=True)
    return next((index for index, (old, new) in enumerate(pairs) if old != new), most)


class WatchedVideo(Conversation):
  """A video that was watched, and a conversation about it.

  If several videos were watched, what is told is that of the last one; see `seen` for all.

  Attributes:
    num_frames: number of frames that are remembered.
    num_dropped: number of frames that were watched, but are no longer in the window.
    seconds: duration of the video, or of the part that was watched.
    frame_times: the second at which each remembered frame is shown.
    watch_seconds: wall time of decoding, encoding and reading it.
  """

  def __repr__(self) -> str:
    dropped = f", {self.num_dropped} dropped before" if self.num_dropped else ""
    return (
      f"WatchedVideo({self.num_frames} frames of {self.seconds:.1f} s{dropped}, "
      f"questions answered: {len(self.history)})"
    )

  @property
  def num_frames(self) -> int:
    """See the class."""
    return len(self._video.remembered)

  @property
  def num_dropped(self) -> int:
    """See the class."""
    return len(self._video.times) - self.num_frames

  @property
  def seconds(self) -> float:
    """See the class."""
    return self._video.seconds

  @property
  def frame_times(self) -> list[float]:
    """See the class."""
    return self._video.frame_times

  @property
  def watch_seconds(self) -> float:
    """See the class."""
    return self._video.watch_seconds

  def frames(self, num_frames: int | None = None, image_size: int = THUMBNAIL_SIZE) -> list[Frame]:
    """Reads remembered frames again, from the files that were watched: pictures and their times.

    Args:
      num_frames: the most frames to read, evenly spaced; by default all.
      image_size: width and height of the pictures, in pixels.

    Raises:
      InputError: an array, a list or an iterator was watched, whose frames are not kept; or a file
        cannot be read any more.
    """
    num_frames = argument("num_frames", num_frames, optional(count()))
    image_size = argument("image_size", image_size, count())
    return list(self._video.frames(num_frames, image_size))

  @property
  def _video(self):
    return next(seen for seen in reversed(self.seen) if isinstance(seen, Video))


class SeenImages(Conversation):
  """Images that were looked at, and a conversation about them.

  Attributes:
    num_images: number of images.
    num_tiles: number of encoded tiles; the base view is one of them.
  """

  def __repr__(self) -> str:
    return (
      f"SeenImages(images: {self.num_images}, tiles: {self.num_tiles}, "
      f"questions answered: {len(self.history)})"
    )

  @property
  def num_images(self) -> int:
    """See the class."""
    return sum(seen.num_images for seen in self.seen if isinstance(seen, Images))

  @property
  def num_tiles(self) -> int:
    """See the class."""
    return sum(seen.num_tiles for seen in self.seen if isinstance(seen, Images))


def _common(one, other):
  """The ids with which both lists begin."""
  pairs = zip(one, other, strict=False)
  length = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
  return one[:length]
