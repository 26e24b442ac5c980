"""Checkpoints out: byte for byte, whole or not at all."""

import dataclasses
import errno
import functools
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints.small_checkpoints import (
  assert_refused,
  assert_same_weights,
  contents,
  edit_weights,
  make_model,
  random_model,
  rewrite,
  shard,
  stored_bytes,
)
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints import convert
from videochat_flash_jax.checkpoints.convert import load_model, save_model
from videochat_flash_jax.checkpoints.hub.safetensors_files import write_directory
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.reading import Prompt


def greedy_tokens(model):
  """What a model writes after two clips of noise and a few words."""
  engine = Engine(model, stop_ids=[])
  size = CONFIG.vision.image_size
  clips = np.random.default_rng(0).integers(0, 256, (2, 4, size, size, 3), dtype=np.uint8)
  visual_tokens = engine.encode(clips)
  visual_index = np.r_[-1, np.arange(len(visual_tokens)), -1, -1].astype(np.int32)
  token_ids = np.arange(len(visual_index), dtype=np.int32) % CONFIG.decoder.vocab_size
  return engine.generate([Prompt(token_ids, visual_index, visual_tokens)], 32)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_a_model_writes_the_same_tokens_after_going_in_and_out(tmp_path, dtype):
  save_model(random_model(dtype=dtype), CONFIG, tmp_path / "small")
  rewrite(tmp_path / "small", tmp_path / "out")
  before, after = (
    greedy_tokens(load_model(make_model, tmp_path / name, dtype)) for name in ("small", "out")
  )
  assert before == after
  assert len(set(before[0])) > 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_in_and_out_and_in_again_keeps_every_byte(tmp_path, dtype):
  model = random_model(dtype=dtype)
  save_model(model, CONFIG, tmp_path / "small")
  shard(tmp_path / "small")
  num_bytes = rewrite(tmp_path / "small", tmp_path / "out")
  before, after = stored_bytes(tmp_path / "small"), stored_bytes(tmp_path / "out")
  assert before == after
  assert num_bytes == sum(len(content) for _, _, content in after.values())
  assert_same_weights(load_model(make_model, tmp_path / "out", dtype), model)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config == json.loads((tmp_path / "small" / "config.json").read_text())


def test_another_dtype_is_written_as_the_arrays_would_be_in_it(checkpoint, tmp_path):
  rewrite(checkpoint, tmp_path / "out", "bfloat16")
  expected = {
    name: (np.dtype(jnp.bfloat16), shape, np.frombuffer(data, dtype).astype(jnp.bfloat16).tobytes())
    for name, (dtype, shape, data) in stored_bytes(checkpoint).items()
  }
  assert stored_bytes(tmp_path / "out") == expected
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_dtype_that_transformers_5_states_is_written_as_before(checkpoint, tmp_path):
  fields = json.loads((checkpoint / "config.json").read_text())
  fields["dtype"] = fields.pop("torch_dtype")
  (checkpoint / "config.json").write_text(json.dumps(fields))
  for dtype in (None, "bfloat16"):
    rewrite(checkpoint, tmp_path / f"as {dtype}", dtype)
    written = json.loads((tmp_path / f"as {dtype}" / "config.json").read_text())
    assert written.pop("torch_dtype") == (dtype or "float32") and "dtype" not in written


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "half", 3])
def test_a_dtype_that_no_weight_has_is_refused(checkpoint, tmp_path, dtype):
  out = tmp_path / "out"
  assert_refused(checkpoint, f"dtype is {dtype!r}", load=lambda path: rewrite(path, out, dtype))
  assert not out.exists()


def test_a_stored_head_is_noted_in_the_config(checkpoint, tmp_path):
  fields = json.loads((checkpoint / "config.json").read_text())
  (checkpoint / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
  rewrite(checkpoint, tmp_path / "out")
  assert stored_bytes(tmp_path / "out") == stored_bytes(checkpoint)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == fields


def test_dtypes_that_differ_stay_as_they_are(checkpoint, tmp_path):
  def edit(tensors):
    odd = tensors["model.norm.weight"][:, None].astype(jnp.bfloat16)
    tensors["model.norm.weight"] = odd[:, 0]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)

  edit_weights(checkpoint, edit)
  rewrite(checkpoint, tmp_path / "out")
  assert stored_bytes(tmp_path / "out") == stored_bytes(checkpoint)


