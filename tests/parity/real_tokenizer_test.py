"""Texts and ids of the real Qwen2 vocabulary."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import release_facts
from videochat_flash_jax.data.text.conversation import VISUAL_SLOT, inference_prompt, video_opening
from videochat_flash_jax.data.text.tokenizer import load_tokenizer, stream_text

BESIDE_THE_REPOSITORY = Path(__file__).parents[3] / "shared" / "tokenizer"
DIRECTORY = Path(os.environ.get("VCF_TOKENIZER_DIR", BESIDE_THE_REPOSITORY))

pytestmark = pytest.mark.skipif(
  not DIRECTORY.is_dir(), reason="no Qwen2 vocabulary here; VCF_TOKENIZER_DIR names its folder"
)


@pytest.fixture(scope="module")
def qwen2():
  return load_tokenizer(DIRECTORY)


@pytest.fixture
def cases():
  return release_facts("real_tokenizer.json")["cases"]


def test_texts_have_the_published_ids(qwen2, cases):
  for case in cases:
    assert qwen2.encode(case["text"]) == case["ids"], case["text"]


def test_ids_decode_to_the_published_text_without_chat_tokens(qwen2, cases):
  for case in cases:
    expected = re.sub(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>", "", case["decoded"])
    assert qwen2.decode(case["ids"]) == expected
    assert "".join(stream_text(qwen2, case["ids"])) == expected


def test_the_chat_tokens_have_their_published_ids(qwen2):
  added = json.loads((DIRECTORY / "added_tokens.json").read_text())
  assert qwen2.im_start_id == added["<|im_start|>"]
  assert qwen2.im_end_id == added["<|im_end|>"]
  assert qwen2.pad_id == added["<|endoftext|>"]
  assert qwen2.stop_ids == (qwen2.im_end_id, qwen2.pad_id)
  assert qwen2.newline_id == 198
  assert qwen2.vocab_size == max(added.values()) + 1


def test_a_video_prompt_has_the_ids_of_the_published_chat_text(qwen2):
  before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
  after = (
    "\nThe video lasts for 12.35 seconds, and 64 frames are uniformly sampled from it. Who runs?"
    "<|im_end|>\n<|im_start|>assistant\n"
  )
  ids = inference_prompt("Who runs?", qwen2, video_opening(64, 12.347))
  assert ids == [*qwen2.encode(before), VISUAL_SLOT, *qwen2.encode(after)]
