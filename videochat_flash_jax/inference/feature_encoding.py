"""Fills a feature store with the encoder's output: for one video, or for a mixture of rows."""

import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from tqdm import tqdm

from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.row_media import (
  choose_frames,
  choose_grids,
  open_row_video,
  read_clips,
  read_row_images,
  read_tiles,
  row_video_path,
)
from videochat_flash_jax.data.check.media_check import SourceReport
from videochat_flash_jax.data.features.feature_key import (
  FeatureKey,
  frames_entry,
  image_entry,
  weights_digest,
)
from videochat_flash_jax.data.features.feature_store import (
  CLIPS_PER_FILE,
  FeatureStore,
  FeatureWriter,
)
from videochat_flash_jax.data.media.ahead import Ahead
from videochat_flash_jax.data.media.frame_source import FrameSource
from videochat_flash_jax.data.media.video_reader import VideoInfo
from videochat_flash_jax.data.mixture.broken import BrokenRow, any_error_breaks
from videochat_flash_jax.data.mixture.rows import Rows
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.shapes import Float

_NUM_LOCKS = 64
_MAX_THREADS = 8  # each holds one row; the frames of a long video take hundreds of megabytes


def open_features(path: str | Path, engine: Engine) -> FeatureStore:
  """Opens the store of features of an engine's encoder, or makes a new one.

  Args:
    path: a folder.
    engine: its encoder computes the features.

  Raises:
    InputError: the folder has features of another encoder, or other files.
  """
  weights = weights_digest(engine.vision_weights())
  key = FeatureKey.of(engine.config, str(engine.dtype), weights)
  return FeatureStore.open(path, key, create=True)


def group_clips(frames: Iterable[np.ndarray], clip_frames: int) -> Iterator[np.ndarray]:
  """Groups frames [S, S, 3] into clips [F, S, S, 3].

  Args:
    frames: a multiple of F of them.
    clip_frames: F.
  """
  frames = iter(frames)
  while clip := list(itertools.islice(frames, clip_frames)):
    yield np.stack(clip)


def video_features(
  source: FrameSource, engine: Engine, store: FeatureStore
) -> Float[np.ndarray, "C V E"]:
  """Reads the features of a video from a store; if they are missing, encodes the video first.

  Args:
    source: of the video's frames.
    engine: its encoder computes the features.
    store: from `open_features`.

  Returns:
    Features in bfloat16.
  """
  entry = frames_entry(source.path, source.indices)
  if entry not in store:
    with store.writing() as writer:
      if entry not in writer:
        vision = engine.config.vision
        frames = source.frames(vision.image_size)
        with Ahead(group_clips(frames, vision.clip_frames), engine.group_size) as clips:
          writer.put(entry, engine.encode_features(clips))
        if source.damaged:
          writer.mark_damaged(entry)
      if not os.path.isdir(source.path):
        writer.put_video(source.path, source.info)
  return store.get(entry)


@dataclasses.dataclass
class EncodingReport:
  """The result of `encode_mixture`.

  Attributes:
    rows: number of annotation rows.
    clips: number of clips and tiles that were encoded.
    damaged: number of encoded videos in which other frames replace frames that cannot be read.
    sources: for each source of the mixture, its rows that cannot be used, with the reasons.
  """

  rows: int = 0
  clips: int = 0
  damaged: int = 0
  sources: list[SourceReport] = dataclasses.field(default_factory=list)

  @property
  def broken(self) -> int:
    """Number of rows that were skipped."""
    return sum(source.broken.total() for source in self.sources)


def encode_mixture(
  rows: Rows, config: ExampleConfig, engine: Engine, store: FeatureStore
) -> EncodingReport:
  """Encodes the videos and images of all rows of a mixture, except those already in the store.

  Args:
    rows: of the mixture.
    config: how frames are chosen; `image_size` is the encoder's.
    engine: its encoder computes the features.
    store: from `open_features`.

  Raises:
    InputError: another process is writing into the store, the disk is full, or the mixture has
      images and the encoder makes fewer tokens from a tile than from a clip.
  """
  of_clip, of_tile = engine.config.clip_tokens, engine.config.tile_tokens
  if of_tile < of_clip and rows.has("image"):
    raise InputError(
      f"{engine.config.name} makes {of_tile} tokens from an image and {of_clip} from a clip, "
      "so one store cannot hold both; remove the images from the mixture"
    )
  reports = {source.json_path: SourceReport(source.json_path) for source in rows.sources}
  report = EncodingReport(sources=list(reports.values()))
  with store.writing() as writer:
    media = _RowMedia(rows, config, store)
    num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads, prefetch_buffer_size=num_threads)
    read = grain.MapDataset.range(len(rows)).map(media.read).to_iter_dataset(options)
    queues = {"video": _EntryQueue(engine, writer), "image": _EntryQueue(engine, writer)}
    bar = tqdm(read, "encoding", len(rows), unit="row", leave=False, disable=None)
    for number, row in enumerate(bar):
      report.rows += 1
      if row.broken:
        reports[rows.source(number)].add_broken(rows.label(number), row.broken)
      for entry in row.entries:
        queues[row.kind].add(entry)
        report.clips += len(entry.clips)
        report.damaged += entry.is_damaged
      if row.video:
        writer.put_video(*row.video)
    for queue in queues.values():
      queue.encode()
  return report


