"""Links of plain letters to directories of any name."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from videochat_flash_jax import plain_paths
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.plain_paths import plain_path


@pytest.mark.parametrize("name", ["run", "run 2 = a+b@c, d.e_f-g", "Läufe", "视频"])
def test_a_plain_path_stays_as_it_is(tmp_path, monkeypatch, name):
  assert plain_path(tmp_path / name) == tmp_path / name
  monkeypatch.chdir(tmp_path)
  assert plain_path(Path(name)) == tmp_path / name


@pytest.mark.parametrize("name", ["run [1]", "a\\b", "a#b", "c%20d", "what?", "\udce9"])
def test_a_link_leads_to_a_directory_with_other_letters(tmp_path, monkeypatch, name):
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path)
  plain = plain_path(Path(name))
  (plain / "file").touch()
  assert (tmp_path / name / "file").exists()
  assert not set(str(plain)) & set("[]\\#%?\udce9")
  assert plain_path(tmp_path / name) == plain
  monkeypatch.chdir(tmp_path / name)
  assert plain_path(Path(name)) != plain  # a relative path means another directory now


@pytest.mark.parametrize("bucket", ["gs", "s3", "az", "hf"])
def test_a_directory_is_not_taken_for_a_bucket(bucket):
  plain = plain_path(Path("/", bucket, "run"))
  assert plain.parts[1] != bucket and plain.readlink() == Path("/", bucket, "run")


def test_links_are_gone_when_the_process_ends(tmp_path):
  code = (
    "from pathlib import Path; from videochat_flash_jax.plain_paths import plain_path; "
    f"print(plain_path(Path({str(tmp_path / 'a#b')!r})))"
  )
  root = Path(__file__).parents[1]
  told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
  link = Path(told.stdout.strip())
  assert link.name == "link" and not link.parents[1].exists()


def test_a_folder_for_links_that_is_not_plain_is_refused(tmp_path, monkeypatch):
  (tmp_path / "a[b]").mkdir()
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a[b]"))
  monkeypatch.setattr(plain_paths, "_folder_of_links", plain_paths._folder_of_links.__wrapped__)
  with pytest.raises(InputError, match="set TMPDIR to a directory") as error:
    plain_path(tmp_path / "c#d")
  assert "\n" not in str(error.value)
