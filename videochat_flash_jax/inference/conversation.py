"""Questions and answers about a video, about images, or about nothing."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.text.conversation import (
  image_opening,
  inference_prompt,
  video_opening,
)
from videochat_flash_jax.data.text.tokenizer import Tokenizer, stream_text
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine, Prompt, Reading
from videochat_flash_jax.inference.sampler import Sampling

MAX_NEW_TOKENS = 256


class Conversation:
  """What a model has seen, if anything, and what was said about it.

  Every question continues the conversation; `reset` begins a new one. What the model has read
  stays in its cache: a later question costs its own tokens only.

  Attributes:
    history: (question, answer) pairs so far.
    prefill_seconds: wall time of reading the last question and what was new before it.
    decode_seconds: wall time of writing the last answer.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    visual_tokens: jax.Array | None = None,
    visual_counts: Sequence[int] = (),
  ):
    """Begins a conversation.

    Args:
      engine: a model.
      tokenizer: that of the model.
      visual_tokens: [V, D] of all that is seen, in the order in which it is read; or None.
      visual_counts: how many of them belong to each video or image.
    """
    self.history: list[tuple[str, str]] = []
    self.prefill_seconds = self.decode_seconds = 0.0
    self._engine = engine
    self._tokenizer = tokenizer
    if visual_tokens is None:
      visual_tokens = jnp.zeros((0, engine.config.decoder.width), engine.dtype)
    self._visual_tokens = visual_tokens
    self._visual_counts = visual_counts
    self._turn: object | None = None  # the question that is being answered
    self._reading: Reading | None = None
    self._known = np.zeros((2, 0), np.int32)  # token ids and visual index of what was read

  def ask(
    self,
    question: str,
    *,
    stream: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> str | Iterator[str]:
    """Answers a question about what was seen.

    Args:
      question: the next turn of the conversation.
      stream: give an iterator over pieces of the answer instead of the whole.
      max_new_tokens: the most tokens of the answer.
      temperature: 0 is greedy; see `Sampling`.
      top_p: sample from the likeliest tokens that hold this probability.
      seed: of the sampling.

    Raises:
      InputError: the question is empty, or it does not fit into the context.
    """
    if max_new_tokens < 1:
      raise InputError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    sampling = Sampling(temperature, top_p, seed).check()
    if not isinstance(question, str):
      raise InputError(f"the question is {question!r}; give a text")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
      raise InputError("the question is not valid UTF-8 text; type it again")
    ids = inference_prompt(question, self._tokenizer, self._opening(), self.history)
    self._turn = turn = object()
    pieces = self._answer(turn, question, ids, max_new_tokens, sampling)
    return pieces if stream else "".join(pieces)

  def reset(self) -> None:
    """Begins a new conversation about the same video or images; nothing is encoded again."""
    self.history = []
    self._turn = None

  def _opening(self) -> str:
    """The text before the first question, with a placeholder for each video or image."""
    return ""

  def _answer(self, turn, question, ids, max_new_tokens, sampling):
    """Yields the answer in pieces, then adds question and answer to the history."""
    stop_ids = self._tokenizer.stop_ids
    new_ids = (t for t in self._write(turn, ids, max_new_tokens, sampling) if t not in stop_ids)
    answer = ""
    for piece in stream_text(self._tokenizer, new_ids):
      answer += piece
      yield piece
    self._check_turn(turn)
    self.history.append((question, answer))

  def _check_turn(self, turn):
    """A stream that was overtaken must not go on: the cache holds another question by now."""
    if self._turn is not turn:
      raise InputError("this answer was overtaken by a later call; finish a stream before the next")

  def _write(self, turn, ids, max_new_tokens, sampling):
    """Yields the token ids of an answer; keeps `_reading` and `_known` true at every yield."""
    self._check_turn(turn)
    engine = self._engine
    sequence = np.stack(open_slots(ids, self._visual_counts))
    start = time.perf_counter()
    num_known = self._num_known(sequence)
    prompt = Prompt(*sequence[:, num_known:], self._visual_tokens)
    before = None
    if num_known:  # slots behind the part that is still true are simply written again
      before = self._reading.rewound(num_known)
    reading = engine.read([prompt], max_new_tokens, after=before)  # may refuse: nothing is lost
    self._reading, self._known = jax.block_until_ready(reading), sequence
    self.prefill_seconds = time.perf_counter() - start
    self.decode_seconds = 0.0
    start = time.perf_counter()
    for tokens, longer in engine.write(reading, max_new_tokens, sampling):
      self._reading = longer
      new = tokens[0][tokens[0] >= 0]
      self._known = np.concatenate([self._known, [new, np.full_like(new, -1)]], axis=1)
      self.decode_seconds += time.perf_counter() - start
      yield from new.tolist()
      self._check_turn(turn)
      start = time.perf_counter()

  def _num_known(self, sequence):
    """How many tokens of `sequence` the cache holds already; the last one is always read."""
    if self._reading is None:
      return 0
    length = min(self._known.shape[1], sequence.shape[1] - 1)
    same = (self._known[:, :length] == sequence[:, :length]).all(axis=0)
    num_known = length if same.all() else int(same.argmin())
    return num_known if self._stays_read(sequence, num_known) else 0

  def _stays_read(self, sequence, num_known):
    """Whether the first tokens, read anew, would be what the cache holds.

    Which visual tokens are dropped depends on how many there are and, where attention chooses, on
    the question.
    """
    dropout = self._engine.config.dropout
    if dropout is None:
      return True
    if dropout.kind != "uniform" and (sequence[1] >= 0).any():
      return False
    unknown = np.concatenate([self._known[1, num_known:], sequence[1, num_known:]])
    return bool((unknown < 0).all())


class WatchedVideo(Conversation):
  """A video that a model has seen, and a conversation about it.

  Attributes:
    num_frames: frames seen.
    seconds: duration of the video.
    watch_seconds: wall time of decoding and encoding.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    visual_tokens: jax.Array,
    num_frames: int,
    seconds: float,
    watch_seconds: float,
  ):
    """Made by `VideoChat.watch`."""
    super().__init__(engine, tokenizer, visual_tokens, [len(visual_tokens)])
    self.num_frames = num_frames
    self.seconds = seconds
    self.watch_seconds = watch_seconds

  def __repr__(self) -> str:
    return (
      f"WatchedVideo({self.num_frames} frames of {self.seconds:.1f} s, "
      f"{len(self.history)} questions answered)"
    )

  def extend(self, frames: np.ndarray, fps: float = 1.0) -> None:
    """Appends frames of a stream that goes on; what was encoded and read before stays.

    Args:
      frames: uint8 [F, height, width, 3], F a multiple of the clip's 4 frames.
      fps: frames a second of `frames`.

    Raises:
      InputError: another dtype, shape or number of frames.
    """
    clip_frames = self._engine.config.vision.clip_frames
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
      raise InputError(
        f"frames are {frames.dtype} {frames.shape}; give uint8 [frames, height, width, 3]"
      )
    if len(frames) % clip_frames or not len(frames):
      raise InputError(f"{len(frames)} frames were given; give a multiple of {clip_frames}")
    if not fps > 0:
      raise InputError(f"fps is {fps}; give a number above 0")
    self._turn = None
    frames = resize(frames, self._engine.config.vision.image_size)
    new_tokens = self._engine.encode(frames.reshape(-1, clip_frames, *frames.shape[1:]))
    self._visual_tokens = jnp.concatenate([self._visual_tokens, new_tokens])
    self._visual_counts = [len(self._visual_tokens)]
    self.num_frames += len(frames)
    self.seconds += len(frames) / fps

  def _opening(self):
    return video_opening(self.num_frames, self.seconds)


class SeenImages(Conversation):
  """Images that a model has seen, and a conversation about them.

  Attributes:
    num_images: images seen.
    num_tiles: tiles they were encoded as, base view included.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    visual_tokens: jax.Array,
    num_images: int,
    num_tiles: int,
  ):
    """Made by `VideoChat.look`."""
    counts = [len(visual_tokens) // num_images] * num_images
    super().__init__(engine, tokenizer, visual_tokens, counts)
    self.num_images = num_images
    self.num_tiles = num_tiles

  def __repr__(self) -> str:
    return (
      f"SeenImages({self.num_images} images in {self.num_tiles} tiles, "
      f"{len(self.history)} questions answered)"
    )

  def _opening(self):
    return image_opening(self.num_images)
