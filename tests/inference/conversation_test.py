"""Asking about images and about nothing; what videos add to it is in chat_test.py."""

import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.data.media.image_tiling import cut_tiles, pad_to_square, sequence_order
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.text.conversation import (
  image_opening,
  inference_prompt,
  video_opening,
)
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.reading import Prompt
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

QUESTIONS = ("What colour is the star?", "Where does it go?")
SIDE = 32  # of a tile
WIDE = np.random.default_rng(0).integers(0, 256, (SIDE, 2 * SIDE, 3), dtype=np.uint8)
HIGH = np.random.default_rng(1).integers(0, 256, (50, 20, 3), dtype=np.uint8)
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return VideoChat.from_pretrained(write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def video_path(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=16, fps=2)


def ask(seen, question, **options):
  return seen.ask(question, max_new_tokens=NEW_TOKENS, **options)


def test_an_image_is_seen_as_tiles_and_a_base_view(chat, visual_tokens):
  seen = chat.look(WIDE)
  assert repr(seen) == "SeenImages(images: 1, tiles: 3, questions answered: 0)"
  tiles = cut_tiles(WIDE, 2, 1, SIDE)
  tokens = np.asarray(chat.engine.encode(tiles[:, None]))
  expected = tokens[sequence_order(2, 1, chat.config.connector.clip_tokens)]
  np.testing.assert_array_equal(visual_tokens(seen), expected)


def test_each_of_several_images_is_seen_as_a_padded_square(chat, visual_tokens):
  seen = chat.look([WIDE, HIGH])
  assert (seen.num_images, seen.num_tiles) == (2, 2)
  tiles = np.stack([resize(pad_to_square(image), SIDE) for image in (WIDE, HIGH)])
  np.testing.assert_array_equal(visual_tokens(seen), chat.engine.encode(tiles[:, None]))


def test_a_list_of_one_image_is_a_single_image(chat):
  assert chat.look([WIDE]).num_tiles == chat.look((WIDE,)).num_tiles == 3


def test_path_picture_and_array_give_the_same_answer(chat, tmp_path):
  Image.fromarray(HIGH).save(tmp_path / "a.png")
  sources = (HIGH, Image.fromarray(HIGH), tmp_path / "a.png", str(tmp_path / "a.png"))
  assert len({ask(chat.look(source), QUESTIONS[0]) for source in sources}) == 1


@pytest.mark.parametrize(
  "shape, num_tiles", [((1, 1, 3), 2), pytest.param((10, 10_000, 3), 2, marks=pytest.mark.slow)]
)
def test_an_image_of_any_size_is_answered(chat, shape, num_tiles):
  seen = chat.look(np.full(shape, 200, np.uint8))
  assert seen.num_tiles == num_tiles
  assert ask(seen, QUESTIONS[0])
  assert chat.look([np.full(shape, 200, np.uint8)] * 2).num_tiles == 2


@pytest.mark.slow
def test_the_largest_grid_is_answered(chat):
  seen = chat.look(np.tile(WIDE, (7, 4, 1)))
  assert seen.num_tiles == 37
  assert ask(seen, QUESTIONS[0])


def test_a_conversation_about_images_goes_on_streams_and_begins_anew(chat, reads):
  seen = chat.look([WIDE, HIGH] * 8)
  num_seen = len(reads)
  first, second = (ask(seen, question) for question in QUESTIONS)
  assert seen.history == [(QUESTIONS[0], first), (QUESTIONS[1], second)]
  seen.reset()
  assert "".join(ask(seen, QUESTIONS[0], stream=True)) == first
  num_visual = 16 * chat.config.tile_tokens
  assert sum(length for _, length in reads[:num_seen]) > num_visual
  assert all(length < num_visual / 2 for _, length in reads[num_seen:])  # and is not read again


def test_without_anything_seen_the_question_alone_is_answered(chat):
  ids = inference_prompt(QUESTIONS[0], chat.tokenizer)
  prompt = Prompt(*open_slots(ids, []), np.zeros((0, chat.config.decoder.width), np.float32))
  (tokens,) = chat.engine.generate([prompt], NEW_TOKENS)
  answer = ask(chat, QUESTIONS[0])
  assert answer == chat.tokenizer.decode(tokens)
  assert "".join(ask(chat, QUESTIONS[0], stream=True)) == answer


def test_rows_of_video_image_images_and_text_answer_in_one_batch_as_alone(
  chat, video_path, visual_tokens
):
  def prompt(seen, opening, counts):
    ids = inference_prompt(QUESTIONS[0], chat.tokenizer, opening)
    return Prompt(*open_slots(ids, counts), visual_tokens(seen))

  video, image, images = chat.watch(video_path), chat.look(WIDE), chat.look([HIGH, WIDE, HIGH])
  num_tokens = chat.config.connector.clip_tokens
  nothing = Prompt(
    *open_slots(inference_prompt(QUESTIONS[0], chat.tokenizer), []), np.zeros((0, 48))
  )
  prompts = [
    prompt(video, video_opening(video.num_frames, video.seconds), [len(visual_tokens(video))]),
    nothing,
    prompt(image, image_opening(1), [3 * num_tokens]),
    prompt(images, image_opening(3), [num_tokens] * 3),
  ]
  answers = [ask(seen, QUESTIONS[0]) for seen in (video, chat, image, images)]
  assert len(set(answers)) == len(answers)
  tokens = chat.engine.generate(prompts, NEW_TOKENS)
  assert [chat.tokenizer.decode(row) for row in tokens] == answers
  assert chat.engine.generate(prompts[::-1], NEW_TOKENS) == tokens[::-1]


@pytest.mark.parametrize(
  "images, said",
  [
    ([], "there is no image"),
    ("nothing.png", "nothing.png: there is no such image"),
    ([WIDE, "nothing.png"], "nothing.png: there is no such image"),
    (WIDE / 255, "float64"),
    (np.stack([WIDE, WIDE]), "give uint8"),
    ([WIDE, None], "None is not an image"),
  ],
)
def test_what_is_no_image_is_refused(chat, images, said):
  with pytest.raises(InputError, match=said):
    chat.look(images)


def test_a_question_about_nothing_is_checked_too(chat):
  with pytest.raises(InputError, match="question is empty"):
    chat.ask(" ")
