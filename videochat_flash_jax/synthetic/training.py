"""Draws training examples of the synthetic world, rendered directly at the model's picture size.

An example depends only on its random generator, so a seed and a number identify it.
"""

from collections.abc import Mapping

import numpy as np

from videochat_flash_jax.data.text.conversation import (
  IGNORE_LABEL,
  TokenizedText,
  Turn,
  encode_caption,
  encode_dialog,
  time_message,
)
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.synthetic import world as synthetic
from videochat_flash_jax.synthetic.render import COLOURS, Scene, render
from videochat_flash_jax.synthetic.shapes import KINDS

# A patch shows a thing if the thing covers more than the first fraction of it, and shows nothing if
# less than the second. No loss is computed for patches in between.
_SHOWN, _EMPTY = 0.15, 0.03
_COLOUR_NAMES = tuple(COLOURS)


def draw_clips(
  rng: np.random.Generator, config: VideoChatFlashConfig, num_clips: int
) -> dict[str, np.ndarray]:
  """Draws the clips of one scene, with labels of what each patch shows.

  Args:
    rng: what the scene depends on.
    config: gives the sizes of frames, clips and patches.
    num_clips: C.

  Returns:
    `frames`, uint8 `[C, F, S, S, 3]`; `kinds` and `colours`, int32 `[C, P]`: the indices of the
    kind and of the colour of the thing in a patch. They are `len(KINDS)` and `len(COLOURS)` if the
    patch shows nothing, and IGNORE_LABEL if a thing covers only a small part of it.
  """
  scene = synthetic.draw_scene(rng, num_clips * config.vision.clip_frames)
  frames, cover = _record(rng, scene, config)
  grid, patch = config.vision.grid_size, config.vision.patch_size
  covered = cover.reshape(-1, grid, patch, grid, patch).mean(axis=(2, 4))
  event_of_second = [scene.event_at(second) for second in range(scene.num_seconds)]
  clips = {"frames": frames.reshape(num_clips, -1, *frames.shape[1:])}
  for name, values, nothing in (
    ("kinds", [event.kind for event in scene.events], len(KINDS)),
    ("colours", [event.colour for event in scene.events], len(COLOURS)),
  ):
    shown = np.array([*values, nothing])[event_of_second][:, None, None]
    other = np.where(covered < _EMPTY, nothing, IGNORE_LABEL)
    clips[name] = np.where(covered > _SHOWN, shown, other).astype(np.int32).reshape(num_clips, -1)
  return clips


def draw_conversation(
  rng: np.random.Generator,
  config: VideoChatFlashConfig,
  tokenizer: Tokenizer,
  frames: tuple[int, int],
  max_tokens: int,
  question_weights: Mapping[str, float],
  template: str = "qwen_2",
) -> dict[str, np.ndarray]:
  """Draws a video and a conversation about it, in the same format as at inference.

  With template "plain" the text is a caption instead of a conversation: "red star, blue moon".

  Args:
    rng: what the example depends on.
    config: gives the picture size and the number of visual tokens.
    tokenizer: the tokenizer of the model.
    frames: smallest and largest number of sampled frames.
    max_tokens: largest T, visual tokens included; questions that do not fit are left out.
    question_weights: how often each kind of question is asked, relative to the other kinds.
    template: one of `conversation.TEMPLATES`.

  Returns:
    `frames`, uint8 `[C, F, S, S, 3]`, and `token_ids`, `labels`, `visual_index`, int32 `[T]`.
  """
  scene = synthetic.draw_scene(rng, synthetic.draw_num_frames(rng, *frames))
  pictures, _ = _record(rng, scene, config)
  clips = pictures.reshape(-1, config.vision.clip_frames, *pictures.shape[1:])
  visual_tokens = len(clips) * config.clip_tokens
  if template == "plain":
    text = _caption(scene, tokenizer)
  else:
    text = _dialog(rng, scene, tokenizer, max_tokens - visual_tokens, question_weights)
  token_ids, visual_index = open_slots(text.ids, [visual_tokens])
  labels = np.full(len(token_ids), IGNORE_LABEL, np.int32)
  labels[visual_index < 0] = text.labels[text.ids >= 0]
  return {
    "frames": clips,
    "token_ids": token_ids[:max_tokens],
    "labels": labels[:max_tokens],
    "visual_index": visual_index[:max_tokens],
  }


