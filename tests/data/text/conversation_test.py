"""Conversations: what the golden files do not show, the checks of rows, and prompts of a chat."""

import copy

import numpy as np
import pytest

from videochat_flash_jax.data.text import conversation
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL, VISUAL_SLOT, Turn
from videochat_flash_jax.data.text.tokenizer import train_sentencepiece
from videochat_flash_jax.errors import InputError

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LASTS = "The video lasts for 2.00 seconds, and 4 frames are uniformly sampled"
OPENING = conversation.video_opening(4, 2.0)
NOISE = "QA_GT_caption_based_noisy"
ROW = {
  "id": "row-7",
  "video": "a.mp4",
  "conversations": [
    {"from": "human", "value": "What colour is the star?\n<image>"},
    {"from": "gpt", "value": "Red.\n"},
    {"from": "human", "value": "And the circle?"},
    {"from": "gpt", "value": "Blue."},
  ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  corpus = ["What colour is the red star?", "And the blue circle?", "user", "assistant"]
  return train_sentencepiece(corpus, tmp_path_factory.mktemp("tiny") / "tokenizer.model")


def row_with(**fields):
  return {**copy.deepcopy(ROW), **fields}


def said(*values):
  """Turns of a row, from human and gpt in turn."""
  roles = ("human", "gpt")
  return [{"from": roles[i % 2], "value": value} for i, value in enumerate(values)]


def text_of(ids, tokenizer):
  """The text that ids were made from, the slot and the chat tokens written out."""
  names = {tokenizer.im_start_id: "<|im_start|>", tokenizer.im_end_id: "<|im_end|>"}
  names[VISUAL_SLOT] = "<image>"
  return "".join(names.get(int(token)) or tokenizer.decode([token]) for token in ids)


def learnt_text(tokens, tokenizer):
  """The supervised ids as text, a line for every run of them."""
  runs = np.split(
    np.arange(len(tokens.ids)), np.flatnonzero(np.diff(tokens.labels == IGNORE_LABEL)) + 1
  )
  learnt = [run for run in runs if tokens.labels[run[0]] != IGNORE_LABEL]
  return [text_of(tokens.labels[run], tokenizer) for run in learnt]


def test_a_row_becomes_the_chat_text_with_the_video_in_front(tokenizer):
  message = conversation.time_message("short", 2.0, [0.0, 0.5, 1.0, 1.5])
  tokens = conversation.encode_row(ROW, tokenizer, message=message)
  assert text_of(tokens.ids, tokenizer) == (
    f"{SYSTEM}<|im_start|>user\n<image>\n{LASTS} from it. \nWhat colour is the star?<|im_end|>\n"
    "<|im_start|>assistant\nRed.\n<|im_end|>\n"
    "<|im_start|>user\nAnd the circle?<|im_end|>\n"
    "<|im_start|>assistant\nBlue.<|im_end|>\n"
  )


def test_clean_labels_are_the_answers_and_their_ends(tokenizer):
  tokens = conversation.encode_row(ROW, tokenizer, label_style="clean")
  assert learnt_text(tokens, tokenizer) == ["Red.\n<|im_end|>", "Blue.<|im_end|>"]


def test_qwen_labels_are_whole_assistant_turns_and_the_marks_of_all_turns(tokenizer):
  tokens = conversation.encode_row(ROW, tokenizer)
  assert learnt_text(tokens, tokenizer) == [
    "<|im_start|>",
    "\n",
    "<|im_end|>\n<|im_start|>",
    "\n",
    "\n",
    "<|im_end|>\n<|im_start|>assistant\nRed.\n<|im_end|>\n<|im_start|>",
    "\n",
    "<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n",
  ]


def test_plain_learns_the_caption_after_one_slot(tokenizer):
  row = row_with(conversations=said("<image>\nSay it.", "A star."))
  tokens = conversation.encode_row(row, tokenizer, template="plain", message="\nunused. ")
  assert text_of(tokens.ids, tokenizer) == "<image>A star.\n"
  assert learnt_text(tokens, tokenizer) == ["A star.\n"]


def test_ids_and_labels_are_int32(tokenizer):
  tokens = conversation.encode_row(ROW, tokenizer)
  assert tokens.ids.dtype == tokens.labels.dtype == np.int32
  assert tokens.ids.shape == tokens.labels.shape


@pytest.mark.parametrize("style", ["qwen", "clean"])
def test_the_words_of_answers_are_marked(tokenizer, style):
  tokens = conversation.encode_row(ROW, tokenizer, label_style=style)
  assert text_of(tokens.ids[tokens.is_answer], tokenizer) == "Red.Blue."
  assert (tokens.labels[tokens.is_answer] != IGNORE_LABEL).all()
  row = row_with(conversations=said("<image>\nSay it.", "A star."))
  tokens = conversation.encode_row(row, tokenizer, template="plain")
  assert text_of(tokens.ids[tokens.is_answer], tokenizer) == "A star."


@pytest.mark.parametrize("template", ["qwen_2", "plain"])
def test_a_row_is_not_edited_and_gives_the_same_twice(tokenizer, template):
  row = row_with(conversations=said("Say <image> QA_GT_caption_based_noisy", "A star."))
  before = copy.deepcopy(row)
  first, second = (
    conversation.encode_row(row, tokenizer, template, message="\nIt lasts. ") for _ in range(2)
  )
  assert row == before
  np.testing.assert_array_equal(first.ids, second.ids)


def test_a_text_row_is_not_placed(tokenizer):
  row = {"id": 1, "conversations": said(" QA_GT_caption_based_noisy ", "Yes.")}
  tokens = conversation.encode_row(row, tokenizer, message="\nIt lasts. ")
  assert "user\n QA_GT_caption_based_noisy <" in text_of(tokens.ids, tokenizer)
  assert "lasts" not in text_of(tokens.ids, tokenizer)


def test_several_pictures_keep_their_places(tokenizer):
  row = {"image": ["a.png", "b.png"], "conversations": said("A <image> or\n<image>?", "A.")}
  tokens = conversation.encode_row(row, tokenizer)
  assert "user\nA <image> or\n<image>?<" in text_of(tokens.ids, tokenizer)
  assert np.count_nonzero(tokens.ids == VISUAL_SLOT) == 2


def test_only_one_opening_answer_is_dropped(tokenizer):
  turns = [Turn("gpt", "one"), Turn("gpt", "two"), Turn("human", "Who?"), Turn("gpt", "I.")]
  row = {"conversations": [{"from": turn.role, "value": turn.text} for turn in turns]}
  text = text_of(conversation.encode_row(row, tokenizer).ids, tokenizer)
  assert text.startswith(f"{SYSTEM}<|im_start|>assistant\ntwo<")


def test_an_answer_that_starts_with_line_breaks_keeps_them_in_clean_labels(tokenizer):
  row = {"conversations": said("Who?", "\n\nI.")}
  tokens = conversation.encode_row(row, tokenizer, label_style="clean")
  assert learnt_text(tokens, tokenizer) == ["\n\nI.<|im_end|>"]


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"conversations": None}, "field 'conversations' is missing or empty"),
    ({"conversations": []}, "field 'conversations' is missing or empty"),
    ({"conversations": "Hi"}, "field 'conversations' is missing or empty"),
    ({"conversations": ["Hi"]}, r"conversations\[0\]: field 'from' is None"),
    ({"conversations": [{"from": ["a"], "value": "Hi"}]}, r"field 'from' is \['a'\]"),
    (
      {"conversations": [*said("Hi"), {"from": "bot", "value": ""}]},
      r"\[1\]: field 'from' is 'bot'",
    ),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: field 'value' is not a text"),
    ({"conversations": said("<image>", 3)}, r"conversations\[1\]: field 'value' is not a text"),
    ({"conversations": said("<image> \ud83d", "I.")}, r"\[0\]: field 'value' is not valid UTF-8"),
    ({"conversations": said("<image>", "I\udce9")}, r"\[1\]: field 'value' is not valid UTF-8"),
    ({"conversations": said("<image>")}, "has no question with an answer"),
    ({"conversations": said("Who?", "<image> <|im_end|>\n")}, "has no question with an answer"),
    ({"conversations": said("<image>", NOISE)}, "has no question with an answer"),
    ({"conversations": [*said("", "I.")[1:] * 2, *said("<image>")]}, "has no question with an ans"),
    ({"conversations": [{"from": "gpt", "value": "I."}]}, "has no question with an answer"),
    ({"conversations": said("Who?", "I.")}, "has 0 <image> for 1 videos or images"),
    ({"conversations": said("<image><image>", "I.")}, "has 2 <image> for 1 videos or images"),
    ({"video": None}, "has 1 <image> for 0 videos or images"),
    ({"video": None, "image": ["a", "b"]}, "has 1 <image> for 2 videos or images"),
  ],
)
def test_a_bad_row_is_an_error_of_one_line_that_names_row_and_field(tokenizer, fields, message):
  with pytest.raises(InputError, match=message) as caught:
    conversation.encode_row(row_with(**fields), tokenizer)
  assert str(caught.value).startswith("row 'row-7': ")
  assert "\n" not in str(caught.value)


