"""Opens visual slots into positions for visual tokens."""

from collections.abc import Sequence

import numpy as np

from videochat_flash_jax.data.text.conversation import VISUAL_SLOT


def open_slots(ids: Sequence[int], visual_counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Opens each visual slot of a tokenized text into its number of visual tokens.

      ids            [7, -200, 8, -200]    visual_counts [2, 1]
      token_ids      [7, 0, 0, 8, 0]       (0 where a visual token will be inserted)
      visual_index   [-1, 0, 1, -1, 2]     (index of the row's visual token, -1 for text)

  Args:
    ids: `[length]`, text token ids, with `VISUAL_SLOT` for each video or image.
    visual_counts: number of visual tokens of each slot, in the order of the slots.

  Returns:
    `token_ids` and `visual_index`, both int32 `[T]`, where T is the length after opening.

  Raises:
    ValueError: `visual_counts` does not have one number for each slot.
  """
  ids = np.asarray(ids, np.int32)
  is_slot = ids == VISUAL_SLOT
  if is_slot.sum() != len(visual_counts):
    raise ValueError(f"{is_slot.sum()} visual slots for {len(visual_counts)} visual items")
  repeats = np.ones(len(ids), np.int64)
  repeats[is_slot] = visual_counts
  is_visual = np.repeat(is_slot, repeats)
  token_ids = np.where(is_visual, 0, np.repeat(ids, repeats)).astype(np.int32)
  visual_index = np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)
  return token_ids, visual_index
