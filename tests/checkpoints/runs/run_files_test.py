import pytest

from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.checkpoints.runs.run_files import hub_files
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.train.initial_weights import check_init_from


def begin_with(directory):
  check_init_from(str(directory), VideoChatFlashConfig.tiny())


@pytest.mark.parametrize("opened", [open_checkpoint, hub_files, begin_with])
def test_the_directory_of_stages_is_refused_with_the_last_of_them(tmp_path, opened):
  for stage in ("stage0", "stage1"):
    (tmp_path / stage / "checkpoints").mkdir(parents=True)
  assert hub_files(tmp_path / "stage1") == tmp_path / "stage1" / "hub"
  with pytest.raises(InputError, match=r"several training stages; give one of them, .*/stage1$"):
    opened(tmp_path)
