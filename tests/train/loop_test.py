"""The loop: what it refuses before anything is computed, and when it stops."""

import json
import logging
import math

import numpy as np
import pytest

from tests.train import small_config
from tests.train.small_runs import records
from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.train import loop


def small(**changes):
  config = small_config.get_config()
  config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
  return config


def as_if_begun(workdir, config):
  """What a run leaves: its config, and a checkpoint that is whole by its looks."""
  for item in ("state", "data", "run"):
    (workdir / "checkpoints" / "2" / item).mkdir(parents=True)
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
  ],
)
def test_a_config_that_cannot_be_trained_is_refused_in_one_line(tmp_path, changes, said):
  with pytest.raises(InputError, match=said) as error:
    loop.train(small(**changes), tmp_path / "run")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("field", ["data.mixture", "eval.mixture"])
def test_a_mixture_that_is_not_there_is_refused(tmp_path, field):
  config = small()
  config.data.synthetic = type(config)()
  (tmp_path / "rows.json").write_text("[]")
  config.data.mixture = str(tmp_path / "rows.json")
  config.update_from_flattened_dict({field: str(tmp_path / "gone.yaml")})
  with pytest.raises(InputError, match=rf"config\.{field} is .*gone\.yaml.*: give a file that is"):
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
    ("optimizer.learning_rate", 0.5, "config.optimizer.learning_rate 0.001, now it is 0.5"),
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
  with pytest.raises(InputError, match=r"config\.json: not of a run of this package, or damaged"):
    loop.train(small(), tmp_path)


def test_what_no_number_depends_on_may_change(tmp_path):
  as_if_begun(tmp_path, small())
  config = small(log_every=7, checkpoint__every=9, data__workers=2, mesh__data=2, remat="full")
  loop.check_config(tmp_path, json.loads(config.to_json_best_effort()))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_names_of_its_batch(tmp_path):
  config = small(optimizer__learning_rate=1e30, checkpoint__every=1)
  with pytest.raises(InputError, match=r"the loss of step (\d+) is (nan|inf)") as error:
    loop.train(config, tmp_path)
  (path,) = tmp_path.glob("nan_step_*.json")
  told, step = json.loads(path.read_text()), int(path.stem.removeprefix("nan_step_"))
  assert f"of step {step} is" in str(error.value) and path.name in str(error.value)
  assert f"checkpoint {step - 1} is good" in str(error.value) and "\n" not in str(error.value)
  assert told["step"] == step and not math.isfinite(float(told["metrics"]["loss"]))
  (row,) = told["rows"]
  assert row and all("of the synthetic world" in name for name in row)
  assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} <= set(range(1, step))
  assert max(record["step"] for record in records(tmp_path)) == step - 1


def test_frozen_weights_do_not_change_by_a_bit(tmp_path):
  config = small(num_steps=3, checkpoint__every=1)
  config.optimizer.scales = (("connector", 1.0), ("", 0.0))
  loop.train(config, tmp_path)
  first, last = (weights(tmp_path / "checkpoints" / step) for step in ("1", "3"))
  changed = {name for name in first if not np.array_equal(first[name], last[name])}
  assert changed == {name for name in first if "mm_projector" in name}


def weights(directory):
  tensors = open_checkpoint(directory).tensors
  return {name: np.concatenate(list(tensor.blocks())) for name, tensor in tensors.items()}


def test_stages_begin_where_the_one_before_ended_and_finished_ones_are_left(tmp_path, caplog):
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
  assert [r.getMessage() for r in caplog.records if "finished before" in r.getMessage()] == [
    f"{tmp_path / name}: finished before" for name in stages
  ]


def test_held_out_batches_are_the_same_each_time_and_profiles_are_left(tmp_path):
  config = small(num_steps=2, eval__every=1, profile=(1, 2))
  config.optimizer.learning_rate = 1e-30
  loop.train(config, tmp_path)
  measured = [record["eval/loss"] for record in records(tmp_path) if "eval/loss" in record]
  assert len(measured) == 2 and measured[0] == measured[1]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
