"""A conversation that several threads share: each waits for its turn, and every answer is right."""

import threading
import time

import numpy as np
import pytest

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint

FRAMES = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
QUESTIONS = [f"What colour is thing {number}?" for number in range(6)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  return VideoChat.from_pretrained(write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def ask(video, question, **options):
  return video.ask(question, max_new_tokens=20, **options)


def in_threads(functions):
  """Calls functions at the same time, each in a thread; returns what they return."""
  results = [None] * len(functions)

  def call(index):
    results[index] = functions[index]()

  threads = [threading.Thread(target=call, args=[index]) for index in range(len(functions))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
    assert not thread.is_alive()
  return results


def test_six_threads_on_two_conversations_get_right_answers(chat):
  videos = [chat.watch(FRAMES), chat.watch(FRAMES[:8])]
  answers = in_threads(
    [lambda q=q, v=videos[number % 2]: ask(v, q) for number, q in enumerate(QUESTIONS)]
  )
  for number, (video, frames) in enumerate(zip(videos, (FRAMES, FRAMES[:8]), strict=True)):
    assert sorted(q for q, _ in video.history) == QUESTIONS[number::2]
    given = dict(zip(QUESTIONS[number::2], answers[number::2], strict=True))
    again = chat.watch(frames)
    for question, answer in video.history:
      assert ask(again, question) == answer == given[question]


def test_threads_may_ask_several_questions_stream_extend_and_reset(chat):
  video, other = chat.watch(FRAMES[:8]), chat.watch(FRAMES)
  expected = ask(other, QUESTIONS[:2])
  in_threads(
    [
      lambda: ask(video, QUESTIONS[:2]),
      lambda: list(ask(video, QUESTIONS[2], stream=True)),
      lambda: video.extend(FRAMES[8:]),
      video.reset,
    ]
  )
  video.reset()
  assert ask(video, QUESTIONS[:2]) == expected


@pytest.mark.parametrize("leave", ["read", "close", "forget"])
def test_a_thread_waits_until_the_stream_of_another_is_left(chat, leave):
  video, answered = chat.watch(FRAMES), threading.Event()
  stream = ask(video, QUESTIONS[0], stream=True)
  next(stream)
  thread = threading.Thread(target=lambda: ask(video, QUESTIONS[1]) and answered.set())
  thread.start()
  time.sleep(0.2)
  assert thread.is_alive() and not video.history
  if leave == "read":
    list(stream)
  elif leave == "close":
    stream.close()
  del stream
  thread.join(60)
  assert not thread.is_alive()
  assert [question for question, _ in video.history] == QUESTIONS[leave != "read" : 2]


def test_a_wrong_question_leaves_its_turn(chat):
  video = chat.watch(FRAMES)
  for question in ("", None, []):
    with pytest.raises(InputError):
      ask(video, question)
  assert in_threads([lambda: ask(video, QUESTIONS[0])]) == [ask(chat.watch(FRAMES), QUESTIONS[0])]
