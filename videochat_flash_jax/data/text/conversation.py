r"""Conversations to token ids and labels: templates, the time message, label rules.

A visual item is written `<image>` in a text, whatever its kind, and stands as `VISUAL_SLOT` among
the ids; its tokens are put there later. One training row, template `qwen_2`:

  row      human "What moves?<image>", gpt "A cat."
  placed   human "<image>\nWhat moves?", gpt "A cat."                     `place_media`
  text     <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
           <|im_start|>user\n<image>\nWhat moves?<|im_end|>\n
           <|im_start|>assistant\nA cat.<|im_end|>\n
  ids      every turn tokenized by itself, `<image>` -> -200              `encode_dialog`
  labels   the assistant's turns and all turn marks, -100 elsewhere

The rules are those of the official training code, odd ones included: the released weights were
trained so. Three faults are not copied: a misspelt mode of the time message is an error (there it
gives the long form), no row is edited in place (there a second pass doubles the message), and a
row with a wrong number of placeholders is refused (there it fails later or trains on nonsense).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from videochat_flash_jax.data.text.tokenizer import IM_END, IM_START, Tokenizer
from videochat_flash_jax.errors import InputError

VISUAL_SLOT = -200
IGNORE_LABEL = -100
PLACEHOLDER = "<image>"
ANSWER_HEADER = f"{IM_START}assistant\n"

# qwen_1_5 and qwen_2 are two published names of one template (ChatML); plain is for stage 1.
TEMPLATES = ("qwen_2", "qwen_1_5", "plain")

_SYSTEM = f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n"
_CHATML_ROLES = {"human": "user", "gpt": "assistant"}
_MARKER_WORD = "QA_GT_caption_based_noisy"  # Left in some public rows by their makers.


class Turn(NamedTuple):
  """One turn: `role` is "human" or "gpt"; a `text` of None is an answer still to be written."""

  role: str
  text: str | None


class TokenizedText(NamedTuple):
  """Token ids `[length]` with their training labels `[length]`, both int32."""

  ids: np.ndarray
  labels: np.ndarray


def time_message(mode: str | None, seconds: float, frame_seconds: Sequence[float]) -> str:
  """Tells the model how long the video is and which frames it sees, in the training form.

  Mode None gives no message, "short" the number of frames, "long" their times.

  Raises:
    InputError: any other mode.
  """
  if mode not in (None, "short", "long"):
    raise InputError(f"time message mode {mode!r} is unknown; use 'short', 'long' or none")
  if mode is None:
    return ""
  times = ", ".join(str(round(float(time), 1)) for time in frame_seconds)
  where = "from it" if mode == "short" else f"at {times} seconds"
  return f"\n{_duration_sentence(seconds, len(frame_seconds), where)} "


def render_prompt(turns: Iterable[Turn], template: str = "qwen_2") -> str:
  """Writes turns as the text a model reads; an empty or None text leaves its turn open.

  Raises:
    InputError: unknown template, or an answer in `plain`, which renders what comes before it.
  """
  _check_template(template)
  if template != "plain":
    return _SYSTEM + "".join(_chatml_turn(turn.role, turn.text or None) for turn in turns)
  texts = [turn.text or "" for turn in turns]
  if any(texts[1::2]):
    raise InputError("template 'plain' renders one text and an open answer; use 'qwen_2'")
  return "".join(f"{text}\n" for text in texts if text)


def tokenize_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
  """Ids of a text, with `VISUAL_SLOT` for every placeholder: "a<image>b" -> [a, -200, b]."""
  first, *rest = text.split(PLACEHOLDER)
  ids = tokenizer.encode(first)
  for part in rest:
    ids += [VISUAL_SLOT, *tokenizer.encode(part)]
  return ids


def video_opening(num_frames: int, seconds: float) -> str:
  r"""Before the first question: "<image>\nThe video lasts for ... are sampled from it. ".

  A blank separates it from the question, in training a line break; both as in the official code.
  """
  return f"{PLACEHOLDER}\n{_duration_sentence(seconds, num_frames, 'from it')} "


def image_opening(num_images: int) -> str:
  r"""Before the first question, `<image>\n` for each: "<image>\n<image>\nWhich is bigger?"."""
  return f"{PLACEHOLDER}\n" * num_images


def inference_prompt(
  question: str, tokenizer: Tokenizer, opening: str = "", history: Sequence[tuple[str, str]] = ()
) -> list[int]:
  """Ids of a chat up to the answer to `question`.

  `opening`, of what is seen, stands before the first question only; `history` holds earlier
  (question, answer) pairs, oldest first.

  Raises:
    InputError: a question is empty or holds the placeholder.
  """
  ids = tokenizer.encode(_SYSTEM)
  for past_question, answer in history:
    ids += _question_ids(past_question, opening, tokenizer)
    ids += tokenizer.encode(_chatml_turn("gpt", answer))  # a placeholder written by it is text
    opening = ""
  ids += _question_ids(question, opening, tokenizer)
  return ids + tokenizer.encode(_chatml_turn("gpt", None))


def place_media(turns: Iterable[Turn], message: str = "") -> list[Turn]:
  r"""Puts placeholder and time message (or "") where training expects them; gives new turns.

  In every turn, in this order: a single placeholder that is not at the start moves there with a
  line break behind it, and the rest is stripped; the message follows each placeholder; the marker
  word of noisy public rows is removed. Several placeholders stay where they are.

    "What moves?\n<image>"  ->  "<image>\nThe video lasts ... from it. \nWhat moves?"
  """
  return [Turn(turn.role, _place_in_text(turn.text, message)) for turn in turns]


def encode_dialog(
  turns: Sequence[Turn],
  tokenizer: Tokenizer,
  has_media: bool = True,
  label_style: str = "qwen",
) -> TokenizedText:
  """Ids and labels of a ChatML conversation; a first turn from the assistant is dropped.

  Label style "qwen" is that of the official code: the assistant's whole turns, header included,
  and every single line break, `<|im_start|>` and `<|im_end|>` of all turns, the system's too.
  "clean" is what the model has to write: the answers, and the `<|im_end|>` after each. Another
  raises `InputError`. Without `has_media` placeholders are plain text.
  """
  if label_style not in ("qwen", "clean"):
    raise InputError(f"label style {label_style!r} is unknown; use 'qwen' or 'clean'")
  ids = tokenizer.encode(_SYSTEM)
  learnt = [False] * len(ids)
  header_length = len(tokenizer.encode(ANSWER_HEADER))
  for turn in _without_opening_answer(turns):
    text = _chatml_turn(turn.role, turn.text)
    turn_ids = tokenize_prompt(text, tokenizer) if has_media else tokenizer.encode(text)
    turn_learnt = [turn.role == "gpt"] * len(turn_ids)
    if label_style == "clean":
      turn_learnt[:header_length] = [False] * header_length
      turn_learnt[-1] = False  # The line break between turns.
    ids += turn_ids
    learnt += turn_learnt
  if label_style == "qwen":
    marks = {tokenizer.newline_id, tokenizer.im_start_id, tokenizer.im_end_id}
    learnt = [known or token in marks for known, token in zip(learnt, ids, strict=True)]
  return _with_labels(ids, learnt)


def encode_caption(turns: Sequence[Turn], tokenizer: Tokenizer) -> TokenizedText:
  r"""Ids and labels of stage 1: a visual slot, then the answer and a line break, both learnt.

  The question is dropped: (human "<image>\nSay it.", gpt "A cat.") reads "<image>A cat.\n".
  """
  ids = tokenize_prompt(f"{PLACEHOLDER}{turns[1].text}\n", tokenizer)
  return _with_labels(ids, [True] * len(ids))


def turns_of_row(row: Mapping) -> list[Turn]:
  """Checks the `conversations` of a LLaVA row and gives its turns; the row stays as it is.

  Raises:
    InputError: `conversations` is missing or empty, or a turn is no {"from": "human" or "gpt",
      "value": text}.
  """
  conversations = row.get("conversations")
  if not isinstance(conversations, list) or not conversations:
    raise _row_error(row, "field 'conversations' is missing or empty; give a list of turns")
  turns = []
  for index, entry in enumerate(conversations):
    turn = entry if isinstance(entry, Mapping) else {}
    if turn.get("from") not in list(_CHATML_ROLES):
      found = f"conversations[{index}]: field 'from' is {turn.get('from')!r}"
      raise _row_error(row, f"{found}; use 'human' or 'gpt'")
    if not isinstance(turn.get("value"), str):
      raise _row_error(row, f"conversations[{index}]: field 'value' is no text; write what is said")
    turns.append(Turn(turn["from"], turn["value"]))
  return turns


def has_answer(turns: Iterable[Turn]) -> bool:
  """Whether there is an answer, and not only blanks in its place."""
  return any(turn.role == "gpt" and turn.text.strip() for turn in turns)


def encode_row(
  row: Mapping,
  tokenizer: Tokenizer,
  template: str = "qwen_2",
  message: str = "",
  label_style: str = "qwen",
) -> TokenizedText:
  """Ids and labels of one LLaVA row, checked; see the module's example.

  A row has `conversations`, and `video` or `image` (a path or a list of paths) or neither.
  `message` is what `time_message` gives for the sampled frames; `label_style` is that of
  `encode_dialog`, while `plain` always learns the whole caption.

  Raises:
    InputError: names the row and the field that cannot be used.
  """
  _check_template(template)
  turns = turns_of_row(row)
  media = [row.get("video") or (), row.get("image") or ()]
  num_media = sum(1 if isinstance(paths, str) else len(paths) for paths in media)
  if num_media:
    turns = place_media(turns, message)
  kept = _without_opening_answer(turns)
  if not has_answer(kept):
    raise _row_error(row, "field 'conversations' has no answered question; add both")
  num_placeholders = sum(turn.text.count(PLACEHOLDER) for turn in kept)
  if num_placeholders != num_media:
    found = f"{num_placeholders} {PLACEHOLDER} for {num_media} videos or images"
    raise _row_error(row, f"field 'conversations' has {found}; write one for each")
  if template != "plain":
    return encode_dialog(turns, tokenizer, num_media > 0, label_style)
  if num_media != 1 or len(turns) != 2 or len(kept) != 2 or PLACEHOLDER in turns[1].text:
    raise _row_error(row, "template 'plain' needs one <image>, then one answer; or use 'qwen_2'")
  return encode_caption(turns, tokenizer)


def _check_template(template: str):
  if template not in TEMPLATES:
    raise InputError(f"template {template!r} is unknown; use one of {', '.join(TEMPLATES)}")


def _duration_sentence(seconds: float, num_frames: int, where: str) -> str:
  lasts = f"The video lasts for {seconds:.2f} seconds"
  return f"{lasts}, and {num_frames} frames are uniformly sampled {where}."


def _chatml_turn(role: str, text: str | None) -> str:
  header = f"{IM_START}{_CHATML_ROLES[role]}\n"
  return header if text is None else f"{header}{text}{IM_END}\n"


def _question_ids(question: str, opening: str, tokenizer: Tokenizer) -> list[int]:
  if not question.strip():
    raise InputError("the question is empty; ask something")
  if PLACEHOLDER in question:
    raise InputError(f"the question holds {PLACEHOLDER}, which stands for what is seen; remove it")
  return tokenize_prompt(_chatml_turn("human", opening + question), tokenizer)


def _place_in_text(text: str, message: str) -> str:
  if text.count(PLACEHOLDER) == 1 and not text.startswith(PLACEHOLDER):
    text = f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip()
  if message.strip():
    text = text.replace(PLACEHOLDER, f"{PLACEHOLDER}{message.rstrip()} ")
  return text.replace(_MARKER_WORD, "")


def _without_opening_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
  return turns[1:] if turns[0].role == "gpt" else turns


def _with_labels(ids: list[int], learnt: list[bool]) -> TokenizedText:
  array = np.array(ids, np.int32)
  kept = np.array(learnt) & (array != VISUAL_SLOT)
  return TokenizedText(array, np.where(kept, array, np.int32(IGNORE_LABEL)))


def _row_error(row: Mapping, problem: str) -> InputError:
  name = row.get("id", row.get("video", row.get("image", "without id")))
  return InputError(f"row {name!r}: {problem}")