def _caption(scene, tokenizer) -> TokenizedText:
  shown = [f"{_COLOUR_NAMES[event.colour]} {KINDS[event.kind]}" for event in scene.events]
  return encode_caption([Turn("human", ""), Turn("gpt", ", ".join(shown))], tokenizer)


def _dialog(rng, scene, tokenizer, max_tokens, question_weights) -> TokenizedText:
  """As many of the drawn questions as fit, with the labels of `_add_early_labels`."""
  questions = _deal(rng, scene, question_weights)
  for num_questions in range(len(questions), 0, -1):
    turns = _turns(scene, questions[:num_questions])
    text = encode_dialog(turns, tokenizer, label_style="clean")
    if len(text.ids) - 1 <= max_tokens:
      break
  return text._replace(labels=_add_early_labels(text.ids, text.labels, tokenizer))


def _add_early_labels(ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Adds a second label for each answer: at the token after the name of the thing it is about.

      ids     What colour is the star  ?   ... assistant red <end>
      labels  -    -      -  -   -     red ... -         red <end>

  At that token, one attention step from the name to the frames is enough to find the answer. With
  labels only at the end of the question, a decoder needs more than twice as many training steps
  before it learns to find it.

  Args:
    ids: int `[T]`, token ids of a conversation.
    labels: int `[T]`, its labels.
    tokenizer: the tokenizer of the ids.

  Returns:
    The new labels, int `[T]`.
  """
  names = [np.array(tokenizer.encode(f" {kind}")) for kind in KINDS]
  labels = labels.copy()
  starts = np.flatnonzero((labels[1:] >= 0) & (labels[:-1] < 0)) + 1
  for previous, start in zip([0, *starts[:-1]], starts, strict=True):
    for end in range(start - 1, previous, -1):
      if any(np.array_equal(ids[max(end - len(name), 0) : end], name) for name in names):
        labels[end] = ids[start]
        break
  return labels


def vocabulary_lines(num_scenes: int = 200, seed: int = 0) -> list[str]:
  """Returns the text from which the tiny model's vocabulary is trained: one line per turn."""
  lines = []
  for index in range(num_scenes):
    rng = np.random.default_rng([seed, index])
    scene = synthetic.draw_scene(rng, synthetic.draw_num_frames(rng, 4, 512))
    questions = _deal(rng, scene, dict.fromkeys(synthetic.QUESTION_KINDS, 1.0))
    for turn in _turns(scene, questions):
      lines += [turn.text.replace("<image>", ""), "system", "user", "assistant"]
  return [*lines, "You are a helpful assistant."]


def _record(rng, scene: Scene, config: VideoChatFlashConfig):
  """Renders one frame near the middle of each second, with noise like that of a camera or codec."""
  moments = np.arange(scene.num_seconds) + rng.uniform(0.35, 0.65)
  frames, cover = render(scene, moments, config.vision.image_size)
  gain, offset = rng.uniform(0.94, 1.06), rng.uniform(-6, 6, 3)
  noise = rng.standard_normal(frames.shape, np.float32) * np.float32(rng.uniform(0, 4))
  frames = np.clip(frames * np.float32(gain) + offset.astype(np.float32) + noise, 0, 255)
  return frames.astype(np.uint8), cover


def _deal(rng, scene: Scene, weights: Mapping[str, float]) -> list[synthetic.Question]:
  """Mixes questions: draws the kind of each next one by weight, until that kind has none left."""
  kinds = list(weights)
  chances = np.array([weights[kind] for kind in kinds])
  decks = {kind: synthetic.ask(scene, rng, kind) for kind in kinds}
  dealt: list[synthetic.Question] = []
  while deck := decks[kinds[rng.choice(len(kinds), p=chances / chances.sum())]]:
    dealt.append(deck.pop())
  return dealt or synthetic.ask(scene, rng, "attribute")


def _turns(scene: Scene, questions: list[synthetic.Question]) -> list[Turn]:
  seconds = np.arange(scene.num_seconds) + 0.5
  opening = f"<image>{time_message('short', scene.num_seconds, seconds)}"
  turns = []
  for question in questions:
    turns += [Turn("human", opening + question.text), Turn("gpt", question.answer)]
    opening = ""
  return turns
