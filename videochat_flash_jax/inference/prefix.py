"""`Prefix`: what a conversation begins with, a video or images, read once for all questions.

The layers of the decoder form parts, between which visual tokens are dropped. A part is read chunk
after chunk, then comes the drop, then the next part: *for part, for chunk*. So the memory of
activations is that of one chunk, and every part has a cache of its own length.

    layers 0..a    cache of all tokens
       │ drop      evenly spaced: which tokens stay depends on their number alone
    layers a..b    cache of the tokens that stay
       │ drop      ranked by attention: which tokens stay depends on the question
    layers b..     are read anew for each question, see `Engine.read`

A prefix may grow at its end. What enters a drop is kept on the host, because a drop chooses anew
when there are more tokens or another question; what was read before the drop is not read again.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from videochat_flash_jax.inference.interrupts import uninterrupted
from videochat_flash_jax.inference.limits import SMALLEST_PIECE
from videochat_flash_jax.inference.programs import NO_TOKEN, Tokens, bucket
from videochat_flash_jax.inference.token_rows import TokenRows
from videochat_flash_jax.models.kv_cache import KVCache, shares
from videochat_flash_jax.models.token_dropout import DropoutPlan, plan_dropout
from videochat_flash_jax.shapes import Bool, Float, Int

if TYPE_CHECKING:
  from videochat_flash_jax.inference.engine import Engine

CHUNK = 4096  # tokens that are read at once; the caches of a prefix have a multiple of it as slots
_SMALL_CHUNKS = (512, SMALLEST_PIECE)
_OWN_SLOTS = 512  # the caches of questions and answers have a multiple of it as slots


def piece_sizes(num_tokens: int) -> list[tuple[int, int]]:
  """Cuts tokens into pieces of few sizes: the tokens of each piece, and its size with padding.

  piece_sizes(5000) = [(4096, 4096), (512, 512), (392, 512)]; piece_sizes(30) = [(30, 64)]
  """
  large, small, least = CHUNK, *_SMALL_CHUNKS
  cut = []
  while num_tokens > 0:
    size = large if num_tokens >= large else small if num_tokens > least else least
    cut.append((min(num_tokens, size), size))
    num_tokens -= size
  return cut


def whole_chunks(num_tokens: int) -> int:
  """Slots of a cache with room for so many tokens: whole chunks, at least one."""
  return -(-max(num_tokens, 1) // CHUNK) * CHUNK


def own_pieces(num_tokens: int) -> list[tuple[int, int]]:
  """As `piece_sizes`, for a text: few are longer than a chunk, and short ones are padded little."""
  whole, rest = divmod(num_tokens, CHUNK)
  return [(CHUNK, CHUNK)] * whole + [(rest, min(bucket(rest, 16), CHUNK))] * bool(rest)


def num_own_slots(start: int, num_tokens: int, max_new_tokens: int) -> int:
  """Slots of the caches of a text, with its padding, and of its answer, after others."""
  padded = sum(size for _, size in own_pieces(num_tokens))
  return -(-(start + max(padded, num_tokens + max_new_tokens)) // _OWN_SLOTS) * _OWN_SLOTS


@dataclasses.dataclass
class Part:
  """What a part of the layers has read of a prefix.

  Attributes:
    layers: the part.
    cache: of the tokens that were read.
    pieces: in which they were read: the tokens of each, and its size with padding.
    kept: of the tokens that enter the drop before the part, the indices of those that it reads.
  """

  layers: range
  cache: KVCache
  pieces: list[tuple[int, int]] = dataclasses.field(default_factory=list)
  kept: Int[np.ndarray, "S"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

  @property
  def num_read(self) -> int:
    """Number of tokens that were read."""
    return sum(num_tokens for num_tokens, _ in self.pieces)

  def make_room(self, engine: "Engine", num_tokens: int) -> None:
    """Gives the cache slots for so many more tokens, rounded up to whole chunks.

    Where slots are split over devices, the device with the most tokens needs its share of them.
    """
    shards = self.cache.length.shape[1]
    num_slots = int(self._shares().max()) * shards + num_tokens
    self.cache = engine.widened(self.cache, whole_chunks(num_slots))

  def _shares(self):
    """How many tokens each device has over which the slots of the cache are split."""
    shards = self.cache.length.shape[1]
    return sum((shares(*piece, shards) for piece in self.pieces), np.zeros(shards, np.int32))

  @uninterrupted()
  def read(
    self, engine: "Engine", entering: Any, num_tokens: int, size: int, leaving: TokenRows | None
  ) -> None:
    """Reads more tokens, one piece.

    Args:
      engine: runs the layers.
      entering: one row for `Engine.read_part`.
      num_tokens: of the piece.
      size: of the piece with padding.
      leaving: is given what leaves the part; None if nobody needs it.
    """
    self.make_room(engine, size)
    wanted = "" if leaving is None else "states"
    sizes = [(num_tokens, size)]
    self.cache, states = engine.read_part(
      self.layers, [entering], self.cache, sizes=sizes, wanted=wanted
    )
    self.pieces.append((num_tokens, size))
    if leaving is not None:
      leaving.append(states[0])

  def read_kept(
    self, engine: "Engine", entered: TokenRows, leaving: TokenRows | None, *, finish: bool
  ) -> None:
    """Reads those of the kept tokens that have entered the drop, in whole chunks.

    Args:
      engine: runs the layers.
      entered: what has entered the drop before the part.
      leaving: see `read`.
      finish: also read what fills no chunk.
    """
    num_ready = int(np.searchsorted(self.kept, len(entered)))
    while num_ready - self.num_read >= CHUNK or (finish and num_ready > self.num_read):
      num_tokens, size = piece_sizes(num_ready - self.num_read)[0]
      index = self.kept[self.num_read : self.num_read + num_tokens]
      self.read(engine, entered.take(index), num_tokens, size, leaving)

  def rewind(self, engine: "Engine", num_tokens: int) -> None:
    """Keeps the first tokens only."""
    if num_tokens == self.num_read:
      return
    while self.pieces and self.num_read - self.pieces[-1][0] >= num_tokens:
      self.pieces.pop()
    if self.pieces:  # of the last one a part may be kept
      size = self.pieces.pop()[1]
      self.pieces.append((num_tokens - self.num_read, size))
    self.cache = engine.shortened(self.cache, self._shares()[None].astype(np.int32))


class Prefix:
  """Tokens before the first question: text, and the visual tokens of a video or images.

  Attributes:
    is_visual: which of the tokens are visual.
    num_forgotten: number of tokens that are no longer among them, see `forget`.
    parts: the parts of the layers that do not depend on the question.
    entered: for each drop before or right behind these parts, what has entered it. The last one
      is the first drop that ranks, if there is any.
  """

  def __init__(self, engine: "Engine"):
    self.is_visual = np.zeros(0, bool)
    self.num_forgotten = 0
    self.parts = [
      Part(layers, engine.empty_prefix_cache(layers, CHUNK)) for layers in engine.shared_parts
    ]
    num_drops = len(engine.shared_parts) - 1 + bool(engine.ranked_parts)
    self.entered = [TokenRows() for _ in range(num_drops)]
    self._engine = engine
    self._expected = self.is_visual  # all tokens, when what is being watched has ended
    self._pending: list[Tokens] = []

  @property
  def num_tokens(self) -> int:
    """T, the number of tokens before any drop."""
    return len(self.is_visual)

  @property
  def caches(self) -> tuple[KVCache, ...]:
    """The cache of each part."""
    return tuple(part.cache for part in self.parts)

  @uninterrupted()
  def expect(self, num_visual: int) -> None:
    """Says how many visual tokens will be added, and nothing else.

    Caches then get their final size at once, and tokens that are dropped in even spaces are chosen
    on the way.
    """
    self._expected = np.concatenate([self.is_visual, np.ones(num_visual, bool)])
    self._choose()
    for part, num_tokens in zip(self.parts, self._lengths(), strict=True):
      part.make_room(self._engine, max(0, num_tokens - part.num_read))

  def add_text(self, token_ids: Int[np.ndarray, "T"]) -> None:
    """Adds text tokens at the end."""
    self._add(self._engine.tokens(token_ids))

  def add_visual(self, visual_tokens: Float[np.ndarray, "T D"]) -> None:
    """Adds visual tokens at the end, and reads as many whole chunks as there are."""
    zeros = np.zeros(len(visual_tokens), np.int32)
    self._add(Tokens(zeros, visual_tokens, zeros))

  @uninterrupted()
  def rewind(self, num_tokens: int) -> None:
    """Keeps the first tokens only, which were read before; the others must be text."""
    self._read_pending(finish=True)
    self.is_visual = self._expected = self.is_visual[:num_tokens]
    self.parts[0].rewind(self._engine, num_tokens)
    for states in self.entered[:1]:
      states.truncate(num_tokens)
    self._choose()

  @uninterrupted()
  def forget(self, start: int, num_tokens: int) -> None:
    """Forgets some tokens; those behind them move up, and their positions stay contiguous.

    What is above a drop is read anew before the next question, from what is left.

    Args:
      start: index of the first token to forget.
      num_tokens: how many.
    """
    self._read_pending(finish=True)
    first = self.parts[0]
    first.cache = self._engine.forget(first.cache, start, num_tokens)
    num_left = first.num_read - num_tokens
    first.pieces = [(num_left, num_left)]
    for states in self.entered[:1]:
      states.forget(start, num_tokens)
    self.is_visual = np.delete(self.is_visual, np.s_[start : start + num_tokens])
    self.num_forgotten += num_tokens
    self._expected = self.is_visual[:0]  # so that nothing is read that the next drop may leave out
    self._choose()

  def settle(self) -> None:
    """Reads all that was added and not read yet; then a question can follow."""
    self._read_pending(finish=True)
    if len(self._expected) != self.num_tokens:
      with uninterrupted():
        self._expected = self.is_visual
        self._choose()
    self._read_kept(finish=True)

  def plan(self) -> DropoutPlan:
    """All drops of the tokens of this prefix."""
    return self._plan(self.is_visual)

  def ranked(self) -> tuple[TokenRows, Bool[np.ndarray, "T"]]:
    """What has entered the first drop that ranks, and which of these tokens are visual."""
    is_visual = self.is_visual
    for part in self.parts[1:]:
      is_visual = is_visual[part.kept]
    return self.entered[-1], is_visual

  def _plan(self, is_visual):
    return plan_dropout(
      self._engine.config.dropout, is_visual[None], np.ones((1, len(is_visual)), np.int32)
    )

  def _lengths(self):
    """Number of tokens that each part reads when all that is expected is there."""
    return [len(self._expected), *(len(part.kept) for part in self.parts[1:])]

  def _leaving(self, number):
    """Where what leaves a part is kept; None after the last layer."""
    return self.entered[number] if number < len(self.entered) else None

  def _add(self, tokens):
    with uninterrupted():
      self._pending.append(tokens)
      self.is_visual = np.concatenate([self.is_visual, tokens.visual_index >= 0])
    self._read_pending(finish=False)

  def _read_pending(self, finish):
    while num_pending := sum(len(tokens.token_ids) for tokens in self._pending):
      if num_pending < CHUNK and not finish:
        return
      pending = Tokens(*map(np.concatenate, zip(*self._pending, strict=True)))
      num_tokens, size = piece_sizes(num_pending)[0]
      now, later = (
        Tokens(*(x[part] for x in pending)) for part in (slice(num_tokens), slice(num_tokens, None))
      )
      # A visual token stands at its own position of the piece.
      now = now._replace(
        visual_index=np.where(
          now.visual_index >= 0, np.arange(num_tokens, dtype=np.int32), NO_TOKEN
        )
      )
      with uninterrupted():
        self.parts[0].read(self._engine, now, num_tokens, size, self._leaving(0))
        self._pending = [later]  # after it was read: an error loses nothing
      self._read_kept(finish=False)

  def _choose(self):
    """Chooses which tokens the parts after the first read, and forgets what they read else."""
    if len(self.parts) == 1:
      return
    drops = self._plan(self._expected).drops
    for number, part in enumerate(self.parts[1:], 1):
      kept = drops[part.layers.start].indices[0]
      num_same = min(
        part.num_read, len(kept), int(np.searchsorted(kept, len(self.entered[number - 1])))
      )
      differs = part.kept[:num_same] != kept[:num_same]
      part.kept = kept
      part.rewind(self._engine, int(differs.argmax()) if differs.any() else num_same)
      self._forget_behind(number)

  def _forget_behind(self, number):
    """Forgets what left a part of tokens that it has forgotten."""
    if self._leaving(number) is not None:
      self._leaving(number).truncate(self.parts[number].num_read)

  def _read_kept(self, finish):
    for number, part in enumerate(self.parts[1:], 1):
      part.read_kept(self._engine, self.entered[number - 1], self._leaving(number), finish=finish)
