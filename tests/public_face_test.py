import subprocess
import sys

import pytest

import videochat_flash_jax as vcf


def test_importing_the_package_imports_nothing_heavy():
  probe = (
    "import sys, videochat_flash_jax; print({'jax', 'flax', 'numpy', 'av'} & set(sys.modules))"
  )
  result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
  assert result.stdout == "set()\n"


def test_reading_a_config_does_not_import_jax():
  probe = (
    "import sys, videochat_flash_jax as vcf; vcf.VideoChatFlashConfig.qwen2_7b_res448();"
    "print('jax' in sys.modules)"
  )
  result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
  assert result.stdout == "False\n"


@pytest.mark.parametrize("package", ["the package", "models"])
def test_every_public_name_is_there_and_listed(package):
  module = vcf if package == "the package" else vcf.models
  assert module.__all__
  for name in module.__all__:
    assert name in dir(module)
    assert name in module.__doc__
    assert getattr(module, name).__name__.endswith(name)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="'videochat_flash_jax' has no attribute 'VideoChatt'"):
    vcf.VideoChatt  # noqa: B018
