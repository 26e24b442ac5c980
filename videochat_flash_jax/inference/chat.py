"""Watch a video once, then ask about it: the five-minute path."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub import checkpoint_directory
from videochat_flash_jax.data.conversation import inference_prompt
from videochat_flash_jax.data.frame_sampling import inference_indices
from videochat_flash_jax.data.packing import lay_out
from videochat_flash_jax.data.preprocessing import resize
from videochat_flash_jax.data.tokenizer import Tokenizer, load_tokenizer, stream_text
from videochat_flash_jax.data.video_reader import open_video
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine, Prompt, Reading
from videochat_flash_jax.inference.sampler import Sampling
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

MAX_NEW_TOKENS = 256


class VideoChat:
  """A model and its tokenizer, ready to watch videos.

  chat = VideoChat.from_pretrained("tiny")
  video = chat.watch("match.mp4", max_frames=512)
  print(video.ask("Who scores first?"))
  """

  def __init__(self, model: VideoChatFlash, tokenizer: Tokenizer):
    """Takes a model over; it must not be used elsewhere afterwards."""
    if tokenizer.vocab_size > model.config.decoder.vocab_size:
      raise InputError(
        f"the tokenizer has {tokenizer.vocab_size} tokens, but the model embeds only "
        f"{model.config.decoder.vocab_size}; take both from one checkpoint"
      )
    self.config = model.config
    self.tokenizer = tokenizer
    self.engine = Engine(model, tokenizer.stop_ids)

  def __repr__(self) -> str:
    return f"VideoChat({self.config.name!r}, dtype={self.engine.dtype})"

  @classmethod
  def from_pretrained(cls, name: str | Path, dtype: jnp.dtype | None = None) -> "VideoChat":
    """Loads a checkpoint in the released layout.

    Args:
      name: "tiny", the model that ships with the package; a directory; or a released model.
      dtype: of the weights and of the computation; by default float32 on a CPU, else bfloat16.

    Raises:
      InputError: no such model, or its files cannot be used.
    """
    directory = checkpoint_directory(name)
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    tokenizer = load_tokenizer(directory)
    model = load_model(lambda config: VideoChatFlash(config, rngs=nnx.Rngs(0)), directory, dtype)
    return cls(model, tokenizer)

  def watch(
    self, path: str | Path, max_frames: int | None = None, *, progress: bool = True
  ) -> "WatchedVideo":
    """Decodes and encodes a video once.

    Args:
      path: a video file, or a folder of numbered images (one a second).
      max_frames: the most frames to look at; by default the model's own bound. One frame a
        second is sampled, fewer where the video is longer than that.
      progress: whether a terminal shows a progress bar.

    Raises:
      InputError: the file is missing, is no video, or ends early.
    """
    start = time.perf_counter()
    with open_video(path) as reader:
      info = reader.info
      indices = inference_indices(info.num_frames, info.fps, self.config.sampling, max_frames)
      frames = reader.frames(indices, image_size=self.config.vision.image_size)
      quiet = None if progress else True  # None: quiet unless a terminal is there to see it
      frames = tqdm(frames, "watching", len(indices), unit="frame", leave=False, disable=quiet)
      visual_tokens = self.engine.encode(self._clips(frames))
    visual_tokens.block_until_ready()
    return WatchedVideo(
      self, visual_tokens, len(indices), info.seconds, time.perf_counter() - start
    )

  def _clips(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Groups frames into clips [F, S, S, 3]; their number is a multiple of F."""
    clip = []
    for frame in frames:
      clip.append(frame)
      if len(clip) == self.config.vision.clip_frames:
        yield np.stack(clip)
        clip = []


class WatchedVideo:
  """A video that a model has seen, and a conversation about it.

  Every question continues the conversation; `reset` begins a new one. What the model has read
  stays in its cache: a later question costs its own tokens only.

  Attributes:
    num_frames: frames seen.
    seconds: duration of the video.
    history: (question, answer) pairs so far.
    watch_seconds: wall time of decoding and encoding.
    prefill_seconds: wall time of reading the last question and what was new before it.
    decode_seconds: wall time of writing the last answer.
  """

  def __init__(
    self,
    chat: VideoChat,
    visual_tokens: jax.Array,
    num_frames: int,
    seconds: float,
    watch_seconds: float,
  ):
    """Made by `VideoChat.watch`."""
    self.num_frames = num_frames
    self.seconds = seconds
    self.history: list[tuple[str, str]] = []
    self.watch_seconds = watch_seconds
    self.prefill_seconds = self.decode_seconds = 0.0
    self._chat = chat
    self._visual_tokens = visual_tokens
    self._turn: object | None = None  # the question that is being answered
    self._reading: Reading | None = None
    self._known = np.zeros((2, 0), np.int32)  # token ids and visual index of what was read

  def __repr__(self) -> str:
    return (
      f"WatchedVideo({self.num_frames} frames of {self.seconds:.1f} s, "
      f"{len(self.history)} questions answered)"
    )

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
    """Answers a question about the video.

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
    ids = inference_prompt(
      question, self._chat.tokenizer, self.num_frames, self.seconds, self.history
    )
    self._turn = turn = object()
    pieces = self._answer(turn, question, ids, max_new_tokens, sampling)
    return pieces if stream else "".join(pieces)

  def reset(self) -> None:
    """Begins a new conversation about the same video; nothing is encoded again."""
    self.history = []
    self._turn = None

  def extend(self, frames: np.ndarray, fps: float = 1.0) -> None:
    """Appends frames of a stream that goes on; what was encoded and read before stays.

    Args:
      frames: uint8 [F, height, width, 3], F a multiple of the clip's 4 frames.
      fps: frames a second of `frames`.

    Raises:
      InputError: another dtype, shape or number of frames.
    """
    clip_frames = self._chat.config.vision.clip_frames
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
    frames = resize(frames, self._chat.config.vision.image_size)
    new_tokens = self._chat.engine.encode(frames.reshape(-1, clip_frames, *frames.shape[1:]))
    self._visual_tokens = jnp.concatenate([self._visual_tokens, new_tokens])
    self.num_frames += len(frames)
    self.seconds += len(frames) / fps

  def _answer(self, turn, question, ids, max_new_tokens, sampling):
    """Yields the answer in pieces, then adds question and answer to the history."""
    stop_ids = self._chat.tokenizer.stop_ids
    new_ids = (t for t in self._write(turn, ids, max_new_tokens, sampling) if t not in stop_ids)
    answer = ""
    for piece in stream_text(self._chat.tokenizer, new_ids):
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
    engine = self._chat.engine
    sequence = np.stack(lay_out(ids, [len(self._visual_tokens)]))
    start = time.perf_counter()
    num_known = self._num_known(sequence)
    prompt = Prompt(*sequence[:, num_known:], self._visual_tokens)
    before = None
    if num_known:  # slots behind the part that is still true are simply written again
      length = jnp.full((1,), num_known, jnp.int32)
      before = self._reading._replace(cache=self._reading.cache._replace(length=length))
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
    return length if same.all() else int(same.argmin())
