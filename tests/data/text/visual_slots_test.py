"""Laying out visual slots."""

import numpy as np
import pytest

from videochat_flash_jax.data.text.visual_slots import open_slots


def test_slots_open_into_their_visual_tokens():
  token_ids, visual_index = open_slots([7, -200, 8, -200], [2, 1])
  np.testing.assert_array_equal(token_ids, [7, 0, 0, 8, 0])
  np.testing.assert_array_equal(visual_index, [-1, 0, 1, -1, 2])


def test_text_without_slots_stays():
  token_ids, visual_index = open_slots([7, 8], [])
  np.testing.assert_array_equal(token_ids, [7, 8])
  np.testing.assert_array_equal(visual_index, [-1, -1])


def test_a_wrong_number_of_items_is_an_error():
  with pytest.raises(ValueError, match="1 visual slots for 2"):
    open_slots([7, -200], [2, 1])
