"""The synthetic world in place of a mixture: packed, saved and begun again like any other.

  batches = synthetic_batches(config, model, make_tokenizer, {"attribute": 0.8, "absence": 0.2})

An example depends on (seed, stream, number) alone, so nothing of it has to be saved.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from videochat_flash_jax.data.batches.data_config import DataConfig
from videochat_flash_jax.data.batches.examples import Example, skipped_positions
from videochat_flash_jax.data.batches.replacement import Drawn
from videochat_flash_jax.data.batches.train_batches import TrainBatches, vocabulary_digest
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.data.text.tokenizer_of_process import TokenizerOfProcess
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.synthetic import world as synthetic
from videochat_flash_jax.synthetic.training import draw_conversation

_TEXT_TOKENS = 64  # enough for a question with all that stands around it: fewer than 55


def synthetic_batches(
  config: DataConfig,
  model: VideoChatFlashConfig,
  make_tokenizer: Callable[[], Tokenizer],
  questions: Mapping[str, float],
  streams: Sequence[int] | None = None,
) -> TrainBatches:
  """Batches of conversations about the synthetic world.

  Args:
    config: what batches are made of; of `example` the sizes, `frames`, `template` and
      `position_skip` count.
    model: whose pictures and visual tokens they are.
    make_tokenizer: gives the tokenizer, once in each worker.
    questions: how often each kind out of `synthetic.QUESTION_KINDS` is asked.
    streams: see `TrainBatches`.

  Raises:
    InputError: a kind of question is unknown, or the longest video does not fit a row.
  """
  reader = SyntheticReader(config, model, make_tokenizer, questions)
  facts = {"questions": dict(questions), "tokenizer": vocabulary_digest(reader.tokenizer)}
  return TrainBatches(config, reader, facts, streams)


class SyntheticReader(TokenizerOfProcess):
  """Gives the n-th example of a stream, always; `Drawn.row` is its number."""

  def __init__(
    self,
    config: DataConfig,
    model: VideoChatFlashConfig,
    make_tokenizer: Callable[[], Tokenizer],
    questions: Mapping[str, float],
  ):
    """Opens nothing yet; see `synthetic_batches`."""
    super().__init__(make_tokenizer)
    self._config, self._model, self._questions = config, model, dict(questions)
    _check_questions(self._questions)
    _check_room(config)

  def read(self, stream: int, number: int) -> Drawn:
    """Draws example `number` of a stream.

    Raises:
      InputError: it needs more clips than a part of a row has room for.
    """
    config, layout = self._config.example, self._config.layout
    rng = np.random.default_rng([self._config.seed, stream, number])
    drawn = draw_conversation(
      rng,
      self._model,
      self.tokenizer,
      config.frames,
      layout.tokens,
      self._questions,
      config.template,
    )
    positions = skipped_positions(len(drawn["token_ids"]), config.position_skip, rng)
    tiles = np.empty((0, 1, *drawn["frames"].shape[2:]), np.uint8)
    example = Example(tiles=tiles, positions=positions, **drawn)
    needed = layout.needs(example.visual_index, len(example.frames))[0].max()
    if needed > layout.clips_per_shard:
      raise InputError(
        f"a video of {CLIP_FRAMES * len(example.frames)} frames needs {needed} clips in a part of "
        f"a row, but clips_per_shard is {layout.clips_per_shard}; give more, or fewer frames"
      )
    return Drawn(example, number)

  def read_again(self, stream: int, number: int, row: int) -> Drawn:
    """Draws it again, the same as before."""
    del row  # the number itself
    return self.read(stream, number)


def _check_questions(questions):
  known = set(questions) <= set(synthetic.QUESTION_KINDS)
  if not known or not any(questions.values()) or min(questions.values()) < 0:
    raise InputError(
      f"questions are {questions}: give weights from 0 of {', '.join(synthetic.QUESTION_KINDS)}, "
      "one of them positive"
    )


def _check_room(config):
  """Refuses videos that no row has room for, before the first of them is drawn."""
  layout, most = config.layout, config.example.frames[1]
  clips = most // CLIP_FRAMES
  tokens = clips * layout.clip_tokens + _TEXT_TOKENS
  if tokens > layout.tokens or clips > layout.num_shards * layout.clips_per_shard:
    raise InputError(
      f"a video of {most} frames and a question need {clips} clips and {tokens} tokens, but a row "
      f"has room for {layout.num_shards * layout.clips_per_shard} and {layout.tokens}; give rows "
      "more, or fewer frames"
    )
