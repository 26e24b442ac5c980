"""`VideoChat`: encode a video or images once, then ask questions about them. Start here."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.checkpoints.runs.run_files import hub_files
from videochat_flash_jax.data.batches.row_media import (
  VideoPart,
  open_row_video,
  read_row_images,
  row_part,
  row_video_path,
)
from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.data.media.image_reader import ImageSource, read_image
from videochat_flash_jax.data.media.image_tiling import (
  choose_grid,
  cut_tiles,
  pad_to_square,
  sequence_order,
)
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import VideoInfo, VideoReader, open_video
from videochat_flash_jax.data.mixture.annotations import kind_of
from videochat_flash_jax.data.mixture.broken import because
from videochat_flash_jax.data.text.tokenizer import (
  Tokenizer,
  check_embedded,
  load_tokenizer,
)
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import Rule, argument, choice, count, flag, is_number, optional
from videochat_flash_jax.inference.conversation import Conversation, SeenImages, WatchedVideo
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import (
  group_clips,
  open_features,
  video_features,
)
from videochat_flash_jax.inference.limits import check_mesh
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig, YarnConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
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
  ):
    """Takes over a model, which must not be used elsewhere afterwards.

    Args:
      model: with its weights.
      tokenizer: the one that the model was trained with.
      layout: see `Engine`.
      features: see `from_pretrained`.

    Raises:
      InputError: the tokenizer has ids that the model does not embed, or `features` cannot be
        used.
    """
    check_embedded(tokenizer, model.config.decoder.vocab_size, model.config.name)
    self.config = model.config
    self.tokenizer = tokenizer
    self.engine = Engine(model, tokenizer.stop_ids, layout)
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
        model and its cache over four devices, and encodes videos on all devices.
      features: a folder for the encoder's output, in bfloat16; it is made if it is missing. A video
        that is watched again with equally many frames is neither decoded nor encoded again.

    Raises:
      InputError: there is no such model, its files cannot be used, or a setting is not valid.
    """
    context = argument("context", context, optional(count()))
    yarn = argument("yarn", yarn, optional(_YARN))
    if not (dropout is None or dropout is False or isinstance(dropout, DropoutConfig)):
      raise InputError(
        f"dropout is {dropout!r}; give False, or a DropoutConfig such as DropoutConfig.model_card()"
      )
    features = argument("features", features, optional(_PATH))
    if not (mesh is None or isinstance(mesh, MeshConfig)):
      raise InputError(f"mesh is {mesh!r:.80}; give a MeshConfig such as MeshConfig(tensor=4)")
    directory = checkpoint_directory(name)
    if dtype is None:
      dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    argument("dtype", _dtype_name(dtype), choice(*_DTYPES))
    tokenizer = load_tokenizer(hub_files(directory))
    layout = ONE_DEVICE if mesh is None else Layout(make_mesh(mesh), replicate_weights=True)

    def make_model(config):
      """Builds the model with the settings of the caller."""
      config = _with_settings(config, context, yarn, dropout)
      check_mesh(config, layout)  # before the weights, many gigabytes, are read
      check_embedded(tokenizer, config.decoder.vocab_size, directory)
      return VideoChatFlash(config, rngs=nnx.Rngs(0))

    def sharding_of(path, shape):
      """The sharding of one weight; None without a mesh."""
      if layout.mesh is None:
        return None
      return NamedSharding(layout.mesh, weight_spec(path, len(shape), replicated=True))

    return cls(load_model(make_model, directory, dtype, sharding_of), tokenizer, layout, features)

  def watch(
    self, path: str | Path, max_frames: int | None = None, *, progress: bool = True
  ) -> WatchedVideo:
    """Decodes and encodes a video, once for all questions.

    Args:
      path: a video file, or a folder of numbered images (one per second).
      max_frames: the most frames to encode; by default the model's own bound. One frame per second
        is sampled, or fewer, evenly spaced, if the video has more seconds than this bound.
      progress: if True, a terminal shows a progress bar.

    Raises:
      InputError: the file is missing, is no video, or ends early; an argument is of another type;
        or another process is writing into the folder of features.
    """
    progress = argument("progress", progress, flag())

    def whole(info):
      """The part that is watched: all of the video."""
      return VideoPart(0.0, info.seconds, range(info.num_frames), info.fps)

    return self._watch(path, functools.partial(open_video, path), whole, max_frames, progress)

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
    kind = kind_of(row)
    if kind == "text":
      return Conversation(self.engine, self.tokenizer)
    if kind == "image":
      with because("unreadable image"):
        return self.look(read_row_images(row))
    reader = functools.partial(open_row_video, row, num_threads=None, logs_damage=True)
    part = functools.partial(row_part, row)
    return self._watch(row_video_path(row), reader, part, max_frames, progress=False)

  def _watch(
    self,
    path: str | Path,
    open_reader: Callable[[], VideoReader],
    part_of: Callable[[VideoInfo], VideoPart],
    max_frames: int | None,
    progress: bool,
  ) -> WatchedVideo:
    """Encodes the part of a video that `part_of` tells; see `watch`."""
    max_frames = argument("max_frames", max_frames, optional(count()))  # before a file is opened
    start, vision = time.perf_counter(), self.config.vision
    quiet = None if progress else True  # None: tqdm shows the bar only on a terminal

    def with_progress(frames, count):
      """Yields the frames and shows how many of `count` are done."""
      return tqdm(frames, "watching", count, unit="frame", leave=False, disable=quiet)

    def choose(info):
      """Indices of the frames to encode."""
      part = part_of(info)
      picks = inference_indices(len(part.frames), part.fps, self.config.sampling, max_frames)
      return part.frames.start + picks

    if self.features is None:
      with open_reader() as reader:
        info, indices = reader.info, choose(reader.info)
        frames = with_progress(reader.frames(indices, vision.image_size), len(indices))
        visual_tokens = self.engine.encode(group_clips(frames, vision.clip_frames))
    else:
      info, indices, features = video_features(
        path, open_reader, choose, self.engine, self.features, with_progress
      )
      visual_tokens = self.engine.project(features)
    visual_tokens.block_until_ready()
    part = part_of(info)
    return WatchedVideo(
      self.engine,
      self.tokenizer,
      visual_tokens,
      len(indices),
      part.end - part.start,
      time.perf_counter() - start,
    )

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
    images = images if isinstance(images, list | tuple) else [images]
    if not images:
      raise InputError("there is no image to look at; give at least one")
    size = self.config.vision.image_size
    if len(images) > 1:
      tiles = (resize(pad_to_square(read_image(image)), size)[None] for image in images)
      return SeenImages(
        self.engine, self.tokenizer, self.engine.encode(tiles), len(images), len(images)
      )
    image = read_image(images[0])
    grid = choose_grid(image.shape[1], image.shape[0], self.config.tiling, size)
    tiles = cut_tiles(image, *grid, size)
    visual_tokens = self.engine.encode(tiles[:, None])
    order = sequence_order(*grid, self.config.tile_tokens)
    return SeenImages(self.engine, self.tokenizer, visual_tokens[order], 1, len(tiles))

  def ask(self, question: str, **options) -> str | Iterator[str]:
    """Answers a question without any video or image, in a new conversation.

    To ask about a video or images, call `ask` of what `watch` or `look` returns.

    Args:
      question: a text.
      **options: the options of `Conversation.ask`.
    """
    return Conversation(self.engine, self.tokenizer).ask(question, **options)


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


def _with_settings(
  config: VideoChatFlashConfig,
  context: int | None,
  yarn: YarnConfig | float | None,
  dropout: DropoutConfig | Literal[False] | None,
) -> VideoChatFlashConfig:
  """The config of a checkpoint, changed by the caller's settings; see `from_pretrained`."""
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
