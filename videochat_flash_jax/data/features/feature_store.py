"""Keeps the features of a frozen encoder on disk, so that an hour of video is encoded only once.

  store = FeatureStore.open("features", key, create=True)
  with store.writing() as writer:
    writer.put(frames_entry("match.mp4", indices), clips)      # bfloat16 [V, E] of each clip
  store.get(frames_entry("match.mp4", indices))                # bfloat16 [C, V, E]

A folder holds

  key.json   what made the features; opening the folder with another encoder is an error
  clips      one array [clips, V, E] for TensorStore or zarr: Zarr 3, 64 clips a file
  entries    for each entry its first clip, the number of clips, and whether its video is damaged
  videos     length and rate of each video, so that its frames are chosen without opening it

Features are those after merging and before the connector's MLP, because the MLP is usually not yet
trained when a store saves most work. There is one growing array for all entries, so that there are
few files even if entries are small. An entry exists once its record is written, which happens after
its clips are written. If a process is killed, later clips overwrite those that have no record. One
process writes at a time, and others may read: they find what was there when they opened the store.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from videochat_flash_jax import __version__
from videochat_flash_jax.data.features.feature_key import FeatureKey, file_digest
from videochat_flash_jax.data.features.record_file import RecordFile
from videochat_flash_jax.data.media.video_reader import VideoInfo
from videochat_flash_jax.errors import InputError, is_unicode
from videochat_flash_jax.models.config import ConnectorConfig
from videochat_flash_jax.plain_paths import plain_path

FORMAT = 2
CLIPS_PER_FILE = 64
_MOST_CLIPS = 1 << 40  # first axis of the array, so large that it never changes as clips are added
_ENTRY_FIELDS = ("first", "<i8"), ("clips", "<i8"), ("is_damaged", "u1")
_VIDEO_FIELDS = (
  ("num_frames", "<i8"), ("fps", "<f8"), ("seconds", "<f8"), ("height", "<i4"), ("width", "<i4")
)  # fmt: skip


class FeatureStore:
  """The features of one encoder. Other processes get only path and key, and open the files."""

  def __init__(self, path: Path, key: FeatureKey):
    """Stores path and key; use `open`."""
    self.path, self.key = path, key

  @classmethod
  def open(
    cls, path: str | os.PathLike, key: FeatureKey, *, create: bool = False
  ) -> "FeatureStore":
    """Opens a folder of features.

    Args:
      path: the folder.
      key: the encoder that the features must be from.
      create: whether to make the folder if it is missing.

    Raises:
      InputError: there is no such store, another encoder made it, or it cannot be read.
    """
    store = cls(Path(path), key)
    if not is_unicode(str(store.path.absolute())):
      raise InputError(
        f"{store.path.absolute()}: features cannot be kept where the name of a folder is not valid "
        "UTF-8; give another folder"
      )
    with _named_errors(store.path):
      if create and not store._key_file.exists():
        store._create()
      store._check_key()
    return store

  def __getstate__(self) -> dict[str, Any]:
    return {"path": self.path, "key": self.key}

  def __len__(self) -> int:
    return len(self._entries)

  def __contains__(self, entry: bytes) -> bool:
    return self._entries.find(entry) is not None

  @property
  def clip_shape(self) -> tuple[int, int]:
    """The shape (V, E) of a clip's features."""
    vision, connector = self.key.vision, ConnectorConfig(self.key.clip_tokens)
    return connector.num_tokens(vision.num_patches(vision.clip_frames)), vision.width

  def get(self, entry: bytes) -> np.ndarray | None:
    """Returns the features of an entry, bfloat16 `[C, V, E]`, or None if there is no such entry.

    Raises:
      InputError: files of the store are missing or damaged.
    """
    found = self._entries.find(entry)
    if found is None:
      return None
    first, clips, _ = found
    with _named_errors(self.path):
      return self._clips[first : first + clips].read().result()

  def is_damaged(self, entry: bytes) -> bool:
    """Returns whether some frames of an entry could not be read and were replaced by others."""
    found = self._entries.find(entry)
    return found is not None and bool(found[2])

  def video_info(self, path: str | os.PathLike) -> VideoInfo | None:
    """Returns length, rate and size of a video that has features, without opening the video.

    Returns None for other videos, and for a folder of pictures.
    """
    try:
      if os.path.isdir(path):
        return None  # the rate at which pictures are shown is not a property of the folder
      found = self._videos.find(file_digest(path))
    except (OSError, TypeError, ValueError):  # opening the video will raise a clear error
      return None
    return found and VideoInfo(*found)

  @contextlib.contextmanager
  def writing(self) -> Iterator["FeatureWriter"]:
    """Gives the only writer; all that was added is on disk when the block ends.

    Raises:
      InputError: another process writes to the store, or the disk is full.
    """
    with self._lock():
      with _named_errors(self.path):
        for name in ("_entries", "_videos"):  # another process may have written meanwhile
          self.__dict__.pop(name, None)
        self._clips = self._open_clips(create=True)
        writer = FeatureWriter(self.path, self._entries, self._videos, self._clips)
      try:
        yield writer
      finally:
        writer.flush()

  @property
  def _key_file(self) -> Path:
    return self.path / "key.json"

  @functools.cached_property
  def _entries(self) -> RecordFile:
    return RecordFile(self.path / "entries", _ENTRY_FIELDS)

  @functools.cached_property
  def _videos(self) -> RecordFile:
    return RecordFile(self.path / "videos", _VIDEO_FIELDS)

  @functools.cached_property
  def _clips(self):
    return self._open_clips(create=False)

  def _open_clips(self, create):
    import tensorstore  # slow to import, and not always needed

    clip, file_shape = self.clip_shape, [CLIPS_PER_FILE, *self.clip_shape]
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, *clip], "codecs": codecs, "index_codecs": codecs}
    metadata = {
      "shape": [_MOST_CLIPS, *clip],
      "data_type": "bfloat16",
      "dimension_names": ["clip", "token", "channel"],
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file_shape}},
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": f"{plain_path(self.path)}/clips/"},
      "metadata": metadata,
      "store_data_equal_to_fill_value": True,  # so that a missing chunk is always an error
      "fill_missing_data_reads": False,
    }
    return tensorstore.open(spec, open=True, create=create).result()

  def _create(self):
    if self.path.is_dir() and any(self.path.iterdir()):
      raise InputError(f"{self.path}: the folder holds other files; give a new folder for features")
    self.path.mkdir(parents=True, exist_ok=True)
    made_by = f"videochat_flash_jax {__version__}"
    facts = {"format": FORMAT, **self.key.facts(), "made_by": made_by}
    part = self._key_file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(part, self._key_file)

  def _check_key(self):
    """Raises an error if another encoder made the features; names the first difference."""
    if not self._key_file.exists():
      remedy = "make them with vcflash data encode, or check the path"
      raise InputError(f"{self.path}: there are no features; {remedy}")
    try:
      saved = json.loads(self._key_file.read_text())
      saved.keys()
    except (ValueError, AttributeError) as error:
      raise InputError(f"{self._key_file}: not a key of features; give another folder") from error
    for name, value in {"format": FORMAT, **self.key.facts()}.items():
      if saved.get(name) != value:
        raise InputError(
          f"{self.path}: features of another encoder: {name} is {saved.get(name)!r:.80} there, "
          f"here it is {value!r:.80}; give another folder"
        )

  @contextlib.contextmanager
  def _lock(self):
    """Locks the store until the block ends, or until the process ends for whatever reason."""
    import fcntl  # not available on every operating system

    with contextlib.ExitStack() as stack:
      with _named_errors(self.path):
        file = stack.enter_context(open(self.path / "lock", "wb"))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
          remedy = "wait for it, or give another folder"
          raise InputError(f"{self.path}: another process writes to it; {remedy}") from error
      yield


