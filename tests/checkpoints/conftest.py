import pytest

from tests.checkpoints.small_checkpoints import random_model
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import save_model


@pytest.fixture
def checkpoint(tmp_path):
  """A directory that holds a small model."""
  directory = tmp_path / "small"
  save_model(random_model(), CONFIG, directory)
  return directory
