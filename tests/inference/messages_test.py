"""Messages of transformers and of the OpenAI API give the answers of our own calls."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
TEXT = {"type": "text", "text": "What colour is the star?"}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return VideoChat.from_pretrained(write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture(scope="module")
def expected(chat, film):
  """The answer about eight frames of the film."""
  return chat.watch(film, 8).ask(TEXT["text"], max_new_tokens=16)


def ask(chat, *content, **options):
  return chat.ask([{"role": "user", "content": list(content)}], max_new_tokens=16, **options)


def data_url(kind, content):
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(picture):
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "png")
  return file.getvalue()


@pytest.mark.parametrize("name", ["video", "path", "url"])
def test_a_video(chat, film, expected, name):
  assert ask(chat, {"type": "video", name: str(film), "max_frames": 8}, TEXT) == expected
  assert ask(chat, TEXT, {"type": "video", name: str(film), "max_frames": 8}) == expected


def test_the_answer_may_be_streamed(chat, film, expected):
  pieces = ask(chat, {"type": "video", "video": film, "max_frames": 8}, TEXT, stream=True)
  assert "".join(pieces) == expected


def test_a_video_by_its_url_or_in_it(chat, film):
  expected = chat.watch(film).ask(TEXT["text"], max_new_tokens=16)
  for url in (film.as_uri(), data_url("video/mp4", film.read_bytes())):
    assert ask(chat, {"type": "video_url", "video_url": {"url": url}}, TEXT) == expected


def test_images_that_follow_each_other_are_shown_together(chat):
  expected = chat.look(list(PICTURES)).ask(TEXT["text"], max_new_tokens=16)
  url = data_url("image/png", png(PICTURES[0]))
  content = [
    {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    {"type": "image", "image": PICTURES[1]},
  ]
  assert ask(chat, *content, TEXT) == expected
  one = chat.look(PICTURES[0]).ask(TEXT["text"], max_new_tokens=16)
  assert ask(chat, {"type": "image_url", "image_url": url}, TEXT) == one != expected


def test_earlier_turns_are_read(chat, film, expected):
  video = chat.watch(film, 8)
  video.history = [(TEXT["text"], "red")]
  second = video.ask("And the moon?", max_new_tokens=16)
  messages = [
    {"role": "user", "content": [{"type": "video", "video": film, "max_frames": 8}, TEXT]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    {"role": "user", "content": "And the moon?"},
  ]
  assert chat.ask(messages, max_new_tokens=16) == second
  assert second != chat.watch(film, 8).ask("And the moon?", max_new_tokens=16)


def test_text_alone(chat):
  assert ask(chat, TEXT) == chat.ask(TEXT["text"], max_new_tokens=16)


WRONG = {
  "an instruction": ([{"role": "system", "content": "Be brief."}], "the role is 'system'"),
  "an answer first": ([{"role": "assistant", "content": "red"}], "the first message is the user's"),
  "two questions": ([{"role": "user", "content": "a"}] * 2, "give assistant"),
  "no question": (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "no question",
  ),
  "no content": ([{"role": "user"}], r"messages\[0\] is no message"),
  "a number": ([{"role": "user", "content": 3}], "no list of parts"),
  "no words": ([{"role": "user", "content": []}], "has no text"),
  "an unknown part": ([{"role": "user", "content": [{"type": "audio"}]}], "the type is 'audio'"),
  "a text of numbers": ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "no text"),
  "no source": ([{"role": "user", "content": [{"type": "video"}]}], "video or path or url"),
  "an unknown option": (
    [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "speed": 2}]}],
    r"messages\[0\]: content\[0\]: unknown field 'speed'",
  ),
  "no file": (
    [{"role": "user", "content": [TEXT, {"type": "video", "video": "a.mp4"}]}],
    r"messages\[0\]: content\[1\]: a.mp4: there is no",
  ),
  "no base64": (
    [{"role": "user", "content": [{"type": "image", "image": "data:image/png,%89"}, TEXT]}],
    "not in base64",
  ),
  "no picture": (
    [
      {
        "role": "user",
        "content": [{"type": "image", "image": data_url("image/png", b"0" * 999)}, TEXT],
      }
    ],
    r"messages\[0\]: content\[0\]: .*data_url",
  ),
}


@pytest.mark.parametrize("messages, error", WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_named(chat, messages, error):
  with pytest.raises(InputError, match=error) as caught:
    chat.ask(messages)
  assert len(str(caught.value)) < 400
