"""What a frozen encoder made of videos, on disk: an hour of video is encoded once.

  store = FeatureStore.open("features", key, create=True)
  with store.writing() as writer:
    writer.put(frames_entry("match.mp4", indices), clips)      # bfloat16 [V, E] of each clip
  store.get(frames_entry("match.mp4", indices))                # bfloat16 [C, V, E]

A folder holds

  key.json   what made the features; another encoder is refused
  clips      one array [clips, V, E] for TensorStore or zarr: Zarr 3, 64 clips a file
  entries    for each entry its first clip, how many there are, and whether its video is damaged
  videos     length and rate of each video, so that its frames are chosen without opening it

Features are those after merging and before the connector's MLP, which has yet to be trained when
they are worth most. One growing array keeps the number of files small, however small the entries
are. An entry counts once its record is written, after its clips; what a killed process left beyond
the last record is written over. One process writes at a time, others may read: they find what was
there when they opened the store.
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
from videochat_flash_jax.errors import InputError

FORMAT = 2
CLIPS_PER_FILE = 64
_MOST_CLIPS = 1 << 40  # the shape of the array, so that it need not change as clips are added
_ENTRY_FIELDS = ("first", "<i8"), ("clips", "<i8"), ("is_damaged", "u1")
_VIDEO_FIELDS = (
  ("num_frames", "<i8"), ("fps", "<f8"), ("seconds", "<f8"), ("height", "<i4"), ("width", "<i4")
)  # fmt: skip


class FeatureStore:
  """Features of one encoder. Other processes are sent the path alone, and open it themselves."""

  def __init__(self, path: Path, key: FeatureKey):
    """See `open`."""
    self.path, self.key = path, key

  @classmethod
  def open(
    cls, path: str | os.PathLike, key: FeatureKey, *, create: bool = False
  ) -> "FeatureStore":
    """Opens a folder of features.

    Args:
      path: the folder.
      key: what the features are made by.
      create: whether to make the folder if it is missing.

    Raises:
      InputError: there is no such store, it was made by another encoder, or cannot be read.
    """
    store = cls(Path(path), key)
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
    """(V, E) of a clip."""
    return self.key.clip_tokens, self.key.vision.width

  def get(self, entry: bytes) -> np.ndarray | None:
    """The features of an entry, bfloat16 `[C, V, E]`, or None if it is not here.

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
    """Whether other frames stood in for some of an entry's, which could not be read."""
    found = self._entries.find(entry)
    return found is not None and bool(found[2])

  def video_info(self, path: str | os.PathLike) -> VideoInfo | None:
    """Facts of a video file of which there are features, without opening it as a video."""
    try:
      if os.path.isdir(path):
        return None  # the rate at which pictures are shown is not theirs
      found = self._videos.find(file_digest(path))
    except (OSError, TypeError, ValueError):  # whoever opens it says what is wrong
      return None
    return found and VideoInfo(*found)

  @contextlib.contextmanager
  def writing(self) -> Iterator["FeatureWriter"]:
    """Gives the one writer; what it was given is on disk when the block is left.

    Raises:
      InputError: another process writes there, or the disk is full.
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

    clip, files = self.clip_shape, [CLIPS_PER_FILE, *self.clip_shape]
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, *clip], "codecs": codecs, "index_codecs": codecs}
    metadata = {
      "shape": [_MOST_CLIPS, *clip],
      "data_type": "bfloat16",
      "dimension_names": ["clip", "token", "channel"],
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": files}},
      "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    spec = {
      "driver": "zarr3",
      "kvstore": {"driver": "file", "path": f"{self.path / 'clips'}{os.sep}"},
      "metadata": metadata,
      "store_data_equal_to_fill_value": True,  # so that a chunk that is not there is an error
      "fill_missing_data_reads": False,
    }
    return tensorstore.open(spec, open=True, create=create).result()

  def _create(self):
    if self.path.is_dir() and any(self.path.iterdir()):
      raise InputError(f"{self.path}: a folder of other things; give a new one for features")
    self.path.mkdir(parents=True, exist_ok=True)
    made_by = f"videochat_flash_jax {__version__}"
    facts = {"format": FORMAT, **self.key.facts(), "made_by": made_by}
    part = self._key_file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(part, self._key_file)

  def _check_key(self):
    """Refuses features of another encoder, and names the first thing that differs."""
    if not self._key_file.exists():
      remedy = "vcflash data encode makes them, or check the path"
      raise InputError(f"{self.path}: there are no features; {remedy}")
    try:
      saved = json.loads(self._key_file.read_text())
      saved.keys()
    except (ValueError, AttributeError) as error:
      raise InputError(f"{self._key_file}: no key of features; give another folder") from error
    for name, value in {"format": FORMAT, **self.key.facts()}.items():
      if saved.get(name) != value:
        raise InputError(
          f"{self.path}: features of another encoder: {name} is {saved.get(name)!r} there, "
          f"here it is {value!r}; give another folder"
        )

  @contextlib.contextmanager
  def _lock(self):
    """Ours until the block is left, or the process ends in whatever way."""
    import fcntl  # not on every system

    with contextlib.ExitStack() as stack:
      with _named_errors(self.path):
        file = stack.enter_context(open(self.path / "lock", "wb"))
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
          remedy = "wait for it, or give another folder"
          raise InputError(f"{self.path}: another process writes there; {remedy}") from error
      yield


class FeatureWriter:
  """Adds entries. Clips are collected to whole files; an entry counts when its last one is full."""

  def __init__(self, path: Path, entries: RecordFile, videos: RecordFile, clips):
    """Made by `FeatureStore.writing`."""
    self._path, self._entries, self._videos, self._clips = path, entries, videos, clips
    # Clips up to `_start` are on disk; those up to `_end` wait in `_file`, at their places there.
    old = entries.records
    self._start = self._end = int((old["first"] + old["clips"]).max(initial=0))
    self._file = np.empty((CLIPS_PER_FILE, *clips.shape[1:]), ml_dtypes.bfloat16)
    self._waiting: dict[bytes, tuple[int, int, bool]] = {}

  def __contains__(self, entry: bytes) -> bool:
    return entry in self._waiting or self._entries.find(entry) is not None

  def put(self, entry: bytes, clips: Iterable[np.ndarray]) -> None:
    """Adds an entry, clip by clip as they come; if that fails, nothing of it.

    `entry` is of `feature_key` and not here yet; `clips` are bfloat16 `[V, E]` each.

    Raises:
      InputError: the disk is full, say.
    """
    if entry in self:
      raise ValueError("the entry is here already")
    first = self._end
    try:
      for clip in clips:
        self._add(clip)
    except BaseException:
      self._start, self._end = min(self._start, first), first
      raise
    self._waiting[entry] = first, self._end - first, False

  def mark_damaged(self, entry: bytes) -> None:
    """Notes of the entry put last that frames of its video could not be read."""
    self._waiting[entry] = *self._waiting[entry][:2], True

  def put_video(self, path: str | os.PathLike, info: VideoInfo) -> None:
    """Notes the facts of a video file for `FeatureStore.video_info`."""
    digest = file_digest(path)
    if self._videos.find(digest) is None:
      with _named_errors(self._path):
        self._videos.append({digest: dataclasses.astuple(info)})

  def flush(self) -> None:
    """Writes what was collected."""
    start, end = self._start, self._end
    with _named_errors(self._path):
      if end > start:
        file = start // CLIPS_PER_FILE * CLIPS_PER_FILE
        self._clips[start:end].write(self._file[start - file : end - file]).result()
        self._start = end
      whole = {e: place for e, place in self._waiting.items() if sum(place[:2]) <= self._start}
      self._entries.append(whole)
    for entry in whole:
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
  try:
    yield
  except InputError:
    raise
  except OSError as error:
    reason = error.strerror or error
    remedy = "give another folder, or mend it"
    raise InputError(f"{path}: cannot be used ({reason}); {remedy}") from error
  except ValueError as error:  # TensorStore's
    reason = " ".join(str(error).split())[:200]
    raise InputError(
      f"{path}: features cannot be read or written ({reason}); if files are damaged or missing, "
      "delete the folder and encode again"
    ) from error
