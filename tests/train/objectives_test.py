"""The table of objectives: it has those that a config may name."""

import pytest

from tests.train.small_config import get_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.objectives import OBJECTIVES


def test_a_config_may_name_the_objectives_of_the_table_and_no_others():
  config = get_config()
  for name in OBJECTIVES:
    config.objective = name
    assert train_settings(config).objective == name
  config.objective = "pictures"
  with pytest.raises(InputError, match=f"give {' or '.join(OBJECTIVES)}$"):
    train_settings(config)
