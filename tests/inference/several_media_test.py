"""Several videos and images in one conversation, shown at once or between questions."""

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.data.text.conversation import inference_prompt
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.reading import Prompt
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

FRAMES = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
PICTURES = [FRAMES[0], FRAMES[1]]
QUESTIONS = ("What colour is the star?", "Where does it go?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module", params=[None, "uniform0_attention"])
def chat(checkpoint, request):
  dropout = request.param and DropoutConfig(request.param, (1, 2), (1.0, 0.5, 0.2))
  return VideoChat.from_pretrained(checkpoint, dropout=dropout)


def ask(seen, question=QUESTIONS[0]):
  return seen.ask(question, max_new_tokens=16)


def direct(chat, seen, tokens):
  """The answer to a prompt with all visual tokens, as one row."""
  ids = inference_prompt(QUESTIONS[0], chat.tokenizer, seen._opening())
  slots = open_slots(ids, [len(part) for part in tokens])
  (answer,) = chat.engine.generate([Prompt(*slots, np.concatenate(tokens))], 16)
  return chat.tokenizer.decode(answer)


def test_two_videos_and_pictures_are_read_like_one_prompt(chat):
  seen = chat.watch(FRAMES[:8])
  seen.watch(FRAMES[8:24])
  seen.look(PICTURES)
  clips = [FRAMES[:8].reshape(2, 4, 32, 32, 3), FRAMES[8:].reshape(4, 4, 32, 32, 3)]
  tokens = [chat.engine.encode(part) for part in clips]
  tokens += [chat.engine.encode([picture[None]]) for picture in PICTURES]
  assert ask(seen) == direct(chat, seen, tokens)


def test_what_is_shown_between_questions_stands_before_them(chat):
  seen = chat.look(PICTURES)
  first = ask(seen)
  seen.watch(FRAMES[:8])
  second = ask(seen, QUESTIONS[1])
  other = chat.look(PICTURES)
  other.watch(FRAMES[:8])
  other.history.append((QUESTIONS[0], first))
  assert ask(other, QUESTIONS[1]) == second
  seen.reset()
  other.reset()
  assert ask(seen) == ask(other)


def test_the_video_that_was_seen_last_grows(chat):
  grown, whole = chat.watch(FRAMES[:8]), chat.watch(FRAMES[:8])
  grown.watch(FRAMES[8:16])
  grown.extend(FRAMES[16:])
  whole.watch(FRAMES[8:])
  assert (grown.num_frames, grown.seconds) == (16, 16.0) and len(grown.seen) == 2
  assert ask(grown) == ask(whole)
  grown.look(PICTURES)
  with pytest.raises(InputError, match="seen last"):
    grown.extend(FRAMES[:4])


def test_a_video_that_fails_leaves_the_conversation_as_it_was(chat):
  def camera():
    yield from FRAMES[:10]
    raise OSError("gone")

  seen = chat.watch(FRAMES[:8])
  ask(seen)
  for wrong in (camera(), "none.mp4", np.zeros((0, 8, 8, 3), np.uint8)):
    with pytest.raises(InputError):
      seen.watch(wrong)
  with pytest.raises(InputError):
    seen.look("none.png")
  assert len(seen.seen) == 1
  other = chat.watch(FRAMES[:8])
  ask(other)
  assert ask(seen, QUESTIONS[1]) == ask(other, QUESTIONS[1])


def test_a_window_is_for_one_video(checkpoint):
  chat = VideoChat.from_pretrained(checkpoint)
  for first, second in ((None, 32), (32, None)):
    seen = chat.watch(FRAMES[:8], window=first)
    with pytest.raises(InputError, match="a window is for a conversation about one video"):
      seen.watch(FRAMES[8:], window=second)
    assert ask(seen) == ask(chat.watch(FRAMES[:8]))


def test_the_frames_of_files_can_be_seen_again(checkpoint, tmp_path):
  chat = VideoChat.from_pretrained(checkpoint)
  path = write_dummy_video(tmp_path / "a.mp4", num_frames=48, fps=2)
  folder = tmp_path / "pictures"
  folder.mkdir()
  for index, frame in enumerate(FRAMES[:8]):
    Image.fromarray(frame).save(folder / f"{index}.png")
  video = chat.watch(path, max_frames=8)
  seconds, pictures = zip(*video.frames(), strict=True)
  assert list(seconds) == video.frame_times and len(set(seconds)) == 8
  assert {picture.shape for picture in pictures} == {(224, 224, 3)}
  small = video.frames(image_size=32)
  for few, same in zip(video.frames(2, image_size=32), (small[1], small[5]), strict=True):
    assert few.seconds == same.seconds
    np.testing.assert_array_equal(few.picture, same.picture)
  assert "8 frames, one every 3" in str(video.seen[0])
  video.extend(folder)
  assert len(video.frames()) == 16
  added = [frame.picture for frame in video.frames(image_size=32)[8:]]
  np.testing.assert_array_equal(added, FRAMES[:8])
  video.extend(FRAMES[:4])
  with pytest.raises(InputError, match="are not kept"):
    video.frames()
  with pytest.raises(InputError, match="num_frames"):
    video.frames(0)
