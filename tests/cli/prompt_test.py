"""The prompt of `vcflash chat` at a terminal: history and commands; answers alone go to stdout."""

import shlex
import sys

import pexpect
import pytest

from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

TIMEOUT = 120  # seconds; of compiling on a busy machine
PROMPT = r"\x1b\[\?2004h"  # with which a prompt begins

# The new process starts another program at once; it has no use of what JAX warns about.
pytestmark = pytest.mark.filterwarnings(
  "ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def settings(folder, monkeypatch):
  monkeypatch.setenv("VCF_CACHE_DIR", str(folder / "cache"))
  monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody answers where the cursor is


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkpoint directory and two videos."""
  folder = tmp_path_factory.mktemp("prompt")
  write_dummy_checkpoint(folder / "model")
  write_dummy_video(folder / "a.mp4", num_frames=16, fps=2)
  write_dummy_video(folder / "b.mp4", num_frames=8, fps=2)
  return folder


def test_a_person_at_a_terminal(folder):
  command = [sys.executable, "-m", "videochat_flash_jax", "chat", "--model", str(folder / "model")]
  command += ["--video", str(folder / "a.mp4"), "--max-new-tokens", "12"]
  answers = folder / "answers.txt"
  line = f"{shlex.join(command)} > {shlex.quote(str(answers))}"
  terminal = pexpect.spawn("sh", ["-c", line], timeout=TIMEOUT, encoding="utf-8", echo=False)

  def type_line(text):
    """Waits for the prompt, then types."""
    terminal.expect(PROMPT)
    terminal.send(f"{text}\r")

  terminal.expect("a.mp4: 8.0 s, 8 frames, one every 1 s")
  type_line("Where is it?")
  type_line("/help")
  terminal.expect("/reset +begin a new conversation")
  type_line("/frames")
  terminal.expect("at 0.0, 1.0, 2.0")
  type_line(f"/video {folder}/b.mp4")
  terminal.expect("b.mp4: 4.0 s, 4 frames")
  type_line("/reset")
  terminal.expect("a new conversation")
  up = "\x1b[A"
  type_line(up * 5)  # the question, five lines before
  terminal.expect(PROMPT)
  terminal.sendcontrol("c")
  terminal.expect("Ctrl-D or /quit ends")
  type_line("nothing.mp4 /video")
  terminal.expect(PROMPT)
  terminal.sendcontrol("d")
  terminal.expect(pexpect.EOF)
  terminal.close()
  assert terminal.exitstatus == 0
  history = (folder / "cache" / "history" / "questions").read_text()
  assert history.count("+Where is it?") == 2
  said = answers.read_text()
  assert said.count("\n") >= 3 and "Where" not in said and "frames" not in said
