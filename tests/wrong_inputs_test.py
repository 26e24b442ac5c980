"""Wrong inputs, as people and programs give them: each gets one short message without its data."""

import queue

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.cli.main import main
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

LONGEST = 400  # characters of a message
SECRET = "swordfish"  # what a long text repeats; a message may show its beginning
LONG = SECRET * 1000


def assert_short(message):
  assert 10 < len(message) <= LONGEST and message.count(SECRET) < 15, message[:1000]
  assert "\n" not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  write_dummy_video(folder / "film.mp4")
  write_dummy_checkpoint(folder / "model")
  Image.new("RGB", (40, 30)).save(folder / "photo.png")
  (folder / "films").mkdir()
  write_dummy_video(folder / "films" / "a.mp4")
  (folder / "empty").mkdir()
  (folder / "nothing.mp4").touch()
  (folder / "notes.txt").write_text(LONG)
  (folder / "notes.mp4").write_text(LONG)
  (folder / "photo.jpg").write_text(LONG)
  (folder / "rows.jsonl").write_text(f'{{"video": "{LONG}"')
  (folder / "mixture.yaml").write_text(f"datasets: {LONG}")
  (folder / "config.py").write_text(f"def get_config():\n  return '{LONG}'\n")
  return folder


FILM, TINY = ("--video", "film.mp4"), ("--model", "model")
CHAT = ("chat", *TINY, *FILM)
COMMANDS = [
  (),
  ("chatt",),
  (LONG,),
  ("--video", "film.mp4"),
  ("chat", LONG),
  ("chat", f"--{LONG}", "1"),
  (*CHAT, "What is it?"),
  ("chat", *TINY, "--path", "film.mp4"),
  (*CHAT, "--prompt", LONG),
  (*CHAT, "--question", ""),
  (*CHAT, "--question", LONG),
  ("chat", *TINY, "--question", LONG),
  ("chat", *TINY, "--video", LONG, "-q", "a"),
  ("chat", *TINY, "--video", "missing.mp4", "-q", "a"),
  ("chat", *TINY, "--video", "nothing.mp4", "-q", "a"),
  ("chat", *TINY, "--video", "notes.mp4", "-q", "a"),
  ("chat", *TINY, "--video", "photo.png", "-q", "a"),
  ("chat", *TINY, "--video", "films", "-q", "a"),
  ("chat", *TINY, "--video", "empty", "-q", "a"),
  ("chat", *TINY, "--video", f"https://localhost:1/{LONG}.mp4", "-q", "a"),
  ("chat", *TINY, "--video", f"sword://{LONG}", "-q", "a"),
  ("chat", *TINY, "--image", "photo.jpg", "-q", "a"),
  ("chat", *TINY, "--image", "film.mp4", "-q", "a"),
  ("chat", *TINY, "--image", "empty", "-q", "a"),
  ("chat", "--model", LONG, *FILM, "-q", "a"),
  ("chat", "--model", f"owner/{LONG}", *FILM, "-q", "a"),
  ("chat", "--model", "empty", *FILM, "-q", "a"),
  ("chat", "--model", "photo.png", *FILM, "-q", "a"),
  (*CHAT, "-q", "a", "--max-frames", "0"),
  (*CHAT, "-q", "a", "--max-frames", LONG),
  (*CHAT, "-q", "a", "--fps", "nan"),
  (*CHAT, "-q", "a", "--start", "9", "--end", "3"),
  (*CHAT, "-q", "a", "--start", "1e9"),
  (*CHAT, "-q", "a", "--temperature", "-1"),
  (*CHAT, "-q", "a", "--top-p", "2"),
  (*CHAT, "-q", "a", "--context", "3"),
  (*CHAT, "-q", "a", "--yarn", "0.5"),
  (*CHAT, "-q", "a", "--dropout"),
  (*CHAT, "-q", "a", "--tensor", "3"),
  (*CHAT, "-q", "a", "--window", "4"),
  (*CHAT, "-q", "a", "--weights", LONG),
  ("fit", "--model", LONG, "--chip", "v5e"),
  ("fit", "--model", "tiny", "--chip", LONG),
  ("fit", "--model", "tiny"),
  ("synth", "--out", "world", "--videos", "1", "--frames", LONG),
  ("synth", "--out", "notes.txt", "--videos", "1"),
  ("evaluate", *TINY, "--annotations", "rows.jsonl"),
  ("evaluate", *TINY, "--annotations", "notes.txt"),
  ("data", "check", "mixture.yaml"),
  ("data", "check", "missing.yaml"),
  ("train", "--config", "config.py", "--workdir", "run"),
  ("train", "--config", LONG, "--workdir", "run"),
  ("convert", *TINY, "--out", LONG),
  ("data", "convert", LONG, "--out", "rows.jsonl"),
  ("compile", "--config", "config.py", "--topology", LONG),
  ("convert", *TINY, "--out", "model"),
  ("bench", LONG),
]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv)[:60])
def test_a_wrong_command_is_one_short_line(folder, monkeypatch, capsys, argv):
  monkeypatch.chdir(folder)
  assert main(list(argv)) == 2
  output = capsys.readouterr()
  *_, last = output.err.splitlines()
  assert last.startswith("vcflash: ")
  assert_short(last)
  assert SECRET * 20 not in output.out + output.err