def test_what_does_not_fit_one_file_is_cut_into_shards_with_an_index(
  checkpoint, tmp_path, monkeypatch
):
  most = 20_000
  cut = functools.partial(write_directory, shard_bytes=most)
  monkeypatch.setattr(convert, "write_directory", cut)
  rewrite(checkpoint, tmp_path / "out")
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  shards = sorted((tmp_path / "out").glob("*.safetensors"))
  assert [path.name for path in shards] == [
    f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
  ]
  assert len(shards) > 2
  sizes = []
  for path in shards:
    tensors = load_file(path)
    assert {index["weight_map"][name] for name in tensors} == {path.name}
    sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
  assert max(sizes) <= most
  assert sum(sizes) == index["metadata"]["total_size"]
  assert stored_bytes(tmp_path / "out") == stored_bytes(checkpoint)
  assert_same_weights(load_model(make_model, tmp_path / "out"), random_model())


def test_tokenizer_code_and_unknown_fields_go_along_and_nothing_else(checkpoint, tmp_path):
  config = json.loads((checkpoint / "config.json").read_text()) | {"mm_vision_tower_lr": 2e-6}
  (checkpoint / "config.json").write_text(json.dumps(config))
  for name in ("tokenizer.model", "merges.txt", "modeling_videochat_flash.py", "notes.txt"):
    (checkpoint / name).write_text(name)
  along = {"tokenizer.model", "merges.txt", "modeling_videochat_flash.py"}
  rewrite(checkpoint, tmp_path / "out")
  save_model(load_model(make_model, checkpoint), CONFIG, tmp_path / "saved", source=checkpoint)
  for out in (tmp_path / "out", tmp_path / "saved"):
    assert {path.name for path in out.iterdir()} == along | {"config.json", "model.safetensors"}
    assert {(out / name).read_text() for name in along} == along
    assert json.loads((out / "config.json").read_text()) == config


def test_an_out_that_exists_or_is_inside_the_source_is_refused(checkpoint):
  out = checkpoint.with_name("out")
  out.mkdir()
  (out / "mine").touch()
  assert_refused(checkpoint, f"{out}: exists already", load=lambda path: rewrite(path, out))
  assert [path.name for path in out.iterdir()] == ["mine"]
  link = out.with_name("link")
  link.symlink_to("nowhere")
  assert_refused(checkpoint, f"{link}: exists already", load=lambda path: rewrite(path, link))
  assert_refused(
    checkpoint, "inside the checkpoint", load=lambda path: rewrite(path, path / "deep" / "out")
  )


@pytest.fixture
def full_disk():
  """No file may grow beyond 20,000 bytes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["new", "small"])
def test_a_full_disk_leaves_what_was_there(checkpoint, tmp_path, full_disk, name):
  before = contents(tmp_path)
  other = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, min_frames=8))
  with pytest.raises(InputError, match=f"{name}: cannot be written .*; nothing has changed there"):
    save_model(random_model(), other, tmp_path / name)
  assert contents(tmp_path) == before
  with pytest.raises(InputError, match="out: cannot be written"):
    rewrite(checkpoint, tmp_path / "out")
  assert contents(tmp_path) == before
  assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_a_disk_that_is_full_for_the_last_file_leaves_what_was_there(
  checkpoint, tmp_path, monkeypatch
):
  def fill_the_disk(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")

  before = contents(tmp_path)
  monkeypatch.setattr(convert, "write_config", fill_the_disk)
  with pytest.raises(InputError, match=r"small: cannot be written \(No space left on device\)"):
    save_model(random_model(), CONFIG, checkpoint)
  assert contents(tmp_path) == before


def test_a_fault_leaves_what_was_there_and_keeps_its_traceback(checkpoint, tmp_path, monkeypatch):
  before = contents(tmp_path)
  monkeypatch.setattr(convert, "write_config", lambda *args, **options: 1 / 0)
  for write in (
    lambda: save_model(random_model(), CONFIG, checkpoint),
    lambda: rewrite(checkpoint, tmp_path / "out"),
  ):
    with pytest.raises(ZeroDivisionError):
      write()
    assert contents(tmp_path) == before


def test_weights_of_an_earlier_save_do_not_count_any_more(checkpoint):
  (checkpoint / "notes.txt").touch()
  shard(checkpoint)
  save_model(random_model(), CONFIG, checkpoint)
  names = {path.name for path in checkpoint.iterdir()}
  assert names == {"config.json", "model.safetensors", "notes.txt"}


@pytest.mark.parametrize(
  "place, reason", [("file/out", "Not a directory"), ("a" * 300, "File name too long")]
)
def test_a_place_that_cannot_be_written_is_refused(checkpoint, tmp_path, place, reason):
  (tmp_path / "file").touch()
  words = f"cannot be written ({reason})"
  assert_refused(checkpoint, words, load=lambda path: rewrite(path, tmp_path / place))
