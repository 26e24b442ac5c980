"""Watching what people have: streams that end, stall or go on for ever, and pieces of any size."""

import multiprocessing
import os
import queue
import re
import signal
import threading

import av
import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.inference.watching import Window
from videochat_flash_jax.models.config import DROPOUT_KINDS, DropoutConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint

QUESTION = "What colour is the star?"
FRAMES = np.random.default_rng(0).integers(0, 256, (160, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def interrupts_are_noticed():
  """A process that was started in the background ignores them."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def chat(checkpoint):
  return VideoChat.from_pretrained(checkpoint)


def ask(video, question=QUESTION):
  return video.ask(question, max_new_tokens=16)


def pieces_of(num_pieces):
  """The frames in so many pieces of whole clips, of different sizes."""
  clips = np.split(FRAMES, len(FRAMES) // 4)
  return [np.concatenate(piece) for piece in np.array_split(np.array(clips), num_pieces)]


@pytest.mark.parametrize(
  "kind", [None, pytest.param("uniform0_attention"), *(
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in DROPOUT_KINDS if kind != "uniform0_attention"
  )],
)  # fmt: skip
def test_a_video_that_grows_in_any_pieces_answers_as_one_watched_at_once(checkpoint, kind):
  dropout = kind and DropoutConfig(kind, (1, 2), (1.0, 0.5, 0.2))
  chat = VideoChat.from_pretrained(checkpoint, dropout=dropout)
  whole = chat.watch(FRAMES)
  expected = [ask(whole), ask(whole, "Where does it go?")]
  for num_pieces in (7, 40):
    first, *others = pieces_of(num_pieces)
    grown = chat.watch(first)
    for number, piece in enumerate(others):
      grown.extend(piece)
      if number == 2:
        ask(grown)  # asking does not disturb the stream
        grown.reset()
    assert (grown.num_frames, grown.seconds) == (whole.num_frames, whole.seconds)
    assert [ask(grown), ask(grown, "Where does it go?")] == expected


def test_the_cache_of_a_video_that_grew_is_as_long_as_its_tokens_need(chat, monkeypatch):
  monkeypatch.setattr("videochat_flash_jax.inference.prefix.CHUNK", 128)
  monkeypatch.setattr("videochat_flash_jax.inference.prefix._SMALL_CHUNKS", (128, 64))
  video = chat.watch(FRAMES[:152])
  before = video._prefix.caches[0].num_slots
  assert before >= video._prefix.num_tokens > 3 * 128
  video.extend(FRAMES[152:156])
  assert video._prefix.caches[0].num_slots <= before + 128


def test_array_list_and_iterator_of_the_same_frames_give_the_same_answer(chat):
  frames = FRAMES[:16]
  videos = [chat.watch(source) for source in (frames, list(frames), iter(frames))]
  assert len({ask(video) for video in videos}) == 1
  assert [video.frame_times for video in videos] == [list(map(float, range(16)))] * 3


def test_times_of_the_user_are_kept_and_told(chat):
  times = [0.5, 1.0, 2.5, 7.0]
  assert chat.watch(FRAMES[:4], times=times).frame_times == times
  part = chat.watch(FRAMES, fps=2.0, start=10, end=30, max_frames=8)
  assert part.num_frames == 8 and part.seconds == 20.0
  assert all(10 <= time < 30 for time in part.frame_times)


def test_frames_never_pile_up(chat, monkeypatch):
  taken, waiting = [0], []
  add_visual = Prefix.add_visual

  def camera():
    for frame in FRAMES:
      taken[0] += 1
      yield frame

  def add(prefix, tokens):
    add_visual(prefix, tokens)
    read = int(prefix.is_visual.sum()) // chat.config.clip_tokens * 4
    waiting.append(taken[0] - read)

  monkeypatch.setattr(Prefix, "add_visual", add)
  chat.watch(camera())
  assert len(waiting) == len(FRAMES) // 32
  assert max(waiting) <= 6 * 32  # some groups in the queues, and one in the hand of each stage


@pytest.mark.parametrize("error", [RuntimeError("camera is gone"), KeyboardInterrupt()])
def test_what_was_watched_before_a_stream_dies_can_be_asked_about(chat, error):
  def camera():
    yield from FRAMES[:66]
    raise error

  video = chat.watch(FRAMES[:8])
  with pytest.raises(InputError if isinstance(error, Exception) else KeyboardInterrupt):
    video.extend(camera())
  # An error is told after all clips before it; Ctrl-C waits for no clip that is being encoded.
  assert video.num_frames == 72 or (not isinstance(error, Exception) and video.num_frames % 4 == 0)
  assert video.seconds == video.num_frames
  alone = chat.watch(np.concatenate([FRAMES[:8], FRAMES[: video.num_frames - 8]]))
  assert ask(video) == ask(alone)
  assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


def with_ctrl_c(program):
  """The same program, but Ctrl-C is pressed when it has run for the first time."""
  pressed = []

  def run(*arguments, **options):
    result = program(*arguments, **options)
    if not pressed:
      pressed.append(True)
      os.kill(os.getpid(), signal.SIGINT)
    return result

  return run


@pytest.mark.parametrize("dropout", [None, DropoutConfig("uniform", (1, 2), (1.0, 0.5, 0.2))])
def test_ctrl_c_while_tokens_are_read_leaves_a_video_that_can_be_asked(
  checkpoint, monkeypatch, dropout
):
  chat = VideoChat.from_pretrained(checkpoint, dropout=dropout)
  video = chat.watch(FRAMES[:8])
  monkeypatch.setattr(programs, "read", with_ctrl_c(programs.read))
  with pytest.raises(KeyboardInterrupt):
    video.extend(FRAMES[8:80])
  assert video.num_frames in range(8, 81, 4)
  assert ask(video) == ask(chat.watch(FRAMES[: video.num_frames]))


@pytest.mark.parametrize("name", ["read", "decode"])
def test_ctrl_c_while_a_question_is_answered_leaves_a_conversation_that_goes_on(
  chat, monkeypatch, name
):
  video, other = chat.watch(FRAMES[:8]), chat.watch(FRAMES[:8])
  assert ask(video, "Why?") == ask(other, "Why?")
  monkeypatch.setattr(programs, name, with_ctrl_c(getattr(programs, name)))
  with pytest.raises(KeyboardInterrupt):
    ask(video, "And where does it go?")
  assert len(video.history) == 1
  assert ask(video) == ask(other)


def test_ctrl_c_while_a_stream_stalls_leaves_no_thread(chat):
  gate = threading.Event()

  def camera():
    yield from FRAMES[:40]
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    gate.wait(20)

  with pytest.raises(KeyboardInterrupt):
    chat.watch(camera())
  gate.set()
  for thread in threading.enumerate():
    if thread.name == "ahead":
      thread.join(5)
      assert not thread.is_alive()


@pytest.mark.parametrize("kind", [queue.Queue, queue.SimpleQueue, multiprocessing.Queue])
def test_a_video_grows_from_queues_of_any_kind(chat, kind):
  frames = kind()
  for frame in [*FRAMES[4:7], None]:
    frames.put(frame)
  video = chat.watch(FRAMES[:4])
  video.extend(frames, stall_seconds=10)
  assert video.frame_times == [0, 1, 2, 3, 4, 5, 6, 6] and video.seconds == 7


def test_a_queue_that_stalled_loses_nothing_that_is_put_later(chat):
  frames, video = queue.Queue(), chat.watch(FRAMES[:4])
  for given in (FRAMES[4:8], FRAMES[8:12]):
    for frame in given:
      frames.put(frame)
    with pytest.raises(InputError, match=r"frame 4 did not come"):
      video.extend(frames, stall_seconds=0.2)
  frames.put(FRAMES[12])
  frames.put(None)
  video.extend(frames, stall_seconds=10)
  assert video.frame_times == [*range(13), 12, 12, 12]


def as_pictures(frames, folder):
  """Frames as a list of Pillow images, and as a folder and a video without losses."""
  images = [Image.fromarray(frame) for frame in frames]
  for index, image in enumerate(images):
    image.save(folder / f"{index:03}.png")
  video = folder.with_suffix(".mkv")
  with av.open(video, "w") as container:
    stream = container.add_stream("ffv1", rate=1, width=32, height=32, pix_fmt="bgr0")
    for image in images:
      container.mux(stream.encode(av.VideoFrame.from_image(image)))
    container.mux(stream.encode())
  return images, folder, video


def test_a_video_grows_from_pictures_folders_and_files(chat, tmp_path):
  expected = ask(chat.watch(FRAMES[:16]))
  for kind in as_pictures(FRAMES[4:16], tmp_path):
    video = chat.watch(FRAMES[:4])
    video.extend(kind)
    assert video.frame_times == list(range(16)) and video.seconds == 16
    assert ask(video) == expected
  video = chat.watch(FRAMES[:4])
  video.extend(tmp_path.with_suffix(".mkv"), fps=0.5)
  assert video.seconds == 16 and len(set(video.frame_times)) == 4 + 4


def test_what_cannot_extend_a_video_leaves_its_answers(chat):
  video = chat.watch(FRAMES[:4])
  pieces = video.ask(QUESTION, stream=True, max_new_tokens=16)
  first = next(pieces)
  for frames in ("a.mp4", None, [], FRAMES[:3]):
    with pytest.raises(InputError):
      video.extend(frames)
  assert first + "".join(pieces) == ask(chat.watch(FRAMES[:4]))


@pytest.mark.parametrize(
  "frames, said",
  [
    ([FRAMES[0], FRAMES[1, :16]], r"frame 1 is 32x16, those before are 32x32"),
    ([FRAMES[0], None], "frame 1 is of type NoneType"),
    ([FRAMES[0], FRAMES[1].astype(float)], "frame 1.*float64"),
  ],
)
def test_a_broken_frame_of_a_stream_is_named(chat, frames, said):
  with pytest.raises(InputError, match=said):
    chat.watch(iter(frames))
  assert ask(chat.watch(FRAMES[:4]))


def test_a_stream_that_stalls_is_left(chat):
  gate = threading.Event()

  def camera():
    yield from FRAMES[:4]
    gate.wait(20)

  frames = camera()
  with pytest.raises(InputError, match="frame 4 did not come"):
    chat.watch(frames, stall_seconds=0.2)
  with pytest.raises(InputError, match=r"still makes a frame .* or give a queue"):
    chat.watch(frames)
  gate.set()


def test_more_frames_than_the_context_holds_are_refused_with_those_that_fit(chat):
  most, per_clip = chat.config.decoder.max_positions, chat.config.clip_tokens
  too_many = np.zeros((4 * (most // per_clip + 1), 8, 8, 3), np.uint8)
  said = []
  for frames in (too_many, iter(too_many)):  # of an iterator nobody knows the length
    with pytest.raises(InputError, match=r"frames fit in all\. Give max_frames") as error:
      chat.watch(frames, max_frames=len(too_many))
    assert f"holds {most:,}" in str(error.value) and "--context" in str(error.value)
    said.append(re.search("beside a question (.*) frames fit", str(error.value))[1])
  assert said[0] == said[1] and int(said[0].replace(",", "")) > 0
  with pytest.raises(InputError, match="beside a question"):  # no room for any
    chat.watch(too_many[: (most - 32) // per_clip * 4], max_frames=len(too_many))
  video = chat.watch(FRAMES[:4])
  with pytest.raises(InputError, match="frames fit"):
    video.extend(too_many)
  assert ask(video) == ask(chat.watch(FRAMES[:4]))


def remembered(video):
  return [int(time) for time in video.frame_times]


def test_a_window_remembers_the_first_and_the_last_frames(chat):
  video = chat.watch(iter(FRAMES), window=64)
  assert remembered(video)[:16] == list(range(16))
  assert remembered(video)[16:] == list(range(160 - video.num_frames + 16, 160))
  assert 48 <= video.num_frames <= 64
  assert video.num_frames + video.num_dropped == 160
  assert f"{video.num_dropped} dropped before" in repr(video)
  video.extend(FRAMES[:40])
  assert video.num_frames + video.num_dropped == 200 and video.num_frames <= 64
  assert ask(video)


def test_above_a_drop_nothing_is_read_before_a_question_if_it_may_be_forgotten(
  checkpoint, monkeypatch, reads
):
  monkeypatch.setattr("videochat_flash_jax.inference.prefix.CHUNK", 64)
  dropout = DropoutConfig("uniform", (1, 2), (1.0, 0.5, 0.2))
  video = VideoChat.from_pretrained(checkpoint, dropout=dropout).watch(iter(FRAMES), window=64)
  read = [count for layers, count in reads if layers == range(1, 2)]
  visual = int(video._prefix.is_visual.sum())
  assert sum(read) == video._prefix.num_tokens - visual + visual // 2


@pytest.mark.parametrize("kind", [None, "uniform0_attention"])
def test_memory_behind_a_window_stays_the_same(checkpoint, kind):
  dropout = kind and DropoutConfig(kind, (1, 2), (1.0, 0.5, 0.2))
  chat = VideoChat.from_pretrained(checkpoint, dropout=dropout)
  video = chat.watch(iter(FRAMES), window=32)

  def sizes():
    prefix = video._prefix
    slots = [cache.num_slots for cache in prefix.caches]
    return slots, [states.room for states in prefix.entered], prefix.num_tokens // 100

  found = []
  for _ in range(4):
    video.extend(FRAMES)
    ask(video)
    found.append(sizes())
  assert found[1:] == found[:1] * 3


def test_positions_behind_a_window_are_contiguous_and_keys_are_turned(chat):
  """Without layers above the first, a token's key and value depend on the token alone."""
  engine = chat.engine
  rng = np.random.default_rng(1)
  text, tokens = np.arange(5, 10), rng.standard_normal((120, chat.config.decoder.width), np.float32)
  first, last = slice(0, 48), slice(84, 120)
  prefixes = []
  for kept in (None, np.r_[first, last]):
    prefix = Prefix(engine)
    prefix.add_text(text)
    prefix.add_visual(tokens if kept is None else tokens[kept])
    prefix.settle()
    prefixes.append(prefix)
  slid, direct = prefixes
  slid.forget(5 + 48, 36)
  assert slid.num_tokens == direct.num_tokens and slid.num_forgotten == 36
  (k, v), (k_direct, v_direct) = (
    prefix.caches[0].read(0, np.float32) for prefix in prefixes
  )  # fmt: skip
  size = direct.num_tokens
  np.testing.assert_allclose(k[:, :size], k_direct[:, :size], atol=2e-5)
  np.testing.assert_allclose(v[:, :size], v_direct[:, :size], atol=2e-5)


@pytest.mark.parametrize("window", [0, 31, 3.5, True, "64"])
def test_a_window_that_is_none_is_refused(chat, window):
  with pytest.raises(InputError, match=r"^window is .*an integer of 32 or more"):
    chat.watch(FRAMES, window=window)


def test_on_several_hosts_one_thread_starts_all_programs(chat, monkeypatch):
  monkeypatch.setattr(Engine, "is_on_several_hosts", True)
  encode, threads = programs.encode, []

  def encode_here(*arguments):
    threads.append(threading.current_thread())
    return encode(*arguments)

  encode_here.__name__ = "encode"
  monkeypatch.setattr(programs, "encode", encode_here)
  video = chat.watch(FRAMES[:64])
  assert set(threads) == {threading.main_thread()} and len(threads) == 2
  assert video.num_frames == 64


def test_features_of_several_hosts_are_refused(checkpoint, monkeypatch, tmp_path):
  monkeypatch.setattr(Engine, "is_on_several_hosts", True)
  with pytest.raises(InputError, match=r"^features is for one host"):
    VideoChat.from_pretrained(checkpoint, features=tmp_path)


def test_a_window_beyond_the_context_is_refused_before_a_frame_is_taken(chat):
  camera = iter(FRAMES)
  with pytest.raises(InputError, match=r"beside a question .* frames fit"):
    chat.watch(camera, window=4 * chat.config.decoder.max_positions)
  assert len(list(camera)) == len(FRAMES)


def test_frames_of_a_window_are_counted_over_the_gap():
  window = Window(num_clips=8, clip_tokens=12)
  assert window.remembered(40, 4, 24).tolist() == [*range(16), *range(24, 40)]


def test_a_new_length_compiles_nothing(chat):
  for num_frames in (16, 80):  # pieces of both sizes
    ask(chat.watch(FRAMES[:num_frames]))
  compiled = set(chat.engine._compiled)
  for num_frames in (52, 100, 156):
    ask(chat.watch(FRAMES[:num_frames]))
  new = {shape for shape in chat.engine._compiled - compiled if shape[0] in ("encode", "read")}
  assert {shape[1:] for shape in new} <= {
    (range(0, 3), 1, size, 512, 4096) for size in (16, 24, 32, 48, 64)
  }


def test_a_text_reads_no_visual_tokens(chat, monkeypatch):
  video = chat.watch(FRAMES[:64])
  ask(video)
  seen, put = [], Engine._put

  def record(engine, *arrays):
    seen.extend(array.shape for array in arrays if hasattr(array, "shape"))
    return put(engine, *arrays)

  monkeypatch.setattr(Engine, "_put", record)
  ask(video, "Where?")
  assert all(np.prod(shape) < 64 / 4 * chat.config.clip_tokens * 48 for shape in seen)