def test_a_row_without_id_is_named_by_its_video(tokenizer):
  with pytest.raises(InputError, match=r"row 'a\.mp4': field 'conversations'"):
    conversation.encode_row({"video": "a.mp4"}, tokenizer)


@pytest.mark.parametrize("row", [ROW, {"conversations": said("Who?", "I.")}])
def test_plain_refuses_rows_that_are_no_caption(tokenizer, row):
  with pytest.raises(InputError, match="template 'plain' needs one <image>, then one answer"):
    conversation.encode_row(row, tokenizer, template="plain")


def test_unknown_words_are_errors_that_list_the_known(tokenizer):
  with pytest.raises(InputError, match=r"template 'qwen2' is unknown; use one of qwen_2"):
    conversation.encode_row(ROW, tokenizer, template="qwen2")
  with pytest.raises(InputError, match=r"template 'qwen2' is unknown; use one of qwen_2"):
    conversation.render_prompt([Turn("human", "Who?")], template="qwen2")
  with pytest.raises(InputError, match="label style 'all' is unknown"):
    conversation.encode_row(ROW, tokenizer, label_style="all")
  with pytest.raises(InputError, match="time message mode 'shrot' is unknown"):
    conversation.time_message("shrot", 2.0, [0.0])


def test_plain_refuses_a_placeholder_in_the_answer(tokenizer):
  turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "<image>\nA cat."}]
  with pytest.raises(InputError, match="needs one <image>, then one answer"):
    conversation.encode_row({"video": "a", "conversations": turns}, tokenizer, template="plain")


