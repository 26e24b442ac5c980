"""Mutated rows end in the same way in a check, in training and in an evaluation."""

import collections
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.data.batches.small_mixture import config, make_tokenizer
from tests.data.media.video_files import pictures, write_video
from tests.data.mixture.annotation_rows import open_all
from tests.data.mixture.mutated_rows import HEALTHY, mutated_row
from videochat_flash_jax.data.batches.example_order import ExampleOrder
from videochat_flash_jax.data.batches.examples import ExampleReader
from videochat_flash_jax.data.batches.replacement import ReplacingReader
from videochat_flash_jax.data.check.check_report import as_json, as_table
from videochat_flash_jax.data.check.media_check import (
  SourceReport,
  check_mixture,
  check_sources,
  usable_rows,
)
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.evals.exact_match import evaluate, questions_of_row

NUM_MUTATED = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mutated")
  write_video(folder / "a.mp4", pictures(16), fps=4)
  Image.fromarray(pictures(1)[0]).save(folder / "b.png")
  train_sentencepiece(["What moves?", "user", "assistant"], folder / "tokenizer.model")
  return folder


class FakeChat:
  """Sees everything and says nothing."""

  def see_row(self, row, max_frames):
    return self

  def reset(self):
    pass

  def ask(self, question):
    return ""


def trained(rows, tokenizers):
  """Why rows cannot be trained on, by the reader of a run with each tokenizer."""
  made = config(tokens=4096, clips_per_shard=16, workers=0)
  order = ExampleOrder(rows, 0, 1)
  reasons = []
  for tokenizer in tokenizers:
    reader = ExampleReader(made.example, made.row_shape, lambda tokenizer=tokenizer: tokenizer)
    reader = ReplacingReader(rows, reader, order, 0)
    broken = collections.Counter()
    for number in range(len(rows)):
      try:
        reader.read_again(0, 0, number)
      except InputError as error:
        broken[error.__cause__.reason] += 1
    reasons.append(broken)
  return reasons


def without_words(rows):
  """Number of usable rows that cannot be evaluated, because a question has no words."""
  return sum(not has_words_to_ask(row) for _, row, _ in usable_rows(rows, [SourceReport("")]))


def has_words_to_ask(row):
  try:
    return bool(questions_of_row(row))
  except BrokenRow as error:
    return "a question is empty" not in error.detail


def outcome(path, tokenizers):
  """Why the rows of a file are broken, and how many are not; or why none can be read."""
  try:
    rows, why = open_all(path), None
  except InputError as error:
    rows, why = None, str(error)
  if rows is None:
    with pytest.raises(InputError, match=re.escape(why)):
      check_sources(read_mixture(path), None, path.parent / "cache")
    return "the file"
  (report,) = check_mixture(rows, None)
  assert as_table([report]).encode() and json.dumps(as_json([report]))
  assert trained(rows, tokenizers) == [report.broken] * len(tokenizers)
  found = evaluate(rows, FakeChat)
  expected = report.broken + collections.Counter({"bad conversations": without_words(rows)})
  assert found.sources[0].broken == expected
  assert found.scores["all"].rows == len(rows) - expected.total()
  return report.broken, len(rows) - report.broken.total()


def test_mutated_rows_end_in_the_same_way_everywhere(folder):
  sentencepiece = SentencePieceTokenizer(folder / "tokenizer.model")
  tokenizers = [make_tokenizer(), sentencepiece]
  rng, ends = np.random.default_rng(14), collections.Counter()
  for number in range(NUM_MUTATED):
    first = HEALTHY[rng.integers(len(HEALTHY)) if number % 3 == 0 else -1]  # it gives the kind
    healthy = json.dumps(first).encode()
    form = b"[%s, %s]" if number % 4 == 0 else b"%s\n%s"
    path = folder / f"{number}.jsonl"
    path.write_bytes(form % (healthy, mutated_row(rng)))
    end = outcome(path, tokenizers)
    if end == "the file":
      ends[end] += 1
    else:
      ends += end[0] + collections.Counter(used=end[1] - 1)
  print(ends)
  assert ends["used"] > 20 and ends["the file"] > 5
  assert {"bad json", "bad conversations", "placeholders", "bad media field"} <= ends.keys()
  assert {"missing file", "bad times"} <= ends.keys()
