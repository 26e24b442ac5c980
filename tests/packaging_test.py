import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_shipped_model(tmp_path):
  # Built from a copy: a build leaves folders behind, and would pick up those of an earlier one.
  source = tmp_path / "source"
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(ROOT / "videochat_flash_jax", source / "videochat_flash_jax", ignore=ignored)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", tmp_path, source]
  subprocess.run(build, check=True)

  (wheel,) = tmp_path.glob("*.whl")
  held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  files = {
    str(p.relative_to(source)) for p in source.glob("videochat_flash_jax/**/*") if p.is_file()
  }
  assert any("assets" in Path(name).parts for name in files)
  assert held == files
