"""A run's checkpoint opens as any other: exported, loaded to chat, and begun from."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from flax import nnx

from tests.checkpoints.small_checkpoints import assert_refused, make_model, stored_bytes
from tests.conftest import assert_close
from videochat_flash_jax.checkpoints.convert import (
  flat_weights,
  load_model,
  open_checkpoint,
  write_checkpoint,
)
from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint
from videochat_flash_jax.checkpoints.runs.adapters import merge_adapters
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.models.config import LoraConfig
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.testing.dummy import dummy_config, dummy_model, write_dummy_checkpoint
from videochat_flash_jax.train.lora import add_adapters
from videochat_flash_jax.train.step import split_state

LORA = LoraConfig(rank=2, alpha=5.0)
IDS = jnp.arange(5, 25)[None]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  """A checkpoint directory in the released layout: what runs begin from."""
  return write_dummy_checkpoint(tmp_path_factory.mktemp("hub") / "dummy")


def train_nothing(hub, workdir, lora=None, seeds=(0,)):
  """A run whose checkpoint of step s + 1 has a decoder of seed s, all else of the first of them.

  Gives the last weights.
  """
  shutil.copytree(hub, workdir / "hub", ignore=lambda *_: ["model.safetensors"])
  config = {"config": {"lora": dataclasses.asdict(lora or LoraConfig(rank=0))}}
  frozen = None
  with RunCheckpoints(workdir / "checkpoints") as checkpoints:
    for seed in seeds:
      model = dummy_model(seed=seed)
      if lora is not None:
        add_adapters(model, lora, nnx.Rngs(1))
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
          if path[-1] == "lora_b":
            leaf.set_value(jax.random.normal(jax.random.key(2), leaf.shape))
        nnx.update(model, nnx.state(model))
      _, state = split_state(model, lambda path: "decoder" in path, optax.adamw(1e-3))
      frozen = frozen or state.frozen
      checkpoints.save(seed + 1, state._replace(frozen=frozen), {"streams": {}}, config)
  leaves = jax.tree.leaves_with_path(state.trained | frozen)
  return {dotted_path(path): np.asarray(leaf) for path, leaf in leaves}


def weights_of(model):
  return {path: np.asarray(w) for path, w in flat_weights(nnx.state(model))}


def assert_equal(actual, expected):
  assert actual.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(actual[path], array, err_msg=path)


def test_the_newest_checkpoint_of_a_run_loads_and_so_does_any_other(hub, tmp_path):
  newest = train_nothing(hub, tmp_path / "run", seeds=(0, 1))
  assert_equal(weights_of(load_model(make_model, tmp_path / "run")), newest)
  assert_equal(weights_of(load_model(make_model, tmp_path / "run" / "checkpoints" / "2")), newest)
  first = load_model(make_model, tmp_path / "run" / "checkpoints" / "1")
  assert_equal(weights_of(first), weights_of(dummy_model(seed=0)))
  assert open_checkpoint(tmp_path / "run").config == dataclasses.replace(dummy_config(), name="run")


# The path of a run, and that of another run which a library might read in its place.
@pytest.mark.parametrize(
  "name, other",
  [
    ("what?", "what"),
    ("c%20d", "c d"),
    ("run [1]", "run 1"),
    ("caf\udce9", "caf"),
    *(
      pytest.param(*names, marks=pytest.mark.slow)
      for names in (
        ("a#b", "a"),
        ("wh?t", "what"),
        ("e%2Ff", "e/f"),
        ("g|h", "g"),
        ("*", "run"),
        ("i\\j", "i/j"),
        ("{k,l}", "k"),
        ("file:m", "m"),
        ("n::o", "o"),
        ("Läufe 视频 ~", "run"),
        ("p\nq", "p"),
        ("ends with #", "ends with "),
      )
    ),
  ],
)
def test_a_run_is_read_from_its_own_path_whatever_its_letters(hub, tmp_path, name, other):
  for path, seed in ((other, 1), (name, 0)):
    train_nothing(hub, tmp_path / path, seeds=(seed,))
    (tmp_path / path / "checkpoints" / str(seed + 1)).rename(tmp_path / path / "checkpoints" / "7")
  expected, run = weights_of(dummy_model(seed=0)), tmp_path / name
  assert_equal(weights_of(load_model(make_model, run)), expected)
  assert_equal(weights_of(load_model(make_model, run / "checkpoints" / "7")), expected)
  out = tmp_path / f"{name} out"
  write_checkpoint(open_checkpoint(run), make_model, out)
  assert_equal(weights_of(load_model(make_model, out)), expected)


def test_convert_exports_a_run_to_what_it_began_from(hub, tmp_path, capsys):
  train_nothing(hub, tmp_path / "run")
  assert main(["convert", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
  assert "tensors" in capsys.readouterr().out
  assert stored_bytes(tmp_path / "out") == stored_bytes(hub)
  exported, begun = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", hub))
  assert exported == begun
  assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in hub.iterdir()}


def test_a_run_answers_as_its_export_does(hub, tmp_path):
  train_nothing(hub, tmp_path / "run")
  picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
  answers = [
    VideoChat.from_pretrained(name).look(picture).ask("What is it?", max_new_tokens=5)
    for name in (tmp_path / "run", hub)
  ]
  assert answers[0] == answers[1]


def test_adapters_are_merged_before_weights_are_made_int8(hub, tmp_path):
  train_nothing(hub, tmp_path / "run", LORA)
  write_checkpoint(open_checkpoint(tmp_path / "run"), make_model, tmp_path / "merged")
  of_run, of_export = (
    weights_of(load_model(make_model, tmp_path / name, weights="int8"))
    for name in ("run", "merged")
  )
  assert_equal(of_run, of_export)
  assert of_run["decoder.layers.stacked.up_proj.kernel.qvalue"].dtype == np.int8


def test_adapters_are_merged_on_the_way_out(hub, tmp_path):
  weights = train_nothing(hub, tmp_path / "run", LORA)
  assert len(weights) == 8 + len(weights_of(dummy_model()))
  expected = merge_adapters(weights, LORA)
  assert_equal(weights_of(load_model(make_model, tmp_path / "run")), expected)
  write_checkpoint(open_checkpoint(tmp_path / "run"), make_model, tmp_path / "out")
  exported = load_model(make_model, tmp_path / "out")
  adapted = dummy_model()
  add_adapters(adapted, LORA, nnx.Rngs(1))
  graph, state = nnx.split(adapted, nnx.Param)
  filled = [
    (path, leaf.replace(jnp.asarray(weights[dotted_path(path)])))
    for path, leaf in nnx.to_flat_state(state)
  ]
  adapted = nnx.merge(graph, nnx.from_flat_state(filled))
  models = adapted, exported, dummy_model()
  logits = [m.decoder.logits(m.decoder(m.decoder.embed(IDS))) for m in models]
  assert_close(logits[1], logits[0], absolute=1e-4)
  assert np.abs(logits[0] - logits[2]).max() > 0.1


def test_stacks_are_stored_layer_by_layer(hub, tmp_path):
  train_nothing(hub, tmp_path / "run")
  name = "trained.decoder.layers.stacked.up_proj.kernel"
  kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/run/checkpoints/1/state/"}
  spec = {"driver": "zarr", "kvstore": kvstore | {"path": f"{name}/"}}
  stored = tensorstore.open(spec, open=True, read=True).result()
  assert stored.chunk_layout.read_chunk.shape == (1, *stored.shape[1:])


def test_heads_and_moments_of_the_optimizer_are_left_where_they_are(hub, tmp_path):
  train_nothing(hub, tmp_path / "run")
  checkpoint = open_checkpoint(tmp_path / "run")
  assert isinstance(checkpoint, Checkpoint)
  assert checkpoint.tensors.keys() == open_checkpoint(hub).tensors.keys()


def test_a_checkpoint_is_not_read_without_the_frozen_weights_of_its_run(hub, tmp_path):
  for name in ("run", "other"):
    train_nothing(hub, tmp_path / name)
  step, frozen = (tmp_path / "run" / "checkpoints" / name for name in ("1", "frozen"))
  shutil.copytree(step, tmp_path / "copy")
  assert_refused(tmp_path / "copy", f"{tmp_path}/copy", str(tmp_path / "frozen"), "missing", "copy")
  frozen.rename(tmp_path / "frozen")
  assert_refused(tmp_path / "run", str(frozen), "missing", "copy that directory")
  shutil.copytree(tmp_path / "other" / "checkpoints" / "frozen", frozen)
  assert_refused(step, str(frozen), "of another run")
  shutil.rmtree(frozen)
  (tmp_path / "frozen").rename(frozen)
  for path in (frozen / "state").rglob("d/*"):
    path.unlink()
  assert_refused(tmp_path / "run", str(frozen), "damaged", "a copy of them")


def test_a_run_without_a_whole_checkpoint_is_not_called_damaged(hub, tmp_path):
  run = tmp_path / "run"
  train_nothing(hub, run)
  for path in (run / "checkpoints" / "1" / "state").rglob("d/*"):
    path.unlink()
  assert_refused(run, str(run / "checkpoints" / "1"), "damaged", "an earlier one")
  shutil.rmtree(run / "checkpoints" / "1" / "run")
  assert_refused(run, str(run), "no whole checkpoint yet")
