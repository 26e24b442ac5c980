"""Conversations: questions and answers about a video, about images, or about neither."""

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
from videochat_flash_jax.fields import argument, count, flag, number
from videochat_flash_jax.inference.engine import Engine, Prompt, Reading
from videochat_flash_jax.inference.sampler import Sampling

MAX_NEW_TOKENS = 256
_FRAMES = "give uint8 [frames, height, width, 3]"


class Conversation:
  """A conversation, about a video or images if there are any.

  Every question continues the conversation; `reset` begins a new one. The KV cache keeps all tokens
  that the model has read, so a later question only costs its own tokens.

  Attributes:
    history: the (question, answer) pairs so far.
    prefill_seconds: wall time of reading the last question, and all tokens before it that were not
      in the cache.
    decode_seconds: wall time of generating the last answer.
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
      engine: runs the model.
      tokenizer: the tokenizer of the model.
      visual_tokens: [V, D], the visual tokens of the video or of all images, in the order in which
        the model reads them; None without video or images.
      visual_counts: for each video or image, the number of its visual tokens.
    """
    self.history: list[tuple[str, str]] = []
    self.prefill_seconds = self.decode_seconds = 0.0
    self._engine = engine
    self._tokenizer = tokenizer
    if visual_tokens is None:
      visual_tokens = jnp.zeros((0, engine.config.decoder.width), engine.dtype)
    self._visual_tokens = visual_tokens
    self._visual_counts = visual_counts
    self._turn: object | None = None  # identifies the question that is being answered
    self._reading: Reading | None = None
    # [2, T]: token ids and visual index of the tokens in the cache.
    self._cached = np.zeros((2, 0), np.int32)

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
    """Answers the next question of the conversation.

    Args:
      question: a text.
      stream: if True, return an iterator over pieces of the answer instead of the whole answer.
      max_new_tokens: the most tokens of the answer.
      temperature: 0 is greedy; see `Sampling`.
      top_p: sample from the most likely tokens whose probabilities sum to this.
      seed: of the sampling.

    Raises:
      InputError: the question is empty or no text, it does not fit into the context, or an option
        is not valid.
    """
    stream = argument("stream", stream, flag())
    max_new_tokens = argument("max_new_tokens", max_new_tokens, count())
    sampling = Sampling(temperature, top_p, seed).check()
    if not isinstance(question, str):
      raise InputError(f"the question is {question!r}; give a text")
    ids = inference_prompt(question, self._tokenizer, self._opening(), self.history)
    self._turn = turn = object()
    pieces = self._answer(turn, question, ids, max_new_tokens, sampling)
    return pieces if stream else "".join(pieces)

  def reset(self) -> None:
    """Begins a new conversation about the same video or images; nothing is encoded again."""
    self.history = []
    self._turn = None

  def _opening(self) -> str:
    """The text before the first question, with one slot for each video or image."""
    return ""

  def _answer(self, turn, question, ids, max_new_tokens, sampling):
    """Yields the answer in pieces of text, then adds question and answer to the history."""
    stop_ids = self._tokenizer.stop_ids
    new_ids = (t for t in self._generate(turn, ids, max_new_tokens, sampling) if t not in stop_ids)
    answer = ""
    for piece in stream_text(self._tokenizer, new_ids):
      answer += piece
      yield piece
    self._check_turn(turn)
    self.history.append((question, answer))

  def _check_turn(self, turn):
    """Stops a streamed answer after a later call: the cache now has the tokens of that call."""
    if self._turn is not turn:
      raise InputError(
        "this answer was overtaken by a later call; read a stream to its end before the next call"
      )

  def _generate(self, turn, ids, max_new_tokens, sampling):
    """Yields the token ids of an answer; `_reading` and `_cached` agree at every yield."""
    self._check_turn(turn)
    engine = self._engine
    sequence = np.stack(open_slots(ids, self._visual_counts))
    start = time.perf_counter()
    num_cached = self._num_cached(sequence)
    prompt = Prompt(*sequence[:, num_cached:], self._visual_tokens)
    before = None
    if num_cached:  # slots of the cache behind these tokens are overwritten
      before = self._reading.rewound(num_cached)
    reading = engine.read([prompt], max_new_tokens, after=before)  # an error here changes nothing
    self._reading, self._cached = jax.block_until_ready(reading), sequence
    self.prefill_seconds = time.perf_counter() - start
    self.decode_seconds = 0.0
    start = time.perf_counter()
    for tokens, longer in engine.write(reading, max_new_tokens, sampling):
      self._reading = longer
      new = tokens[0][tokens[0] >= 0]
      self._cached = np.concatenate([self._cached, [new, np.full_like(new, -1)]], axis=1)
      self.decode_seconds += time.perf_counter() - start
      yield from new.tolist()
      self._check_turn(turn)
      start = time.perf_counter()

  def _num_cached(self, sequence):
    """How many of the first tokens of `sequence` [2, T] need not be read again.

    The last token is always read, since its logits are needed.
    """
    if self._reading is None:
      return 0
    length = min(self._cached.shape[1], sequence.shape[1] - 1)
    same = (self._cached[:, :length] == sequence[:, :length]).all(axis=0)
    num_cached = length if same.all() else int(same.argmin())
    return num_cached if self._is_reusable(sequence, num_cached) else 0

  def _is_reusable(self, sequence, num_cached):
    """Whether reading the first `num_cached` tokens again would give the same cache.

    With dropout it may not: which visual tokens are dropped depends on how many there are and,
    where attention chooses, on the question.
    """
    dropout = self._engine.config.dropout
    if dropout is None:
      return True
    if dropout.kind != "uniform" and (sequence[1] >= 0).any():
      return False
    changed = np.concatenate([self._cached[1, num_cached:], sequence[1, num_cached:]])
    return bool((changed < 0).all())  # no visual token among them


class WatchedVideo(Conversation):
  """An encoded video, and a conversation about it.

  Attributes:
    num_frames: number of encoded frames.
    seconds: duration of the video.
    watch_seconds: wall time of decoding and encoding it.
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
    """Is called by `VideoChat.watch`; `visual_tokens` are [V, D]."""
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
    """Appends frames to the video; the frames before them are not encoded again.

    Args:
      frames: uint8 [F, height, width, 3]; F is a multiple of the 4 frames of a clip.
      fps: frames per second of `frames`.

    Raises:
      InputError: `frames` has another dtype, shape or number of frames, or `fps` is not positive.
    """
    clip_frames = self._engine.config.vision.clip_frames
    fps = argument("fps", fps, number(above=0))
    try:
      frames = np.asarray(frames)
    except ValueError as error:  # lists of different lengths
      raise InputError(f"frames are no array ({error}); {_FRAMES}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
      raise InputError(f"frames are {frames.dtype} {frames.shape}; {_FRAMES}")
    if len(frames) % clip_frames or not len(frames):
      raise InputError(f"{len(frames)} frames were given; give a multiple of {clip_frames}")
    if not frames.size:
      raise InputError(f"frames are {frames.shape}; give pictures with pixels")
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
  """Encoded images, and a conversation about them.

  Attributes:
    num_images: number of images.
    num_tiles: number of encoded tiles; the base view is one of them.
  """

  def __init__(
    self,
    engine: Engine,
    tokenizer: Tokenizer,
    visual_tokens: jax.Array,
    num_images: int,
    num_tiles: int,
  ):
    """Is called by `VideoChat.look`; `visual_tokens` are [V, D]."""
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
