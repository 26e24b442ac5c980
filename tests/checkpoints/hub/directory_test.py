"""Names of models: the embedded one, a directory, the hub's cache, and what is refused."""

import socket

import huggingface_hub
import pytest
from huggingface_hub import constants

from videochat_flash_jax.checkpoints.hub.directory import RELEASED, checkpoint_directory
from videochat_flash_jax.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory_and_the_embedded_model_are_found(tmp_path):
  assert checkpoint_directory(tmp_path) == tmp_path
  assert checkpoint_directory(str(tmp_path)) == tmp_path
  assert (checkpoint_directory("tiny") / "config.json").is_file()


@pytest.mark.parametrize(
  "name", ["", "tinny", "x" * 5000, "a/" * 5000, "two\nlines", "nul\0", "../tiny", "/tiny", "a/b/c"]
)
def test_a_name_of_nothing_is_refused_in_one_short_line(name):
  with pytest.raises(
    InputError, match=r"no such model or directory; did you mean .*tiny"
  ) as caught:
    checkpoint_directory(name)
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 600


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache of the hub, on a machine without a network."""

  def unreachable(*args, **options):
    raise OSError("Network is unreachable")

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(socket, "getaddrinfo", unreachable)
  return tmp_path


def put(cache, repository, files=("config.json", "model.safetensors", "tokenizer.json")):
  """Lays files of the tiny model into the cache, as the hub's library does."""
  home = cache / f"models--{repository.replace('/', '--')}"
  snapshot = home / "snapshots" / COMMIT
  for folder in (snapshot, home / "blobs", home / "refs"):
    folder.mkdir(parents=True)
  (home / "refs" / "main").write_text(COMMIT)
  for number, name in enumerate(files):
    (home / "blobs" / str(number)).write_text(name)
    (snapshot / name).symlink_to(home / "blobs" / str(number))
  return snapshot


@pytest.mark.parametrize(
  "name, repository",
  [
    (RELEASED[2], RELEASED[2]),
    (RELEASED[2].split("/")[1], RELEASED[2]),
    ("someone/their-own_model.v2", "someone/their-own_model.v2"),
  ],
)
def test_a_model_in_the_hubs_cache_needs_no_network(cache, monkeypatch, name, repository):
  snapshot = put(cache, repository)
  monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("asked"))
  assert checkpoint_directory(name) == snapshot


@pytest.mark.parametrize("moved", [None, True])
@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_model_that_is_incomplete_in_the_cache_is_downloaded(
  cache, monkeypatch, tmp_path, missing, moved
):
  files = {"config.json", "model.safetensors", "tokenizer.json"}
  snapshot = put(cache, RELEASED[0], files - {missing})
  asked, folder = [], moved and tmp_path / "hub"
  if moved:
    monkeypatch.setenv("VCF_CACHE_DIR", str(tmp_path))

  def fetch(repository, *, allow_patterns, ignore_patterns, cache_dir, local_files_only=False):
    assert cache_dir == folder
    asked.append((repository, local_files_only, allow_patterns))
    if not local_files_only:
      (snapshot / missing).touch()
    return str(snapshot)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  assert checkpoint_directory(RELEASED[0]) == snapshot
  (_, first_is_local, _), (repository, is_local, patterns) = asked
  assert first_is_local and not is_local and repository == RELEASED[0]
  assert not [p for p in patterns if p in ("*", "*.*") or p.endswith((".py", ".bin", ".pt"))]


@pytest.mark.parametrize(
  "files, reason",
  [((), "could not be downloaded ("), (("config.json", "merges.txt"), "are missing in ")],
)
def test_a_failed_download_is_reported_in_one_line(cache, files, reason):
  if files:
    put(cache, RELEASED[0], files)
  with pytest.raises(InputError) as caught:
    checkpoint_directory(RELEASED[0])
  message = str(caught.value)
  assert message.startswith(RELEASED[0]) and reason in message
  assert message.endswith("give the directory of a copy") and "\n" not in message
