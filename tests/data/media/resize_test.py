import numpy as np
import pytest

from videochat_flash_jax.data.media.resize import resize


@pytest.fixture
def frames() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (2, 3, 20, 30, 3), dtype=np.uint8)


def test_an_integer_means_a_square(frames):
  square = resize(frames, 16)
  assert square.shape == (2, 3, 16, 16, 3)
  assert square.dtype == np.uint8
  np.testing.assert_array_equal(square, resize(frames, (16, 16)))


def test_a_pair_is_height_then_width(frames):
  assert resize(frames, (10, 40)).shape == (2, 3, 10, 40, 3)


def test_every_frame_is_resized_for_itself(frames):
  np.testing.assert_array_equal(resize(frames, 16)[1, 2], resize(frames[1, 2], 16))


def test_the_same_size_changes_nothing(frames):
  np.testing.assert_array_equal(resize(frames, (20, 30)), frames)


def test_a_constant_picture_stays_constant():
  picture = np.full((50, 40, 3), (255, 0, 77), np.uint8)
  np.testing.assert_array_equal(resize(picture, 16), np.broadcast_to((255, 0, 77), (16, 16, 3)))


def test_gray_becomes_three_equal_channels(frames):
  gray = frames[0, 0, :, :, 0]
  coloured = resize(gray, 16)
  assert coloured.shape == (16, 16, 3)
  np.testing.assert_array_equal(coloured, resize(np.stack([gray] * 3, axis=-1), 16))
