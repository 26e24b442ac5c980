"""Makes batches of the synthetic world: packed, saved and resumed like the batches of a mixture.

  batches = synthetic_batches(config, model, make_tokenizer, {"attribute": 0.8, "absence": 0.2})

An example depends only on (seed, stream, number), so its content never has to be saved.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from videochat_flash_jax.data.batches.data_config import DataConfig
from videochat_flash_jax.data.batches.examples import Example, skipped_positions
from videochat_flash_jax.data.batches.replacement import Drawn
from videochat_flash_jax.data.batches.shared_stream import Sharing
from videochat_flash_jax.data.batches.train_batches import TrainBatches, vocabulary_digest
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.text.tokenizer import Tokenizer
from videochat_flash_jax.data.text.tokenizer_of_process import TokenizerOfProcess
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import weights
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.synthetic import world as synthetic
from videochat_flash_jax.synthetic.training import draw_conversation

_TEXT_TOKENS = 64  # enough for one question with its template, which has fewer than 55 tokens


def synthetic_batches(
  config: DataConfig,
  model: VideoChatFlashConfig,
  make_tokenizer: Callable[[], Tokenizer],
  questions: Mapping[str, float],
  streams: Sequence[int] | None = None,
  sharing: Sharing | None = None,
) -> TrainBatches:
  """Returns batches of conversations about the synthetic world.

  Args:
    config: settings of the batches. Of `example`, only the sizes, `frames`, `template` and
      `position_skip` are used.
    model: gives the picture size and the number of visual tokens.
    make_tokenizer: returns the tokenizer; called once in each worker.
    questions: how often each kind out of `synthetic.QUESTION_KINDS` is asked.
    streams: see `TrainBatches`.
    sharing: see `TrainBatches`.

  Raises:
    InputError: a kind of question is unknown, or the longest video does not fit into a row.
  """
  reader = SyntheticReader(config, model, make_tokenizer, questions)
  facts = {"questions": dict(questions), "tokenizer": vocabulary_digest(reader.tokenizer)}
  return TrainBatches(config, reader, facts, streams, sharing=sharing)


class SyntheticReader(TokenizerOfProcess):
  """Draws the n-th example of a stream; its `Drawn.row` is n."""

  def __init__(
    self,
    config: DataConfig,
    model: VideoChatFlashConfig,
    make_tokenizer: Callable[[], Tokenizer],
    questions: Mapping[str, float],
  ):
    """Stores and checks the settings; nothing is opened yet. See `synthetic_batches`."""
    super().__init__(make_tokenizer)
    self._config, self._model, self._questions = config, model, dict(questions)
    _check_questions(self._questions)
    _check_room(config)

  def read(
    self, stream: int, number: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Draws example `number` of a stream.

    Raises:
      InputError: it needs more than `clips_per_shard` clips in one part of a row; or it is
        `unusable`, since no other one is drawn.
    """
    if unusable:
      raise InputError(f"example {number} of the synthetic world {unusable[number]}")
    config, row_shape = self._config.example, self._config.row_shape
    rng = np.random.default_rng([self._config.seed, stream, number])
    drawn = draw_conversation(
      rng,
      self._model,
      self.tokenizer,
      config.frames,
      row_shape.tokens,
      self._questions,
      config.template,
    )
    positions = skipped_positions(len(drawn["token_ids"]), config.position_skip, rng)
    tiles = np.empty((0, 1, *drawn["frames"].shape[2:]), np.uint8)
    example = Example(tiles=tiles, positions=positions, **drawn)
    needed = row_shape.needs(example.visual_index, len(example.frames))[0].max()
    if needed > row_shape.clips_per_shard:
      raise InputError(
        f"a video of {CLIP_FRAMES * len(example.frames)} frames needs {needed} clips in a part of "
        f"a row, but clips_per_shard is {row_shape.clips_per_shard}; increase it, or lower frames"
      )
    return Drawn(example, number)

  def read_row(self, stream: int, number: int, row: int) -> Drawn:
    """Draws example `number`, which is always equal to `row`."""
    return self.read(stream, number)

  def read_again(
    self, stream: int, number: int, row: int, unusable: Mapping[int, BrokenRow] | None = None
  ) -> Drawn:
    """Draws example `number` again, the same as before."""
    return self.read(stream, number, unusable)


def _check_questions(questions):
  if not questions or not weights(*synthetic.QUESTION_KINDS).accepts(questions):
    raise InputError(
      f"questions are {questions}: give weights, 0 or more, for "
      f"{', '.join(synthetic.QUESTION_KINDS)}; one of them must be above 0"
    )


def _check_room(config):
  """Raises `InputError` if the longest video does not fit into a row, before any is drawn."""
  row_shape, max_frames = config.row_shape, config.example.frames[1]
  clips, max_clips = max_frames // CLIP_FRAMES, row_shape.num_shards * row_shape.clips_per_shard
  tokens = clips * row_shape.clip_tokens + _TEXT_TOKENS
  if tokens > row_shape.tokens or clips > max_clips:
    raise InputError(
      f"a video of {max_frames} frames and a question need {clips} clips and {tokens} tokens, but "
      f"a row has room for {max_clips} and {row_shape.tokens}; give more clips_per_shard and "
      "tokens, or fewer frames"
    )
