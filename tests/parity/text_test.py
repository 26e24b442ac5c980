"""Golden family 08: token ids, prompts, labels, time messages and batches agree exactly."""

import re
import unicodedata

import numpy as np
import pytest

from videochat_flash_jax.data.text import conversation
from videochat_flash_jax.data.text.conversation import PLACEHOLDER, VISUAL_SLOT, Turn
from videochat_flash_jax.data.text.tokenizer import load_tokenizer, stream_text
from videochat_flash_jax.errors import InputError


@pytest.fixture
def text(golden):
  return golden("08_text")


@pytest.fixture
def tokenizer(text):
  return load_tokenizer(text.path)


def turns_of(entries):
  return [Turn(entry["from"], entry["value"]) for entry in entries]


def placed(row):
  """The turns as the official code hands them to its tokenization: text-only rows as they are."""
  turns = turns_of(row["conversations"])
  return turns if row["kind"] == "text" else conversation.place_media(turns, row["time_msg"])


def encoded(row, tokenizer):
  return conversation.encode_dialog(placed(row), tokenizer, has_media=row["kind"] != "text")


def assert_message(mode, video, expected):
  frame_seconds = [index / video["fps"] for index in video["frame_indices"]]
  if mode in (None, "short", "long"):
    assert conversation.time_message(mode, video["duration"], frame_seconds) == expected
  else:  # The official code takes every other word for "long".
    with pytest.raises(InputError, match="is unknown"):
      conversation.time_message(mode, video["duration"], frame_seconds)


def test_the_vocabulary_has_the_ids_of_the_manifest(text, tokenizer):
  expected = text.json()["tokenizer"]
  assert tokenizer.vocab_size == expected["size"]
  assert tokenizer.newline_id == expected["newline_id"]
  assert tokenizer.im_start_id == expected["im_start"]
  assert tokenizer.im_end_id == expected["im_end"] == tokenizer.token_id(expected["eos"])
  assert tokenizer.pad_id == expected["pad_id"] == tokenizer.token_id(expected["pad"])
  assert expected["image_placeholder"] == PLACEHOLDER
  assert expected["image_token_index"] == VISUAL_SLOT
  assert expected["ignore_index"] == conversation.IGNORE_LABEL


def test_texts_have_the_official_ids(text, tokenizer):
  for example in text.json()["encode_examples"]:
    assert tokenizer.encode(example["text"]) == example["ids"], example["text"]


def test_decoded_ids_are_the_composed_text_without_chat_tokens(text, tokenizer):
  for example in text.json()["encode_examples"]:
    parts = re.split(r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>", example["text"])
    expected = "".join(unicodedata.normalize("NFC", part) for part in parts)
    assert tokenizer.decode(example["ids"]) == expected
    assert "".join(stream_text(tokenizer, example["ids"])) == expected


def test_time_messages_are_the_official_sentences(text):
  for row in text.json("time_messages.json"):
    assert_message(row["mode"], row, row["msg"])


def test_time_messages_of_dialogs_are_the_official_sentences(text):
  for row in text.json("dialogs.json"):
    if row["video"]:
      assert_message(row["time_msg_mode"], row["video"], row["time_msg"])


def test_placing_media_gives_the_official_turns(text):
  for row in text.json("dialogs.json"):
    assert placed(row) == turns_of(row["after_multimodal"]), row["name"]


def test_placing_media_in_placed_turns_gives_the_official_second_pass(text):
  rows = [row for row in text.json("dialogs.json") if "after_second_pass" in row]
  assert rows
  for row in rows:
    twice = conversation.place_media(placed(row), row["time_msg"])
    assert twice == turns_of(row["after_second_pass"]), row["name"]


def test_dialogs_have_the_official_ids_and_labels(text, tokenizer):
  for row in text.json("dialogs.json"):
    actual = encoded(row, tokenizer)
    assert actual.ids.tolist() == row["qwen2"]["input_ids"], row["name"]
    assert actual.labels.tolist() == row["qwen2"]["labels"], row["name"]


def test_captions_have_the_official_ids_and_labels(text, tokenizer):
  rows = [row for row in text.json("dialogs.json") if "plain" in row]
  assert rows
  for row in rows:
    actual = conversation.encode_caption(placed(row), tokenizer)
    assert actual.ids.tolist() == row["plain"]["input_ids"], row["name"]
    assert actual.labels.tolist() == row["plain"]["labels"], row["name"]


def test_prompts_are_rendered_and_tokenized_as_officially(text, tokenizer):
  for row in text.json("prompts.json"):
    if "error" in row:
      continue
    turns = [Turn(*turn) for turn in row["turns"]]
    if row["last_answer_left_open"] and turns[-1].role == "gpt":
      turns[-1] = Turn("gpt", None)
    prompt = conversation.render_prompt(turns, row["template"])
    assert prompt == row["prompt"], row["name"]
    assert conversation.tokenize_prompt(prompt, tokenizer) == row["input_ids"], row["name"]


def test_prompts_that_the_official_code_cannot_render_are_refused(text):
  dialogs = {row["name"]: row for row in text.json("dialogs.json")}
  refused = [row for row in text.json("prompts.json") if "error" in row]
  assert refused
  for row in refused:
    turns = turns_of(dialogs[row["name"]]["conversations"])
    with pytest.raises(InputError):
      conversation.render_prompt([*turns[:-1], Turn("gpt", None)], row["template"])


def test_rows_of_a_batch_are_cut_as_officially(text, tokenizer):
  dialogs = {row["name"]: row for row in text.json("dialogs.json")}
  for batch in text.json("collate.json"):
    stored = zip(batch["members"], batch["input_ids"], batch["labels"], strict=True)
    for name, ids, labels in stored:
      row, length = encoded(dialogs[name], tokenizer), batch["model_max_length"]
      kept = min(len(row.ids), length)
      np.testing.assert_array_equal(row.ids[:length], ids[:kept])
      np.testing.assert_array_equal(row.labels[:length], labels[:kept])
      assert set(ids[kept:]) <= {tokenizer.pad_id}
      assert set(labels[kept:]) <= {conversation.IGNORE_LABEL}  # as `write_row` fills what is left


def test_both_label_styles_of_the_training_samples_follow_from_their_text(golden, tokenizer):
  tensors = golden("06_flash_full").tensors("c_train")
  cases = [key.split(".labels.") for key in tensors if ".labels." in key]
  assert {style for _, style in cases} == {"qwen", "clean"}
  for sample, style in cases:
    ids = tensors[f"{sample}.input_ids"][0]
    turns = turns_written_in(ids, tokenizer)
    actual = conversation.encode_dialog(turns, tokenizer, label_style=style)
    np.testing.assert_array_equal(actual.ids, ids)
    np.testing.assert_array_equal(actual.labels, tensors[f"{sample}.labels.{style}"][0])


def turns_written_in(ids, tokenizer):
  """Reads the turns back from the ids of a ChatML text, without the system's."""
  turns = []
  for block in np.split(ids, np.flatnonzero(ids == tokenizer.im_start_id))[2:]:
    parts = np.split(block, np.flatnonzero(block == VISUAL_SLOT))
    written = PLACEHOLDER.join(tokenizer.decode(part) for part in parts)  # decode skips slots
    role, content = written.split("\n", 1)
    turns.append(Turn({"user": "human", "assistant": "gpt"}[role], content.removesuffix("\n")))
  return turns