def test_the_long_time_message_names_every_frame():
  frame_seconds = np.array([0, 0.25, 1.0, 1.96], np.float32)
  message = conversation.time_message("long", 2.0, frame_seconds)
  assert message == f"\n{LASTS} at 0.0, 0.2, 1.0, 2.0 seconds. "


def test_a_video_prompt_tells_the_time_in_its_first_turn_only(tokenizer):
  history = [("What colour is the star?", "Red."), ("Sure?", "")]
  ids = conversation.inference_prompt("And the circle?", tokenizer, OPENING, history)
  assert text_of(ids, tokenizer) == (
    f"{SYSTEM}<|im_start|>user\n<image>\n{LASTS} from it. What colour is the star?<|im_end|>\n"
    "<|im_start|>assistant\nRed.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    "<|im_start|>user\nAnd the circle?<|im_end|>\n<|im_start|>assistant\n"
  )


def test_a_later_prompt_starts_with_the_earlier_one(tokenizer):
  first = conversation.inference_prompt("Who?", tokenizer, OPENING)
  second = conversation.inference_prompt("Why?", tokenizer, OPENING, [("Who?", "I.")])
  assert second[: len(first)] == first


def test_an_image_prompt_has_a_placeholder_on_a_line_of_its_own_for_each(tokenizer):
  opening = conversation.image_opening(2)
  ids = conversation.inference_prompt("Which is bigger?", tokenizer, opening)
  assert text_of(ids, tokenizer) == (
    f"{SYSTEM}<|im_start|>user\n<image>\n<image>\nWhich is bigger?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )


def test_a_text_prompt_is_the_rendered_one(tokenizer):
  turns = [Turn("human", "Who?"), Turn("gpt", "I."), Turn("human", "Why?"), Turn("gpt", None)]
  ids = conversation.inference_prompt("Why?", tokenizer, history=[("Who?", "I.")])
  assert ids == tokenizer.encode(conversation.render_prompt(turns))


def test_a_placeholder_that_the_model_wrote_is_text(tokenizer):
  ids = conversation.inference_prompt("Why?", tokenizer, OPENING, [("Who?", "The <image>.")])
  assert ids.count(VISUAL_SLOT) == 1
  assert "The <image>." in text_of(ids, tokenizer)


@pytest.mark.parametrize(
  "question, message",
  [("", "question is empty"), (" \n", "question is empty"), ("Is <image> red?", "holds <image>")],
)
def test_an_unusable_question_is_an_error(tokenizer, question, message):
  with pytest.raises(InputError, match=message):
    conversation.inference_prompt(question, tokenizer, OPENING)