def frames(*shape, dtype=np.uint8):
  return np.full(shape, 200, dtype)


def full_queue():
  waiting = queue.Queue()
  waiting.put(LONG)
  return waiting


CALLS = {
  "a model of bytes": lambda chat: VideoChat.from_pretrained(LONG.encode()),
  "a dtype": lambda chat: VideoChat.from_pretrained("model", LONG),
  "a context": lambda chat: VideoChat.from_pretrained("model", context=LONG),
  "a dropout": lambda chat: VideoChat.from_pretrained("model", dropout=LONG),
  "a kind of dropout": lambda chat: VideoChat.from_pretrained(
    "model", dropout=DropoutConfig(LONG, (1,), (1.0, 0.5))
  ),
  "a mesh": lambda chat: VideoChat.from_pretrained("model", mesh=LONG),
  "features": lambda chat: VideoChat.from_pretrained("model", features="notes.txt"),
  "bytes": lambda chat: chat.watch(LONG.encode()),
  "nothing": lambda chat: chat.watch(None),
  "an empty list": lambda chat: chat.watch([]),
  "a list of texts": lambda chat: chat.watch([LONG] * 4),
  "a list of lists": lambda chat: chat.watch([[LONG]] * 4),
  "floats": lambda chat: chat.watch(frames(4, 8, 8, 3, dtype=np.float32)),
  "four channels": lambda chat: chat.watch(frames(4, 8, 8, 4)),
  "no frames": lambda chat: chat.watch(frames(0, 8, 8, 3)),
  "an iterator of texts": lambda chat: chat.watch(iter([LONG])),
  "a queue of texts": lambda chat: chat.watch(full_queue()),
  "times that fall": lambda chat: chat.watch("film.mp4", times=[3, 2, 1] * 999),
  "times of text": lambda chat: chat.watch("film.mp4", times=[LONG]),
  "max_frames": lambda chat: chat.watch("film.mp4", LONG),
  "fps": lambda chat: chat.watch("film.mp4", fps=LONG),
  "no image": lambda chat: chat.look([]),
  "an image of text": lambda chat: chat.look(LONG),
  "an image of lists": lambda chat: chat.look([[[LONG]]]),
  "a question of numbers": lambda chat: chat.ask(frames(999)),
  "a question of bytes": lambda chat: chat.ask(LONG.encode()),
  "a list with nothing": lambda chat: chat.ask([]),
  "a list of numbers": lambda chat: chat.ask([frames(999)]),
  "a question that is too long": lambda chat: chat.ask(LONG * 99),
  "max_new_tokens": lambda chat: chat.ask("a", max_new_tokens=LONG),
  "a seed": lambda chat: chat.ask("a", temperature=1.0, seed=LONG),
  "a role": lambda chat: chat.ask([{"role": LONG, "content": LONG}]),
  "a part": lambda chat: chat.ask([{"role": "user", "content": [{"type": LONG}]}]),
  "a data URL": lambda chat: chat.ask(
    [
      {
        "role": "user",
        "content": [
          {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LONG}"}},
          {"type": "text", "text": LONG},
        ],
      }
    ]
  ),
}


@pytest.fixture(scope="module")
def chat(folder):
  return VideoChat.from_pretrained(folder / "model")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_wrong_call_raises_a_short_error(folder, monkeypatch, chat, call):
  monkeypatch.chdir(folder)
  with pytest.raises(InputError) as caught:
    call(chat)
  assert_short(str(caught.value))
