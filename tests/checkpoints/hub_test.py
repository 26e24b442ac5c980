"""Names of models: the embedded one, a directory, and what is refused."""

import pytest

from videochat_flash_jax.checkpoints.hub import checkpoint_directory
from videochat_flash_jax.errors import InputError


def test_a_directory_and_the_embedded_model_are_found(tmp_path):
  assert checkpoint_directory(tmp_path) == tmp_path
  assert checkpoint_directory(str(tmp_path)) == tmp_path
  assert (checkpoint_directory("tiny") / "config.json").is_file()


@pytest.mark.parametrize("name", ["", "tinny", "x" * 5000, "a/" * 5000, "two\nlines", "nul\0"])
def test_a_name_of_nothing_is_refused_in_one_short_line(name):
  with pytest.raises(
    InputError, match=r"no such model or directory; did you mean .*tiny"
  ) as caught:
    checkpoint_directory(name)
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 600