class _Entry(NamedTuple):
  """A video or an image to encode.

  Attributes:
    name: key in the store.
    clips: uint8 [C, F, S, S, 3]; each tile of an image is a clip of one frame.
    is_damaged: whether other frames replace frames of the video that cannot be read.
  """

  name: bytes
  clips: np.ndarray
  is_damaged: bool = False


class _ReadRow(NamedTuple):
  """The media of a row that are not in the store and were not read for an earlier row."""

  kind: str = "video"
  entries: Sequence[_Entry] = ()
  video: tuple[str, VideoInfo] | None = None
  broken: BrokenRow | None = None


class _RowMedia:
  """Reads the media of rows in several threads; media that several rows share are read once."""

  def __init__(self, rows: Rows, config: ExampleConfig, store: FeatureStore):
    self._rows, self._config, self._store = rows, config, store
    self._read: set[bytes] = set()  # entries that were read, and may not be in the store yet
    self._locks = [threading.Lock() for _ in range(_NUM_LOCKS)]

  def read(self, number: int) -> _ReadRow:
    """Reads the media of one row; errors are reported in `_ReadRow.broken`."""
    try:
      with any_error_breaks(self._rows.kind(number)):
        row = self._rows[number]
        return self._read_images(row) if row.get("video") is None else self._read_video(row)
    except BrokenRow as error:  # its traceback would keep the file open
      return _ReadRow(broken=BrokenRow(error.reason, error.detail))

  @contextlib.contextmanager
  def _once(self, entry: bytes) -> Iterator[bool]:
    """Yields whether the caller should read an entry inside the block.

    Another thread that asks for the same entry waits for the end of the block. If the block fails,
    that thread reads the entry.
    """
    with self._locks[entry[0] % _NUM_LOCKS]:
      is_new = entry not in self._read and entry not in self._store
      yield is_new
      self._read.add(entry)

  def _read_video(self, row) -> _ReadRow:
    path = row_video_path(row)
    info = self._store.video_info(path)
    if info is not None:
      choice = choose_frames(row, info, self._config)
      if frames_entry(path, choice.indices) in self._store:
        return _ReadRow()
    with open_row_video(row) as video:
      choice = choose_frames(row, video.info, self._config)
      entry, entries = frames_entry(path, choice.indices), []
      with self._once(entry) as is_new:
        if is_new:
          clips = read_clips(video, choice, self._config)
          entries.append(_Entry(entry, clips, video.damaged))
      facts = None if os.path.isdir(path) else (path, video.info)
      return _ReadRow(entries=entries, video=facts)

  def _read_images(self, row) -> _ReadRow:
    images, entries = read_row_images(row), []
    for image, grid in zip(images, choose_grids(images, self._config), strict=True):
      entry = image_entry(image, grid)
      with self._once(entry) as is_new:
        if is_new:
          entries.append(_Entry(entry, read_tiles(image, grid, self._config.image_size)))
    return _ReadRow("image", entries)


class _EntryQueue:
  """Collects entries until they fill a group of the encoder, since most entries are small."""

  def __init__(self, engine: Engine, writer: FeatureWriter):
    self._engine, self._writer = engine, writer
    self._entries: list[_Entry] = []

  def add(self, entry: _Entry):
    """Adds an entry, and encodes all if there are enough clips."""
    self._entries.append(entry)
    if sum(len(entry.clips) for entry in self._entries) >= CLIPS_PER_FILE:
      self.encode()

  def encode(self):
    """Encodes all collected entries and writes them to the store."""
    if not self._entries:
      return
    clips = itertools.chain.from_iterable(entry.clips for entry in self._entries)
    features = self._engine.encode_features(clips)
    for entry in self._entries:
      self._writer.put(entry.name, itertools.islice(features, len(entry.clips)))
      if entry.is_damaged:
        self._writer.mark_damaged(entry.name)
    self._entries = []
