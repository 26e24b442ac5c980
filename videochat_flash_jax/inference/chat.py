"""`VideoChat`: encode a video or images once, then ask questions about them. Start here."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub.directory import TINY, checkpoint_directory
from videochat_flash_jax.checkpoints.runs.run_files import hub_files
from videochat_flash_jax.data.batches.row_media import (
  open_row_video,
  read_row_images,
  row_part,
  row_video_path,
)
from videochat_flash_jax.data.media.frame_choice import sampled_frames
from videochat_flash_jax.data.media.frame_source import VideoSource
from videochat_flash_jax.data.media.image_reader import ImageSource
from videochat_flash_jax.data.media.open_source import Watchable
from videochat_flash_jax.data.mixture.annotations import kind_of
from videochat_flash_jax.data.mixture.broken import because
from videochat_flash_jax.data.text.tokenizer import (
  Tokenizer,
  check_embedded,
  load_tokenizer,
)
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import Rule, argument, choice, count, is_number, optional
from videochat_flash_jax.inference.conversation import Conversation, SeenImages, WatchedVideo
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import open_features
from videochat_flash_jax.inference.limits import check_mesh
from videochat_flash_jax.inference.messages import are_messages, read_messages, show
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig, YarnConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.kv_formats import FORMATS
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import weight_spec


class VideoChat:
  """A model and its tokenizer, ready to answer questions about videos and images.

  chat = VideoChat.from_pretrained("tiny")
  video = chat.watch("match.mp4", max_frames=512)
  print(video.ask("Who scores first?"))
  print(chat.look("team.jpg").ask("How many wear red?"))
  """

  def __init__(
    self,
    model: VideoChatFlash,
    tokenizer: Tokenizer,
    layout: Layout = ONE_DEVICE,
    features: str | Path | None = None,
    cache: str | None = None,
    shapes_only: bool = False,
  ):
    """Takes over a model, which must not be used elsewhere afterwards.

    Args:
      model: with its weights.
      tokenizer: the one that the model was trained with.
      layout: see `Engine`.
      features: see `from_pretrained`.
      cache: see `from_pretrained`.
      shapes_only: see `Conversation`.

    Raises:
      InputError: the tokenizer has ids that the model does not embed, or `features` cannot be
        used.
    """
    check_embedded(tokenizer, model.config.decoder.vocab_size, model.config.name)
    self.config = model.config
    self.tokenizer = tokenizer
    self.shapes_only = shapes_only
    self.engine = Engine(model, tokenizer.stop_ids, layout, cache)
    if features is not None and self.engine.is_on_several_hosts:
      raise InputError("features is for one host: another may have other features; leave it out")
    self.features = None if features is None else open_features(features, self.engine)

  def __repr__(self) -> str:
    return f"VideoChat({self.config.name!r}, dtype={self.engine.dtype})"

  @classmethod
  def from_pretrained(
    cls,
    name: str | Path,
    dtype: jnp.dtype | None = None,
    *,
    context: int | None = None,
    yarn: YarnConfig | float | None = None,
    dropout: DropoutConfig | Literal[False] | None = None,
    mesh: MeshConfig | None = None,
    features: str | Path | None = None,
    weights: Literal["int8"] | None = None,
    cache: Literal["int8", "int4"] | None = None,
  ) -> "VideoChat":
    """Loads a checkpoint in the released layout, or a checkpoint of a training run.

    Args:
      name: "tiny", the model that comes with the package; a directory; or the name of a released
        model. WORKDIR of a training run means its newest checkpoint, and WORKDIR/checkpoints/STEP
        the checkpoint of that step.
      dtype: of the weights and of the computation; by default float32 on a CPU, else bfloat16.
      context: the most tokens of a prompt and its answer together, in place of the checkpoint's own
        limit. A longer prompt is an error; nothing is ever cut off.
      yarn: the factor by which the context is stretched beyond the one of training (the published
        needle test uses 4); a `YarnConfig` also says how long the context of training was.
      dropout: which visual tokens are dropped between layers, such as `DropoutConfig.model_card()`.
        False: none are dropped. None: as the checkpoint says; the released ones drop none.
      mesh: how all devices share the work; None for one device. `MeshConfig(tensor=4)` shards the
        model and its cache over four devices, and encodes videos on all devices. On several hosts
        every process makes the same calls in the same order; see docs/sharding.md.
      features: a folder for the encoder's output, in bfloat16; it is made if it is missing. A video
        that is watched again with equally many frames is neither decoded nor encoded again.
      weights: "int8" makes the matrices of the language model int8 while they are read; the
        computation stays in `dtype`. None: as the checkpoint has them.
      cache: "int8" or "int4": keep the keys and values of videos and images in so many bits, which
        take a half or a quarter of the memory of bfloat16; see docs/memory.md for what it costs.

    Raises:
      InputError: there is no such model, its files cannot be used, or a setting is not valid.
    """
    context = argument("context", context, optional(count()))
    yarn = argument("yarn", yarn, optional(_YARN))
    if not (dropout is None or dropout is False or isinstance(dropout, DropoutConfig)):
      raise InputError(
        f"dropout is {dropout!r:.80}; give False, or a DropoutConfig such as "
        "DropoutConfig.model_card()"
      )
    features = argument("features", features, optional(_PATH))
    cache = argument("cache", cache, optional(choice(*filter(None, FORMATS))))
    if not (mesh is None or isinstance(mesh, MeshConfig)):
      raise InputError(f"mesh is {mesh!r:.80}; give a MeshConfig such as MeshConfig(tensor=4)")
    directory = checkpoint_directory(name)
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    argument("dtype", _dtype_name(dtype), choice(*_DTYPES))
    weights = argument("weights", weights, optional(choice("int8")))
    tokenizer = load_tokenizer(hub_files(directory))
    layout = ONE_DEVICE if mesh is None else Layout(make_mesh(mesh), replicate_weights=True)

    def make_model(config):
      """Builds the model with the settings of the caller."""
      config = with_settings(config, context, yarn, dropout)
      check_mesh(config, layout)  # before the weights, many gigabytes, are read
      check_embedded(tokenizer, config.decoder.vocab_size, directory)
      return VideoChatFlash(config, rngs=nnx.Rngs(0))

    def sharding_of(path, shape):
      """The sharding of one weight; None without a mesh."""
      if layout.mesh is None:
        return None
      return NamedSharding(layout.mesh, weight_spec(path, len(shape), replicated=True))

    model = load_model(make_model, directory, dtype, sharding_of, weights)
    return cls(model, tokenizer, layout, features, cache, shapes_only=name == TINY)

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
  ) -> WatchedVideo:
    """Decodes, encodes and reads a video, once for all questions.

    An error or Ctrl-C leaves no video. To keep what a camera has given before it fails, watch its
    first frames, and `WatchedVideo.extend` them by the others.

    Args:
      source: a video (its path or address), a folder of numbered images, an array uint8 [F, H, W,
        3], a list of images, or an iterator or a queue of frames, such as a camera's.
      max_frames: the most frames to encode, in whole clips of 4; by default the model's own bound.
        Of a video one frame per second is sampled, or fewer, evenly spaced, if it has more seconds
        than this bound. Fewer than 4 frames fill one clip by repeats.
      start: the second from which the video is watched; by default its beginning.
      end: the second until which it is watched; by default its end.
      fps: of a video, the most frames a second to watch; of other sources, their frames a second.
      times: the seconds of the frames to watch; of an array or a list, those of its frames. See
        `data.media.open_source`.
      window: the most frames to remember, from 32: the first 16, and the last ones, of a video of
        any length. When it is full, the oldest quarter is forgotten at once, so at least three
        quarters of it are remembered. Memory and the time for a clip are then bounded;
        `num_dropped` of the result tells what is forgotten. Without `max_frames` an iterator is
        watched to its end.
      stall_seconds: the longest time to wait for a frame of an iterator; by default forever.
      progress: if True, a terminal shows a progress bar.

    Raises:
      InputError: the source is missing, is no video, or ends early; an argument does not fit; the
        context of the model has no room for the frames; or another process is writing into the
        folder of features.
    """
    video = WatchedVideo(self.engine, self.tokenizer, self.features, self.shapes_only)
    video.watch(
      source,
      max_frames,
      start=start,
      end=end,
      fps=fps,
      times=times,
      window=window,
      stall_seconds=stall_seconds,
      progress=progress,
    )
    return video

  def see_row(self, row: Mapping[str, Any], max_frames: int | None = None) -> Conversation:
    """Encodes what an annotation row shows: its part of a video, its images, or nothing.

    A video is read as in training: only from `start` to `end`, if the row has them, and a folder of
    pictures at the same rate. Its frames are chosen as in `watch`.

    Args:
      row: a row of `data.mixture.rows.open_rows`.
      max_frames: as in `watch`.

    Raises:
      BrokenRow: the row's media cannot be used.
      InputError: as in `watch`.
    """
    max_frames = argument("max_frames", max_frames, optional(count()))
    kind = kind_of(row)
    if kind == "text":
      return self.conversation()
    if kind == "image":
      with because("unreadable image"):
        return self.look(read_row_images(row))

    def choose(info):
      """The frames of the row's part."""
      return sampled_frames(row_part(row, info), self.config.sampling, max_frames)

    reader = functools.partial(open_row_video, row, num_threads=None, logs_damage=True)
    known_info = None if self.features is None else self.features.video_info
    source = VideoSource(row_video_path(row), reader, choose, known_info)
    video = WatchedVideo(self.engine, self.tokenizer, self.features, self.shapes_only)
    video.watch_source(source, progress=False)
    return video

  def look(self, images: ImageSource | Sequence[ImageSource]) -> SeenImages:
    """Encodes one image in detail, or several images with one tile each.

    A single image is cut into tiles (how many depends on its size), and a base view shows the whole
    image. Each of several images is padded to a square and becomes one tile.

    Args:
      images: an image or a list of images. Each is a path, a Pillow image or an array uint8
        [height, width, 3]. A list of one is a single image.

    Raises:
      InputError: the list is empty, or an image is missing or cannot be read.
    """
    seen = SeenImages(self.engine, self.tokenizer, self.features, self.shapes_only)
    seen.look(images)
    return seen

  def conversation(self) -> Conversation:
    """Begins a conversation that has seen nothing yet; see its `watch`, `look` and `ask`."""
    return Conversation(self.engine, self.tokenizer, self.features, self.shapes_only)

  def ask(
    self, question: str | Sequence[str] | Sequence[Mapping[str, Any]], **options
  ) -> str | list[str] | Iterator[str]:
    """Answers a question, in a new conversation.

    To ask several questions about a video or images, call `ask` of what `watch` or `look` returns.

    Args:
      question: a text, or a list of texts. Or a list of messages, as transformers and the OpenAI
        API have them, with their videos, images and earlier turns; see `inference.messages`.
      **options: the options of `Conversation.ask`.

    Raises:
      InputError: as `Conversation.ask`; or a message, a video or an image cannot be used.
    """
    conversation = self.conversation()
    if are_messages(question):
      media, history, question = read_messages(question)
      show(conversation, media)
      conversation.history = history
    return conversation.ask(question, **options)


