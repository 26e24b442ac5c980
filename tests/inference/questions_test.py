"""Several questions at once, and caches in 8 and 4 bits."""

import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint

QUESTIONS = ["What colour is the star?", "Where does it go?", "Why?", "star star star star?"]
FRAMES = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
DROPOUT = DropoutConfig("uniform0_attention", (1, 2), (1.0, 0.5, 0.2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["off", "on"])
def test_questions_in_a_batch_are_answered_as_one_by_one(checkpoint, dropout):
  video = VideoChat.from_pretrained(checkpoint, dropout=dropout).watch(FRAMES)
  first = video.ask("And now?", max_new_tokens=8)
  together = video.ask(QUESTIONS, max_new_tokens=16)
  assert video.history == [("And now?", first)]  # the conversation stays as it is
  for question, answer in zip(QUESTIONS, together, strict=True):
    video.history = [("And now?", first)]
    assert video.ask(question, max_new_tokens=16) == answer
  assert len(set(together)) > 1


def test_the_cache_of_a_video_is_not_copied_for_each_question(checkpoint):
  video = VideoChat.from_pretrained(checkpoint).watch(FRAMES)
  engine = video._engine
  behind, rows = video._behind([video._ids_of(question) for question in QUESTIONS])
  reading = engine.read(rows, 8, behind=behind)
  assert reading.behind == (video._prefix.caches,)
  assert reading.behind[0][0] is video._prefix.caches[0]
  assert reading.caches[0].num_slots < video._prefix.caches[0].num_slots


def test_texts_are_answered_in_a_batch_too(checkpoint):
  chat = VideoChat.from_pretrained(checkpoint)
  together = chat.ask(QUESTIONS, max_new_tokens=12)
  assert together == [chat.ask(question, max_new_tokens=12) for question in QUESTIONS]


@pytest.mark.parametrize(
  "questions, options, said",
  [
    ([], {}, "no question in the list"),
    (["Why?", " "], {}, "the question is empty"),
    (["Why?", 3], {}, "the question is 3; give a text"),
    (["Why?"], {"stream": True}, "stream=True is for one question"),
  ],
)
def test_a_list_that_cannot_be_asked_is_refused(checkpoint, questions, options, said):
  with pytest.raises(InputError, match=said):
    VideoChat.from_pretrained(checkpoint).ask(questions, **options)


@pytest.mark.parametrize("cache, most", [("int8", 0.05), ("int4", 0.6)])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["off", "on"])
def test_a_rounded_cache_takes_less_memory_and_changes_little(checkpoint, cache, most, dropout):
  if dropout is not None:  # what attention chooses may change, and so all that follows
    dropout = DropoutConfig("uniform", (1, 2), (1.0, 0.5, 0.2))
  logits, sizes = [], []
  for kept_as in (None, cache):
    video = VideoChat.from_pretrained(checkpoint, dropout=dropout, cache=kept_as).watch(FRAMES)
    behind, rows = video._behind([video._ids_of("Why?")])
    reading = video._engine.read(rows, 8, behind=behind)
    logits.append(np.asarray(reading.logits))
    arrays = [
      array for cached in video._prefix.caches for layer in cached.stored for array in layer
    ]
    sizes.append(sum(array.nbytes for array in arrays))
  share = {"int8": (16 + 4) / 64, "int4": (8 + 4) / 64}[cache]  # heads of 16 float32 values
  assert sizes[1] == sizes[0] * share
  difference = np.abs(logits[1] - logits[0]).max()
  assert 0 < difference < most * logits[0].std()


def test_an_unknown_quantisation_is_refused(checkpoint):
  with pytest.raises(InputError, match=r"^cache is 'int2': give int8 or int4"):
    VideoChat.from_pretrained(checkpoint, cache="int2")
