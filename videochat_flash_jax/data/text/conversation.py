r"""Turns conversations into token ids and labels: templates, the time message, label rules.

A video or an image is written `<image>` in a text, and becomes one id `VISUAL_SLOT` among the token
ids; its visual tokens are inserted there later. One training row, template `qwen_2`:

  row      human "What moves?<image>", gpt "A cat."
  placed   human "<image>\nWhat moves?", gpt "A cat."                     `place_media`
  text     <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
           <|im_start|>user\n<image>\nWhat moves?<|im_end|>\n
           <|im_start|>assistant\nA cat.<|im_end|>\n
  ids      each turn is tokenized separately, `<image>` -> -200           `encode_dialog`
  labels   the assistant's turns and all turn markers, -100 elsewhere

The rules are those of the official training code, including its odd ones, because the released
weights were trained with them. Three of its faults are not copied. A misspelt mode of the time
message is an error (there it gives the long form). No row is changed in place (there a second pass
over a row adds the message twice). A row with a wrong number of placeholders is an error (there it
fails later, or the model is trained on nonsense).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.text.tokenizer import IM_END, IM_START, Tokenizer
from videochat_flash_jax.errors import InputError, is_unicode

VISUAL_SLOT = -200
IGNORE_LABEL = -100
PLACEHOLDER = "<image>"
ANSWER_HEADER = f"{IM_START}assistant\n"

# qwen_1_5 and qwen_2 are two published names of the same template (ChatML); plain is for stage 1.
TEMPLATES = ("qwen_2", "qwen_1_5", "plain")

_SYSTEM = f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n"
_CHATML_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER_WORD = "QA_GT_caption_based_noisy"  # The authors of some public rows left it in the texts.
_NO_WORDS = re.compile("|".join(map(re.escape, (PLACEHOLDER, IM_START, IM_END))))


class WrongPlaceholders(InputError):
  """The number of placeholders in a row is not that of its videos and images."""


class Turn(NamedTuple):
  """One turn: `role` is "human" or "gpt"; if `text` is None, the answer is not yet generated."""

  role: str
  text: str | None


class TokenizedText(NamedTuple):
  """A tokenized conversation or caption.

  Attributes:
    ids: int32 `[length]`, token ids; `VISUAL_SLOT` for each video or image.
    labels: int32 `[length]`, training labels.
    is_answer: bool `[length]`, whether a token is one of an answer. Headers, turn markers and
      single line breaks are none; all others have labels.
  """

  ids: np.ndarray
  labels: np.ndarray
  is_answer: np.ndarray


def time_message(mode: str | None, seconds: float, frame_seconds: Sequence[float]) -> str:
  """States how long the video is and which frames the model sees, in the form used in training.

  Mode None gives no message, "short" gives the number of frames, and "long" also gives their times.

  Raises:
    InputError: the mode is another one.
  """
  if mode not in (None, "short", "long"):
    raise InputError(f"time message mode {mode!r:.80} is unknown; use 'short', 'long' or none")
  if mode is None:
    return ""
  times = ", ".join(str(round(float(time), 1)) for time in frame_seconds)
  where = "from it" if mode == "short" else f"at {times} seconds"
  return f"\n{_duration_sentence(seconds, len(frame_seconds), where)} "


def render_prompt(turns: Iterable[Turn], template: str = "qwen_2") -> str:
  """Writes turns as the text that the model reads; an empty or None text leaves its turn open.

  Raises:
    InputError: the template is unknown, or it is `plain`, which has no answers, and there is one.
  """
  _check_template(template)
  if template != "plain":
    return _SYSTEM + "".join(_chatml_turn(turn.role, turn.text or None) for turn in turns)
  texts = [turn.text or "" for turn in turns]
  if any(texts[1::2]):
    raise InputError("template 'plain' renders one text without an answer; use 'qwen_2'")
  return "".join(f"{text}\n" for text in texts if text)


def tokenize_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
  """Returns the ids of a text, with `VISUAL_SLOT` for each placeholder.

  "a<image>b"  ->  [a, -200, b]
  """
  first, *rest = text.split(PLACEHOLDER)
  ids = tokenizer.encode(first)
  for part in rest:
    ids += [VISUAL_SLOT, *tokenizer.encode(part)]
  return ids


def video_opening(num_frames: int, seconds: float) -> str:
  r"""Returns the text before the first question about a video.

  It is "<image>\nThe video lasts for ... are sampled from it. ". The question follows after a
  space; in training it follows after a line break. Both are as in the official code.
  """
  return f"{PLACEHOLDER}\n{_duration_sentence(seconds, num_frames, 'from it')} "


def image_opening(num_images: int) -> str:
  r"""Returns the text before the first question about images: `<image>\n` for each of them.

  Two images give "<image>\n<image>\n", as in "<image>\n<image>\nWhich is bigger?".
  """
  return f"{PLACEHOLDER}\n" * num_images


def inference_prompt(
  question: str, tokenizer: Tokenizer, opening: str = "", history: Sequence[tuple[str, str]] = ()
) -> list[int]:
  """Returns the ids of a chat up to the start of the answer to `question`.

  Args:
    question: the question, without placeholder.
    tokenizer: gives the ids.
    opening: of the video or images; it is put before the first question only.
    history: earlier (question, answer) pairs, the oldest first.

  Raises:
    InputError: a question is empty, holds the placeholder, or is not valid UTF-8.
  """
  ids = tokenizer.encode(_SYSTEM)
  for past_question, answer in history:
    ids += _question_ids(past_question, opening, tokenizer)
    ids += tokenizer.encode(_chatml_turn("gpt", answer))  # an `<image>` in an answer is plain text
    opening = ""
  ids += _question_ids(question, opening, tokenizer)
  return ids + tokenizer.encode(_chatml_turn("gpt", None))


def media_prompt(tokenizer: Tokenizer, opening: str) -> list[int]:
  """Returns the ids of a chat up to its last video or image, which all questions stand behind.

  Args:
    tokenizer: gives the ids.
    opening: as for `inference_prompt`.
  """
  ids = inference_prompt("?", tokenizer, opening)
  return ids[: len(ids) - len(after_media(ids))]


def after_media(ids: Sequence[int]) -> list[int]:
  """Returns the ids after the last `VISUAL_SLOT`; all of them if there is none."""
  slots = [index for index, token in enumerate(ids) if token == VISUAL_SLOT]
  return list(ids[slots[-1] + 1 :]) if slots else list(ids)


def place_media(turns: Iterable[Turn], message: str = "") -> list[Turn]:
  r"""Moves placeholders, and adds the time message (or ""), as training expects; returns new turns.

  In every turn, in this order: a single placeholder that is not at the start is moved there, with a
  line break after it, and the rest of the text is stripped; the message is added after each
  placeholder; the marker word of noisy public rows is removed. If there are several placeholders,
  they are not moved.

    "What moves?\n<image>"  ->  "<image>\nThe video lasts ... from it. \nWhat moves?"
  """
  return [Turn(turn.role, _place_in_text(turn.text, message)) for turn in turns]


def encode_dialog(
  turns: Sequence[Turn],
  tokenizer: Tokenizer,
  has_media: bool = True,
  label_style: str = "qwen",
) -> TokenizedText:
  """Returns ids and labels of a ChatML conversation; a first turn of the assistant is dropped.

  Label style "qwen" is that of the official code. The loss then counts the whole turns of the
  assistant with their headers, and every single line break, `<|im_start|>` and `<|im_end|>` of all
  turns, the system's turn included. Style "clean" counts what the model has to generate: the
  answers, and the `<|im_end|>` after each answer. Without `has_media`, placeholders are plain text.

  Raises:
    InputError: the label style is another one.
  """
  if label_style not in ("qwen", "clean"):
    raise InputError(f"label style {label_style!r:.80} is unknown; use 'qwen' or 'clean'")
  ids = tokenizer.encode(_SYSTEM)
  in_loss, in_answer = [False] * len(ids), [False] * len(ids)
  header_length = len(tokenizer.encode(ANSWER_HEADER))
  for turn in _without_opening_answer(turns):
    text = _chatml_turn(turn.role, turn.text)
    turn_ids = tokenize_prompt(text, tokenizer) if has_media else tokenizer.encode(text)
    turn_in_loss = [turn.role == "gpt"] * len(turn_ids)
    in_answer += [turn.role == "gpt" and index >= header_length for index in range(len(turn_ids))]
    if label_style == "clean":
      turn_in_loss[:header_length] = [False] * header_length
      turn_in_loss[-1] = False  # The line break between turns.
    ids += turn_ids
    in_loss += turn_in_loss
  markers = tokenizer.newline_id, tokenizer.im_start_id, tokenizer.im_end_id
  is_marker = np.isin(ids, markers)
  if label_style == "qwen":
    in_loss |= is_marker
  return _with_labels(ids, in_loss, in_answer & ~is_marker)


def encode_caption(turns: Sequence[Turn], tokenizer: Tokenizer) -> TokenizedText:
  r"""Returns ids and labels of stage 1: a visual slot, then the answer and a line break.

  The loss counts the answer and the line break. The question is dropped: (human "<image>\nSay it.",
  gpt "A cat.") becomes "<image>A cat.\n".
  """
  ids = tokenize_prompt(f"{PLACEHOLDER}{turns[1].text}\n", tokenizer)
  markers = tokenizer.newline_id, tokenizer.im_start_id, tokenizer.im_end_id
  return _with_labels(ids, np.ones(len(ids), bool), ~np.isin(ids, markers))


def turns_of_row(row: Mapping) -> list[Turn]:
  """Checks the `conversations` of a LLaVA row and returns its turns; the row is not changed.

  Raises:
    InputError: `conversations` is missing or empty, a turn is not of the form {"from": "human" or
      "gpt", "value": text}, or a text is not valid UTF-8.
  """
  conversations = row.get("conversations")
  if not isinstance(conversations, list) or not conversations:
    raise _row_error(row, "field 'conversations' is missing or empty; give a list of turns")
  turns = []
  for index, entry in enumerate(conversations):
    turn = entry if isinstance(entry, Mapping) else {}
    if turn.get("from") not in list(_CHATML_ROLES):
      found = f"conversations[{index}]: field 'from' is {turn.get('from')!r:.80}"
      raise _row_error(row, f"{found}; use 'human' or 'gpt'")
    if not isinstance(turn.get("value"), str):
      raise _row_error(row, f"conversations[{index}]: field 'value' is not a text; give a string")
    if not is_unicode(turn["value"]):  # JSON may hold half of a surrogate pair
      raise _row_error(
        row,
        f"conversations[{index}]: field 'value' is not valid UTF-8, as half of an emoji is; "
        "write the text again",
      )
    turns.append(Turn(turn["from"], turn["value"]))
  return turns


def placed_turns(row: Mapping, message: str = "") -> list[Turn]:
  """Checks the `conversations` of a LLaVA row, and places its media as `place_media` does.

  Args:
    row: with `conversations`, and either `video` or `image` (a path or a list of paths) or neither.
    message: what `time_message` gives for the sampled frames.

  Raises:
    WrongPlaceholders: the number of placeholders is not that of videos and images.
    InputError: as in `turns_of_row`, or no question has an answer with more than white space.
  """
  turns = turns_of_row(row)
  num_media = _num_media(row)
  if num_media:
    turns = place_media(turns, message)
  kept = _without_opening_answer(turns)
  if not _has_answer(kept):
    raise _row_error(
      row, "field 'conversations' has no question with an answer; add a question and an answer"
    )
  num_placeholders = sum(turn.text.count(PLACEHOLDER) for turn in kept)
  if num_placeholders != num_media:
    found = f"{num_placeholders} {PLACEHOLDER} for {num_media} videos or images"
    problem = f"field 'conversations' has {found}; write one {PLACEHOLDER} for each"
    raise _row_error(row, problem, WrongPlaceholders)
  return turns


def _num_media(row):
  media = [row.get("video") or (), row.get("image") or ()]
  return sum(1 if isinstance(paths, str) else len(paths) for paths in media)


def has_words(text: str) -> bool:
  """Returns whether a text has more than white space, placeholders and turn markers."""
  return bool(_NO_WORDS.sub("", text).strip())


def _has_answer(turns):
  """Whether an answer with a word follows a question."""
  is_asked = False
  for turn in turns:
    is_asked |= turn.role == "human"
    if is_asked and turn.role == "gpt" and has_words(turn.text):
      return True
  return False


def encode_row(
  row: Mapping,
  tokenizer: Tokenizer,
  template: str = "qwen_2",
  message: str = "",
  label_style: str = "qwen",
) -> TokenizedText:
  """Checks one LLaVA row and returns its ids and labels; see the module's example.

  Args:
    row: as in `placed_turns`.
    tokenizer: gives the ids.
    template: one of `TEMPLATES`.
    message: as in `placed_turns`.
    label_style: as in `encode_dialog`; with template `plain`, the loss counts the whole caption.

  Raises:
    InputError: the row cannot be used; names the row and the field.
  """
  _check_template(template)
  turns, num_media = placed_turns(row, message), _num_media(row)
  if template != "plain":
    return encode_dialog(turns, tokenizer, num_media > 0, label_style)
  is_caption = len(turns) == 2 and turns[0].role == "human"
  if num_media != 1 or not is_caption or PLACEHOLDER in turns[1].text:
    raise _row_error(row, "template 'plain' needs one <image>, then one answer; or use 'qwen_2'")
  return encode_caption(turns, tokenizer)


def _check_template(template: str):
  if template not in TEMPLATES:
    raise InputError(f"template {template!r:.80} is unknown; use one of {', '.join(TEMPLATES)}")


def _duration_sentence(seconds: float, num_frames: int, where: str) -> str:
  lasts = f"The video lasts for {seconds:.2f} seconds"
  return f"{lasts}, and {num_frames} frames are uniformly sampled {where}."


def _chatml_turn(role: str, text: str | None) -> str:
  header = f"{IM_START}{_CHATML_ROLES[role]}\n"
  return header if text is None else f"{header}{text}{IM_END}\n"


def _question_ids(question: str, opening: str, tokenizer: Tokenizer) -> list[int]:
  if not question.strip():
    raise InputError("the question is empty; give a question")
  if not is_unicode(question):
    raise InputError("the question is not valid UTF-8 text; write it again")
  if PLACEHOLDER in question:
    raise InputError(
      f"the question holds {PLACEHOLDER}, which stands for the video or image; remove it"
    )
  return tokenize_prompt(_chatml_turn("human", opening + question), tokenizer)


def _place_in_text(text: str, message: str) -> str:
  if text.count(PLACEHOLDER) == 1 and not text.startswith(PLACEHOLDER):
    text = f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()
  if message.strip():
    text = text.replace(PLACEHOLDER, f"{PLACEHOLDER}{message.rstrip()} ")
  return text.replace(_MARKER_WORD, "")


def _without_opening_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
  return turns[1:] if turns[0].role == "gpt" else turns


def _with_labels(ids: list[int], in_loss: np.ndarray, in_answer: np.ndarray) -> TokenizedText:
  array = np.array(ids, np.int32)
  is_text = array != VISUAL_SLOT
  labels = np.where(in_loss & is_text, array, np.int32(IGNORE_LABEL))
  return TokenizedText(array, labels, in_answer & is_text)


def _row_error(row: Mapping, problem: str, kind: type[InputError] = InputError) -> InputError:
  name = row.get("id", row.get("video", row.get("image", "without id")))
  return kind(f"row {name!r:.100}: {problem}")