def _is_stretch(yarn):
  """Whether a value says how much a context is stretched; see `VideoChat.from_pretrained`."""
  if isinstance(yarn, YarnConfig):
    original = yarn.original_positions
    return _is_stretch(yarn.factor) and count().accepts(original) and original < 2**31
  return is_number(yarn) and 1 <= yarn < 1e6


_YARN = Rule(_is_stretch, "a factor of 1 or more, such as 4.0, or a YarnConfig with one")
_PATH = Rule(lambda value: isinstance(value, str | os.PathLike), "a path")
_DTYPES = ("float32", "bfloat16", "float16")


def _dtype_name(dtype):
  try:
    return jnp.dtype(dtype).name
  except TypeError:
    return dtype


def with_settings(
  config: VideoChatFlashConfig,
  context: int | None,
  yarn: YarnConfig | float | None,
  dropout: DropoutConfig | Literal[False] | None,
) -> VideoChatFlashConfig:
  """The config of a checkpoint, changed by settings; see `VideoChat.from_pretrained`."""
  decoder = config.decoder
  if yarn is not None:
    if not isinstance(yarn, YarnConfig):
      original = decoder.yarn.original_positions if decoder.yarn else decoder.max_positions
      yarn = YarnConfig(float(yarn), original)
    longest = int(yarn.factor * yarn.original_positions)
    decoder = dataclasses.replace(decoder, yarn=yarn, max_positions=longest)
  if context is not None:
    decoder = dataclasses.replace(decoder, max_positions=context)
  dropout = config.dropout if dropout is None else dropout or None
  return dataclasses.replace(config, decoder=decoder, dropout=dropout)
