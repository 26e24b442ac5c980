"""The loop over runs: what it refuses before anything is computed, and when it stops."""

import dataclasses
import errno
import itertools
import json
import logging
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from tests.checkpoints.small_checkpoints import with_far_token
from tests.train import small_config
from tests.train.small_runs import losses, records
from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import loop, run
from videochat_flash_jax.train.batches import run_batches
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.objectives import OBJECTIVES
from videochat_flash_jax.train.program import train_program


def small(**changes):
  config = small_config.get_config()
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


def as_if_begun(workdir, config):
  """Writes what a run leaves: its config, and what a whole checkpoint is known by."""
  for name in ("state/manifest.ocdbt", "data/metadata", "run/metadata"):
    path = workdir / "checkpoints" / "2" / name
    path.parent.mkdir(parents=True)
    path.touch()
  plain = json.loads(config.to_json_best_effort())
  (workdir / "config.json").write_text(json.dumps({"version": "0", "config": plain}))


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"init_from": ""}, r"config\.init_from is missing: give a model on the hub"),
    ({"init_from": "nowhere"}, "'nowhere': no such model or directory"),
    ({"num_steps": 0}, r"config\.num_steps is 0: give a positive integer"),
    ({"clips_per_shard": 0}, r"config\.clips_per_shard is 0"),
    ({"rows": 1, "accumulate": 2}, r"config\.accumulate is 2"),
    ({"mesh.sequence": 3}, r"mesh: .* do not multiply to the 1 devices"),
    ({"data.features": "somewhere"}, r"config\.data\.features is 'somewhere'"),
  ],
)
def test_a_config_that_cannot_be_trained_is_refused_in_one_line(tmp_path, changes, said):
  with pytest.raises(InputError, match=said) as error:
    loop.train(small(**changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tokenizer_with_ids_that_the_model_does_not_embed_is_refused(tmp_path):
  model, said = str(with_far_token(tmp_path / "far")), "highest id of the tokenizer is 768, but"
  with pytest.raises(InputError, match=f"{model}: the {said}"):
    loop.train(small(init_from=model), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  shutil.copytree(model, tmp_path / "run" / "hub")
  settings = train_settings(small())
  program = train_program(settings, jax.devices())
  with pytest.raises(InputError, match=said):
    run_batches(settings, program, tmp_path / "run" / "hub")


@pytest.mark.slow
def test_a_run_that_reads_no_text_takes_any_tokenizer(tmp_path):
  model = str(with_far_token(tmp_path / "far"))
  assert loop.train(small(init_from=model, objective="patches", num_steps=1), tmp_path / "run")


def test_the_address_of_a_bucket_is_refused_as_a_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = r"--workdir gs://bucket/run is not a directory: .* Filestore, .* Cloud Storage FUSE$"
  with pytest.raises(InputError, match=said):
    loop.train(small(), Path("gs://bucket/run"))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "changes, said",
  [
    ({"mesh.data": 2}, r"do not multiply to the 1 devices"),
    ({"data.mixture": "gone.yaml"}, r"data\.mixture is 'gone.yaml'"),
    ({"data.mixture": "bare.yaml"}, r"none\.json: cannot be read"),
    ({"init_from": "nowhere"}, r"'nowhere': no such model or directory"),
  ],
)
def test_an_error_in_a_later_stage_is_found_before_the_first_starts(
  tmp_path, monkeypatch, changes, said
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "bare.yaml").write_text("datasets: [{json_path: none.json}]")
  stages = {"first": small(), "second": small(**changes)}
  if "data.mixture" in changes:
    stages["second"].data.synthetic = ConfigDict()
  with pytest.raises(InputError, match=said):
    loop.train(ConfigDict({"stages": stages}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["data.mixture", "eval.mixture"])
def test_a_missing_mixture_file_is_refused(tmp_path, field):
  config = small()
  config.data.synthetic = type(config)()
  (tmp_path / "rows.json").write_text("[]")
  config.data.mixture = str(tmp_path / "rows.json")
  config.update_from_flattened_dict({field: str(tmp_path / "gone.yaml")})
  with pytest.raises(
    InputError, match=rf"config\.{field} is .*gone\.yaml.*: give a file that exists"
  ):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_without_data_is_refused(tmp_path):
  config = small()
  config.data.synthetic = type(config)()
  with pytest.raises(InputError, match=r"config\.data\.mixture is missing: give a file"):
    loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(
  "field, value, said",
  [
    ("seed", 4, "config.seed 0, now it is 4; give 0, or another --workdir"),
    ("optimizer.warm_up", 0.5, "config.optimizer.warm_up 0.0, now it is 0.5"),
    ("num_steps", 31, "config.num_steps 30, now it is 31"),
    ("data.frames", (4, 8), r"config.data.frames \[4, 4\], now it is \[4, 8\]"),
  ],
)
def test_the_directory_of_another_run_is_refused(tmp_path, field, value, said):
  as_if_begun(tmp_path, small())
  config = small()
  config.update_from_flattened_dict({field: value})
  with pytest.raises(InputError, match=said):
    loop.train(config, tmp_path)


def test_a_directory_with_a_damaged_config_is_refused(tmp_path):
  as_if_begun(tmp_path, small())
  (tmp_path / "config.json").write_text('{"config"')
  with pytest.raises(
    InputError, match=r"config\.json: not written by a run of this package, or damaged"
  ):
    loop.train(small(), tmp_path)


def test_a_run_may_resume_with_changes_that_do_not_affect_its_numbers(tmp_path):
  as_if_begun(tmp_path, small())
  config = small(log_every=7, checkpoint__every=9, data__workers=2, mesh__data=2, remat="full")
  config.update_from_flattened_dict({"data.mixture": "moved.yaml", "data.features": "elsewhere"})
  config.update_from_flattened_dict({"mesh.sequence": 2, "zigzag": False, "clips_per_shard": 7})
  loop.check_config(tmp_path, json.loads(config.to_json_best_effort()))


def test_a_run_on_patches_cannot_resume_with_another_number_of_clips(tmp_path):
  as_if_begun(tmp_path, small(objective="patches"))
  config = small(objective="patches", clips_per_shard=7)
  with pytest.raises(InputError, match=r"config\.clips_per_shard 1, now it is 7"):
    loop.check_config(tmp_path, json.loads(config.to_json_best_effort()))


THREE_STEPS = {"num_steps": 3, "rows": 2, "checkpoint__every": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  return loop.train(small(**THREE_STEPS), tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_a_run_resumes_with_another_learning_rate_and_with_accumulation(
  undisturbed, tmp_path, caplog
):
  shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  config = small(**THREE_STEPS, accumulate=2, init_from="gone", optimizer__clip_norm=0.5)
  config.optimizer.learning_rate = 5e-4
  with caplog.at_level(logging.INFO, "videochat_flash_jax"):
    assert loop.train(config, tmp_path) == tmp_path
  said = [record.getMessage() for record in caplog.records]
  assert "config.optimizer.learning_rate was 0.001, now 0.0005" in said
  assert "config.accumulate was 1, now 2" in said
  saved = json.loads((tmp_path / "config.json").read_text())["config"]
  assert saved["optimizer"]["clip_norm"] == 0.5 and saved["init_from"] == "gone"
  np.testing.assert_allclose(losses(tmp_path), losses(undisturbed), rtol=1e-5)
  before, after = (
    [r["learning_rate"] for r in records(run) if "loss" in r] for run in (undisturbed, tmp_path)
  )
  assert after == pytest.approx([*before[:2], before[2] / 2])


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_one_line_and_the_same_command_resumes_it(
  undisturbed, tmp_path, monkeypatch
):
  save = ocp.CheckpointManager.save

  def fill(self, step, *args, **kwargs):
    if step == 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    return save(self, step, *args, **kwargs)

  with monkeypatch.context() as full:
    full.setattr(ocp.CheckpointManager, "save", fill)
    with pytest.raises(InputError) as caught:
      loop.train(small(**THREE_STEPS), tmp_path)
  said = str(caught.value)
  assert "the checkpoint of step 2 could not be written (No space left on device)" in said
  assert "the newest whole one is 1: make room" in said and "\n" not in said
  assert loop.train(small(**THREE_STEPS), tmp_path) == tmp_path
  assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_its_examples_are_written(tmp_path):
  config = small(optimizer__learning_rate=1e30, optimizer__max_skipped=0, checkpoint__every=1)
  with pytest.raises(InputError, match=r"the loss of step (\d+) is (nan|inf)") as error:
    loop.train(config, tmp_path)
  (path,) = tmp_path.glob("nan_step_*.json")
  report, step = json.loads(path.read_text()), int(path.stem.removeprefix("nan_step_"))
  assert f"of step {step} is" in str(error.value) and path.name in str(error.value)
  assert f"the newest checkpoint is of step {step - 1}:" in str(error.value)
  assert "lower config.optimizer.learning_rate" in str(error.value) and "\n" not in str(error.value)
  assert report["step"] == step and not math.isfinite(float(report["metrics"]["loss"]))
  (row,) = report["rows"]
  assert row and all("of the synthetic world" in name for name in row)
  assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} <= set(range(1, step))
  assert max(record["step"] for record in records(tmp_path)) == step - 1


@pytest.fixture
def poisoned(monkeypatch):
  """Makes the loss of some steps not a number."""

  def poison(steps):
    objective, counted = OBJECTIVES["answers"], itertools.count(1)
    loss, next_batch = objective.loss, run._Steps._next_batch

    def poisoned_loss(model, batch, layout):
      sums, is_poisoned = loss(model, batch, layout=layout), (batch["positions"] < 0).any()
      return sums._replace(loss=sums.loss * jnp.where(is_poisoned, jnp.nan, 1.0))

    def poisoned_batch(self):
      batch = next_batch(self)
      if next(counted) in steps:
        positions = batch["positions"]
        batch = batch | {"positions": jax.device_put(-1 - positions, positions.sharding)}
      return batch

    monkeypatch.setitem(OBJECTIVES, "answers", dataclasses.replace(objective, loss=poisoned_loss))
    monkeypatch.setattr(run._Steps, "_next_batch", poisoned_batch)

  return poison


def test_a_few_steps_that_are_not_finite_change_nothing_and_are_logged(
  tmp_path, poisoned, caplog, monkeypatch
):
  poisoned({3, 4})
  save, states = RunCheckpoints.save, []

  def kept(self, step, state, *args):
    states.append([np.asarray(x) for x in jax.tree.leaves((state.trained, state.optimizer))])
    return save(self, step, state, *args)

  monkeypatch.setattr(RunCheckpoints, "save", kept)
  with caplog.at_level(logging.WARNING):
    assert loop.train(small(num_steps=6, log_every=2, checkpoint__every=1), tmp_path) == tmp_path
  changes = [
    sum(not np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    for before, after in itertools.pairwise(states)
  ]
  assert changes[1] == changes[2] == 0
  assert changes[0] == changes[3] == changes[4] == len(states[0])
  skipped = [record for record in records(tmp_path) if record.get("event") == "skipped"]
  assert [(r["step"], r["skipped_loss"], r["examples"]) for r in skipped] == [
    (3, "nan", "nan_step_3.json"), (4, "nan", "nan_step_4.json"),
  ]  # fmt: skip
  lines = {r["step"]: r for r in records(tmp_path) if "seconds_per_step" in r}
  assert [lines[step].get("skipped") for step in (2, 4, 6)] == [None, 2, None]
  assert "loss" not in lines[4] and np.isfinite([lines[2]["loss"], lines[6]["loss"]]).all()
  (row,) = json.loads((tmp_path / "nan_step_3.json").read_text())["rows"]
  assert row and all("of the synthetic world" in name for name in row)
  said = [message for message in caplog.messages if "changes nothing" in message]
  assert "the loss of step 4 is nan" in said[1] and "number 2 of at most 3" in said[1]


@pytest.mark.slow
def test_one_such_step_too_many_in_a_row_stops_the_run(tmp_path, poisoned):
  poisoned({2, *range(4, 9)})
  config = small(num_steps=9, optimizer__max_skipped=2, checkpoint__every=1)
  with pytest.raises(InputError, match=r"the loss of step 6 is nan") as error:
    loop.train(config, tmp_path)
  assert "number 3 of such steps in a row, the losses before it are nan, nan" in str(error.value)
  assert "nan_step_6.json" in str(error.value) and "\n" not in str(error.value)
  files = {path.name for path in tmp_path.glob("nan_step_*")}
  assert files == {f"nan_step_{step}.json" for step in (2, 4, 5, 6)}


@pytest.mark.slow
def test_a_step_copies_nothing_from_the_host(tmp_path, monkeypatch):
  step = run._Steps._next_batch
  on_host = lambda self: jax.tree.map(np.asarray, step(self))  # noqa: E731
  monkeypatch.setattr(run._Steps, "_next_batch", on_host)
  with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    loop.train(small(num_steps=1), tmp_path)


@pytest.mark.slow
def test_frozen_weights_do_not_change_by_a_bit(tmp_path, monkeypatch):
  """Neither on the devices nor on disk, where they are written only once."""
  held, save = [], RunCheckpoints.save

  def keep(self, step, state, *rest):
    held.append(jax.tree.map(np.array, state))
    save(self, step, state, *rest)

  monkeypatch.setattr(RunCheckpoints, "save", keep)
  config = small(num_steps=3, checkpoint__every=1)
  config.optimizer.scales = (("connector", 1.0), ("", 0.0))
  loop.train(config, tmp_path)
  first, *_, last = held
  assert set(first.frozen) == {"vision", "decoder"} and set(first.trained) == {"connector"}
  jax.tree.map(np.testing.assert_array_equal, first.frozen, last.frozen)
  with pytest.raises(AssertionError):
    jax.tree.map(np.testing.assert_array_equal, first.trained, last.trained)
  first, last = (weights(tmp_path / "checkpoints" / step) for step in ("1", "3"))
  changed = {name for name in first if not np.array_equal(first[name], last[name])}
  assert changed == {name for name in first if "mm_projector" in name}


def weights(directory):
  tensors = open_checkpoint(directory).tensors
  return {name: np.concatenate(list(tensor.blocks())) for name, tensor in tensors.items()}


@pytest.mark.slow
def test_a_stage_starts_with_the_last_weights_of_the_one_before_and_finished_ones_are_skipped(
  tmp_path, caplog
):
  stages = {"first": small(num_steps=2), "second": small(num_steps=2)}
  second = stages["second"]
  with second.ignore_type():
    second.init_from = None
  second.optimizer.learning_rate = 1e-30
  config = type(second)({"stages": stages})
  assert loop.train(config, tmp_path) == tmp_path / "second"
  first, last = (weights(tmp_path / name) for name in stages)
  assert all(np.array_equal(first[name], last[name]) for name in first)
  with caplog.at_level(logging.INFO, "videochat_flash_jax"):
    assert loop.train(config, tmp_path) == tmp_path / "second"
  assert [r.getMessage() for r in caplog.records if "finished already" in r.getMessage()] == [
    f"{tmp_path / name}: is finished already" for name in stages
  ]


def test_a_stage_whose_directory_is_called_like_a_model_is_not_taken_for_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = ConfigDict({"stages": {"tiny": small(num_steps=2), "wide": small(num_steps=2)}})
  as_if_begun(tmp_path / "tiny", config.stages["tiny"])
  monkeypatch.setattr(loop, "prepare", lambda *_: None)
  second = config.stages["wide"]
  with second.ignore_type():
    second.init_from = None
  begun = {}
  monkeypatch.setattr(loop, "train_run", lambda s, c, w, p: begun.setdefault(w.name, s.init_from))
  loop.train(config, Path())
  assert begun == {"wide": str(tmp_path / "tiny")}


@pytest.mark.slow
def test_held_out_batches_are_the_same_each_time_and_profiles_are_written(tmp_path):
  config = small(num_steps=2, eval__every=1, profile=(1, 2))
  config.optimizer.learning_rate = 1e-30
  loop.train(config, tmp_path)
  measured = [record["eval/loss"] for record in records(tmp_path) if "eval/loss" in record]
  assert len(measured) == 2 and measured[0] == measured[1]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