class FeatureWriter:
  """Adds entries to a store.

  Clips are collected until they fill a file. An entry exists once its last clip is on disk.
  """

  def __init__(self, path: Path, entries: RecordFile, videos: RecordFile, clips):
    """Is called by `FeatureStore.writing` only."""
    self._path, self._entries, self._videos, self._clips = path, entries, videos, clips
    # Clips up to `_start` are on disk; those up to `_end` wait in `_file`, at their final offsets.
    old = entries.records
    self._start = self._end = int((old["first"] + old["clips"]).max(initial=0))
    self._file = np.empty((CLIPS_PER_FILE, *clips.shape[1:]), ml_dtypes.bfloat16)
    self._waiting: dict[bytes, tuple[int, int, bool]] = {}  # records without all clips on disk

  def __contains__(self, entry: bytes) -> bool:
    return entry in self._waiting or self._entries.find(entry) is not None

  def put(self, entry: bytes, clips: Iterable[np.ndarray]) -> None:
    """Adds an entry, clip by clip as they are made; if that fails, nothing of the entry is added.

    Args:
      entry: its key, from `feature_key`; it must be new.
      clips: features of each clip, bfloat16 `[V, E]`.

    Raises:
      InputError: the clips cannot be written; for example, the disk is full.
    """
    if entry in self:
      raise ValueError("the store already has this entry")
    first = self._end
    try:
      for clip in clips:
        self._add(clip)
    except BaseException:
      self._start, self._end = min(self._start, first), first
      raise
    self._waiting[entry] = first, self._end - first, False

  def mark_damaged(self, entry: bytes) -> None:
    """Records that frames of the video of the last added entry could not be read."""
    self._waiting[entry] = *self._waiting[entry][:2], True

  def put_video(self, path: str | os.PathLike, info: VideoInfo) -> None:
    """Stores length, rate and size of a video file for `FeatureStore.video_info`."""
    digest = file_digest(path)
    if self._videos.find(digest) is None:
      with _named_errors(self._path):
        self._videos.append({digest: dataclasses.astuple(info)})

  def flush(self) -> None:
    """Writes the collected clips, and the records of entries whose clips are all written."""
    start, end = self._start, self._end
    with _named_errors(self._path):
      if end > start:
        file = start // CLIPS_PER_FILE * CLIPS_PER_FILE
        self._clips[start:end].write(self._file[start - file : end - file]).result()
        self._start = end
      complete = {
        entry: record for entry, record in self._waiting.items() if sum(record[:2]) <= self._start
      }
      self._entries.append(complete)
    for entry in complete:
      del self._waiting[entry]

  def _add(self, clip):
    if clip.shape != self._file.shape[1:] or clip.dtype != self._file.dtype:
      raise TypeError(f"a clip is {clip.dtype} {clip.shape}, not bfloat16 {self._file.shape[1:]}")
    self._file[self._end % CLIPS_PER_FILE] = clip
    self._end += 1
    if self._end % CLIPS_PER_FILE == 0:
      self.flush()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
  """Turns errors of the disk and of TensorStore into an `InputError` that names the store."""
  try:
    yield
  except InputError:
    raise
  except OSError as error:
    reason = error.strerror or error
    remedy = "give another folder, or repair this one"
    raise InputError(f"{path}: cannot be used ({reason}); {remedy}") from error
  except ValueError as error:  # TensorStore's
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"{path}: features cannot be read or written ({reason}); if files are damaged or missing, "
      "delete the folder and encode again"
    ) from error
