"""What goes along with a checkpoint through export, runs and downloads, and what stays behind."""

import errno
import os
import shutil

import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

from tests.checkpoints.small_checkpoints import make_model, random_model, rewrite
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import (
  load_model,
  open_checkpoint,
  save_model,
  write_checkpoint,
)
from videochat_flash_jax.checkpoints.hub import other_files
from videochat_flash_jax.checkpoints.hub.other_files import (
  DOWNLOADED,
  NEVER_DOWNLOADED,
  copy_other_files,
)
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train.initial_weights import copy_hub_files

ALONG = {
  # Of the tokenizer.
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "qwen.tiktoken"),
  *("chat_template.jinja", "chat_template.json", "tekken.json"),
  *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
  # Configs of other parts.
  *("generation_config.json", "processor_config.json", "preprocessor_config.json"),
  "video_preprocessor_config.json",
  # Papers.
  *("README.md", "LICENSE", "License.txt", "LICENCE.md", "NOTICE", "USE_POLICY.md", "COPYING"),
  *("MODEL_LICENSE", "Tongyi Qianwen LICENSE AGREEMENT", "COPYRIGHT", "THIRD_PARTY_NOTICES.txt"),
  *("Acceptable_Use.pdf", "TERMS.txt"),
}
CODE = {"modeling_videochat_flash.py", "license.py"}
BEHIND = {
  # Weights of other programs and of before; their indices; adapters.
  *("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.gguf", "flax_model.msgpack"),
  *("tf_model.h5", "model.onnx", "mm_projector.bin", "consolidated.00.pth"),
  *("pytorch_model.bin.index.json", "flax_model.msgpack.index.json", "adapter_config.json"),
  "adapter_model.safetensors",
  # The state of a training.
  *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
  *("events.out.tfevents.1", "train_log.txt"),
  # All else.
  *(".gitattributes", ".cache/x.jinja", "notes.txt", "figure.png", "annotations.csv"),
  *("data/0.json", "onnx/model.onnx", "checkpoint-500/tokenizer.json"),
}


def fill(directory):
  for name in (*ALONG, *CODE, *BEHIND):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(f"content of {name}")


def assert_along(directory, weights=("model.safetensors",)):
  found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
  assert found == ALONG | CODE | {"config.json", *weights}
  for name in ALONG | CODE:
    assert (directory / name).read_text() == f"content of {name}"


def test_all_files_but_weights_go_along_through_an_export(checkpoint, tmp_path):
  fill(checkpoint)
  rewrite(checkpoint, tmp_path / "out")
  assert_along(tmp_path / "out")
  rewrite(tmp_path / "out", tmp_path / "again", "bfloat16")
  assert_along(tmp_path / "again")
  for _ in range(2):  # the second replaces the first
    save_model(load_model(make_model, checkpoint), CONFIG, tmp_path / "saved", source=checkpoint)
    assert_along(tmp_path / "saved")


def test_all_files_but_weights_go_along_through_runs(checkpoint, tmp_path):
  fill(checkpoint)
  source = checkpoint
  for run in (tmp_path / "first", tmp_path / "second"):
    copy_hub_files(str(source), CONFIG, run / "hub")
    assert_along(run / "hub", weights=())
    state = {"trained": nnx.to_pure_dict(nnx.state(random_model())), "frozen": {}}
    with RunCheckpoints(run / "checkpoints") as checkpoints:
      checkpoints.save(1, state, {}, {"config": {"lora": {"rank": 0}}})
    source = run
  write_checkpoint(open_checkpoint(source), make_model, tmp_path / "out")
  assert_along(tmp_path / "out")


def test_all_files_but_code_and_pickles_are_downloaded():
  files = [*ALONG, *CODE, *BEHIND, "license.pkl"]
  patterns = {"allow_patterns": DOWNLOADED, "ignore_patterns": NEVER_DOWNLOADED}
  downloaded = set(filter_repo_objects(files, **patterns))
  assert downloaded >= ALONG and not downloaded & CODE
  pickles = {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
  assert len(pickles) == 8 and not downloaded & pickles


def test_links_of_the_hubs_cache_are_followed(tmp_path):
  blobs, snapshot, out = (tmp_path / name for name in ("blobs", "snapshots", "out"))
  for folder in (blobs, snapshot, out):
    folder.mkdir()
  (blobs / "1").write_text("a template")
  (snapshot / "chat_template.jinja").symlink_to("../blobs/1")
  copy_other_files(snapshot, out)
  shutil.rmtree(snapshot)
  assert (out / "chat_template.jinja").read_text() == "a template"


def test_a_link_to_nothing_is_an_error_that_names_it(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  source.mkdir()
  out.mkdir()
  (source / "vocab.json").symlink_to(tmp_path / "gone")
  with pytest.raises(InputError) as caught:
    copy_other_files(source, out)
  assert str(caught.value).startswith(f"{source / 'vocab.json'}: cannot be read (No such file")


def test_a_full_disk_is_not_taken_for_a_file_that_cannot_be_read(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  (tmp_path / "vocab.json").touch()
  monkeypatch.setattr(other_files.shutil, "copyfile", full)
  with pytest.raises(OSError, match="No space") as caught:
    copy_other_files(tmp_path, tmp_path)
  assert not isinstance(caught.value, InputError)
