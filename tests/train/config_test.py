"""Configs of runs: typed, checked, documented, and the stages' as published."""

import dataclasses
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from videochat_flash_jax.cli.config_file import load_config, read_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.fields import OnResume, count, field
from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.train.config import (
  config_changes,
  config_fields,
  config_table,
  data_config,
  default_config,
  train_settings,
)
from videochat_flash_jax.train.objectives import OBJECTIVES
from videochat_flash_jax.train.optimizer import scale_of
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.workdir import check_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(path.name for path in CONFIGS.glob("stage*.py"))
PARTS = {
  "vision": "vision.blocks.stacked.fc1.kernel",
  "connector": "connector.fc1.kernel",
  "decoder": "decoder.layers.stacked.q_proj.kernel",
}


def settings_of(stage, *overrides):
  overrides = [f"--config.{override}" for override in overrides]
  return train_settings(read_config(CONFIGS / stage, overrides))


def test_every_stage_is_there():
  assert [name[:6] for name in STAGES] == ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
  "stage, rates, size, frames, tokens, steps",
  [
    ("stage1_align.py", {"connector": 1e-3}, 224, (4, 4), 8192, 2030),
    (
      "stage2_pretrain.py",
      {"vision": 2e-6, "connector": 1e-5, "decoder": 1e-5},
      *(224, (4, 8), 32768, 23_400),
    ),
    (
      "stage3_long.py",
      {"vision": 2e-6, "connector": 1e-5, "decoder": 1e-5},
      *(224, (64, 512), 32768, 13_700),
    ),
    ("stage4_highres.py", {"vision": 2e-6, "connector": 1e-5}, 448, (64, 512), 32768, 4642),
  ],
)
def test_stages_are_as_published(stage, rates, size, frames, tokens, steps):
  settings = settings_of(stage)
  optimizer, data = settings.optimizer, settings.data
  for part, path in PARTS.items():
    rate = optimizer.learning_rate * scale_of(optimizer, path)
    assert rate == pytest.approx(rates.get(part, 0.0))
  assert (optimizer.name, optimizer.warm_up, optimizer.final) == ("adamw", 0.03, 0.0)
  assert (optimizer.weight_decay, optimizer.clip_norm, settings.lora.rank) == (0.0, 1.0, 0)
  assert data.frames == frames and settings.num_steps == steps and settings.dropout is None
  of_first = stage == "stage1_align.py"
  assert data.sampling == ("middle" if of_first else "dynamic_fps1")
  assert data.template == ("plain" if of_first else "qwen_2")
  assert settings.tokens_per_row == tokens and settings.model.vision.image_size == size


def test_a_config_names_what_batches_are_made_of():
  config = data_config(settings_of("stage3_long.py", "data.frames=(8, 64)"), 4, streams=2)
  assert config.example.frames == (8, 64) and config.example.image_size == 224
  assert config.example.time_message == "short" and config.streams == 2 and config.rows == 16
  row_shape = config.row_shape
  assert (row_shape.tokens, row_shape.clip_tokens, row_shape.num_shards) == (32768, 64, 4)
  assert row_shape.zigzag and (row_shape.clips_per_shard, row_shape.tiles_per_shard) == (128, 40)
  assert not data_config(settings_of("stage1_align.py"), 1, streams=1).row_shape.zigzag


def test_dropout_and_synthetic_questions_can_be_asked_for():
  settings = settings_of("stage3_long.py", "dropout.kind=uniform0_attention")
  assert settings.dropout == DropoutConfig.model_card()
  config = load_config(CONFIGS / "stage3_long.py")
  config.data.synthetic = ConfigDict({"attribute": 0.8, "absence": 0.2})
  assert dict(train_settings(config).data.synthetic) == {"attribute": 0.8, "absence": 0.2}


@pytest.mark.parametrize(
  "override, complaint",
  [
    ("seed=-1", r"config\.seed is -1: give an integer below"),
    ("objective=answer", r"config\.objective is 'answer': give answers or patches"),
    ("model=qwen3", r"config\.model is 'qwen3': give one of tiny, qwen2_7b_res224"),
    ("image_size=100", r"image_size is 100: give pixels, a multiple of 16"),
    ("sequence_parallel=rign", r"sequence_parallel is 'rign': give none or all_gather or ring"),
    ("rows=0", r"rows is 0: give a positive integer"),
    ("accumulate=3", r"config\.accumulate is 3: give a divisor of rows, which is 16"),
    ("remat=some", r"config\.remat is 'some': give full or dots or none"),
    ("compute_dtype=float16", r"compute_dtype is 'float16': give bfloat16 or float32"),
    ("profile=(5,)", r"config\.profile is \(5,\): give \(\) or the first and the last step"),
    ("mesh.sequnce=4", r"no field 'mesh\.sequnce': did you mean mesh\.sequence"),
    ("mesh.tensor=x", r"mesh\.tensor=x: the field is of type int"),
    ("optimizer.learning_rate=-1.0", r"optimizer\.learning_rate is -1\.0: give a number above 0"),
    ("optimizer.scales=(('(', 1.0),)", r"optimizer\.scales is .*: give pairs of a regular expr"),
    ("optimizer.scales=(('', -1.0),)", r"optimizer\.scales is .*: give pairs of a regular expr"),
    ("optimizer.warm_up=3.0", r"optimizer\.warm_up is 3\.0: give a number from 0 to 1"),
    ("lora.rank=-1", r"config\.lora\.rank is -1: give an integer of 0 or more"),
    ("lora.targets=(", r"config\.lora\.targets is '\(': give a regular expression"),
    ("dropout.kind=evenly", r"config\.dropout\.kind is 'evenly': give '' or uniform"),
    ("data.frames=(8, 4)", r"data\.frames is \(8, 4\): give the least and the most"),
    ("data.frames=(4, 9)", r"data\.frames is \(4, 9\): give .*, multiples of 4"),
    ("data.max_broken_share=2.0", r"max_broken_share is 2\.0: give a number from 0 to 1"),
    ("data.template=qwen", r"data\.template is 'qwen': give qwen_2 or qwen_1_5 or plain"),
    ("eval.every=0", r"config\.eval\.every is 0: give a positive integer"),
    ("checkpoint.keep=0", r"config\.checkpoint\.keep is 0: give a positive integer"),
    ("optimizer.learning_rate=True", r"learning_rate=True: the field is of type float; give one"),
    ("lora.alpha=False", r"lora\.alpha=False: the field is of type float; give one"),
    ("rows=True", r"rows=True: the field is of type int; give one"),
    ("rows=2.0", r"rows=2\.0: the field is of type int; give one"),
    ("zigzag=1", r"zigzag=1: the field is of type bool; give one"),
    ("optimizer.scales=(('', True),)", r"optimizer\.scales is .*: give pairs of a regular expr"),
    ("data.frames=(True, 8)", r"data\.frames is \(True, 8\): give the least and the most"),
    ("dropout.ratios=(1, True)", r"config\.dropout\.ratios is \(1, True\): give a tuple of numb"),
    ("dropout.layers=(4, True)", r"config\.dropout\.layers is \(4, True\): give a tuple of int"),
    ("optimizer.learning_rate=1e999", r"optimizer\.learning_rate is inf: give a number above 0"),
    (f"optimizer.learning_rate={10**400}", r"the field is of type float; give one"),
    (f"optimizer.scales=(('', {10**400}),)", r"optimizer\.scales is .*: give pairs of a regular"),
    ("mesh.tensor=0", r"config\.mesh\.tensor is 0: give a positive number, or -1"),
  ],
)
def test_a_wrong_field_is_named_with_the_remedy(override, complaint):
  with pytest.raises(InputError, match=complaint) as error:
    settings_of("stage3_long.py", override)
  assert "\n" not in str(error.value)


def test_a_config_file_cannot_mistype_a_field():
  config = load_config(CONFIGS / "stage3_long.py")
  with pytest.raises(AttributeError, match="learning_rate"):
    config.optimizer.learning_rat = 1.0


@pytest.mark.parametrize("value", [True, False])
def test_a_config_file_cannot_give_a_bool_for_a_number(value):
  config = load_config(CONFIGS / "stage3_long.py")
  said = rf"config\.learning_rate is {value}: give a number"
  with pytest.raises(InputError, match=said):
    config.optimizer.learning_rate = value
  with pytest.raises(InputError, match=said):
    config.update({"optimizer": {"learning_rate": value}})
  config.optimizer = ConfigDict(dict(config.optimizer))  # a section of one's own
  with pytest.raises(InputError, match=said):
    config.optimizer.learning_rate = value
  config.optimizer = ConfigDict(dict(config.optimizer) | {"learning_rate": value})
  with pytest.raises(InputError, match=rf"^config\.optimizer\.{said[8:]}"):
    train_settings(config)
  for name in ("rows", "seed"):
    wrong = load_config(CONFIGS / "stage3_long.py")
    wrong[name] = value
    with pytest.raises(InputError, match=f"config.{name} is {value}: give a"):
      train_settings(wrong)


def test_an_integer_is_a_number_too():
  config = load_config(CONFIGS / "stage3_long.py")
  config.optimizer.weight_decay = 1
  assert train_settings(config).optimizer.weight_decay == 1.0


@pytest.mark.parametrize(
  "section, field, complaint",
  [
    ("", "learning_rate", r"^config\.learning_rate is no field: did you mean .*$"),
    ("optimizer", "learningrate", r"^config\.optimizer\.learningrate .* mean learning_rate\?$"),
    ("mesh", "sequnce", r"^config\.mesh\.sequnce is no field: did you mean sequence\?$"),
  ],
)
def test_a_field_of_ones_own_is_refused_with_the_nearest(section, field, complaint):
  config = load_config(CONFIGS / "stage3_long.py").copy_and_resolve_references()
  with config.unlocked():
    (config[section] if section else config)[field] = 1
  with pytest.raises(InputError, match=complaint):
    train_settings(config)


@pytest.mark.parametrize("name", ["rows", "mesh", "optimizer.scales", "data.frames"])
def test_a_field_that_is_missing_is_named(name):
  config = load_config(CONFIGS / "stage3_long.py").copy_and_resolve_references()
  *sections, field = name.split(".")
  with config.unlocked():
    del (config[sections[0]] if sections else config)[field]
  with pytest.raises(InputError, match=rf"^config\.{name} is missing: [^\n]+$"):
    train_settings(config)


@pytest.mark.parametrize(
  "weights", [{"colour": 1.0}, {"attribute": -1.0, "absence": 2.0}, {"absence": 0.0}]
)
def test_weights_of_questions_that_cannot_be_used_are_refused(weights):
  config = load_config(CONFIGS / "stage3_long.py")
  config.data.synthetic = ConfigDict(weights)
  with pytest.raises(InputError, match=r"^config\.data\.synthetic is .* weights from 0 for"):
    train_settings(config)


def as_json(config):
  return json.loads(config.to_json_best_effort())


def leaves(config, prefix=""):
  for name, value in config.items():
    if isinstance(value, ConfigDict) and len(value):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"


def test_every_field_of_a_config_is_in_the_table_with_its_meaning():
  table = config_table()
  assert sorted(each.path for each in config_fields()) == sorted(leaves(default_config()))
  for each in config_fields():
    assert f"\n{each.path} " in table and each.meaning.endswith(".")
  assert max(map(len, table.splitlines())) <= 100


def test_defaults_are_values_that_their_fields_take():
  config = default_config()
  config.init_from, config.data.mixture = "tiny", "rows.json"
  settings = train_settings(config)
  assert settings.mesh.sequence == 4 and settings.dropout is None and settings.lora.rank == 0
  assert settings.data.time_message == "short" and settings.data.synthetic == ()


def test_a_field_is_added_in_one_place(monkeypatch):
  extended = dataclasses.make_dataclass(
    "Extended",
    [("patience", int, field(3, count(), "Steps to wait.", on_resume=OnResume.MAY_CHANGE))],
    bases=(TrainSettings,),
    frozen=True,
  )
  monkeypatch.setattr("videochat_flash_jax.train.config.TrainSettings", extended)
  config = default_config()
  assert train_settings(config).patience == 3 and "\npatience " in config_table()
  config.patience = 0
  with pytest.raises(InputError, match=r"config\.patience is 0: give a positive integer"):
    train_settings(config)
  without = as_json(default_config())
  del without["patience"]
  config.patience = 4
  (change,) = config_changes(without, as_json(config))
  assert change == ("patience", 3, 4, OnResume.MAY_CHANGE)


def test_what_changes_is_found_with_what_that_means_for_a_resumed_run():
  before, now = default_config(), default_config()
  now.seed, now.log_every, now.lora.rank, now.mesh.fsdp = 1, 2, 8, 4
  now.data.synthetic = ConfigDict({"absence": 1.0})
  changes = {change.path: change for change in config_changes(as_json(before), as_json(now))}
  assert {path: change.on_resume for path, change in changes.items()} == {
    "seed": OnResume.FIXED,
    "log_every": OnResume.MAY_CHANGE,
    "lora.rank": OnResume.FIXED_BY_WEIGHTS,
    "mesh.fsdp": OnResume.MAY_CHANGE,
    "data.synthetic.absence": OnResume.FIXED,
  }
  assert changes["lora.rank"][1:3] == (0, 8)


def test_a_field_that_an_older_version_did_not_have_had_its_default():
  before, now = as_json(default_config()), as_json(default_config())
  del before["zigzag"], before["data"]["position_skip"], before["eval"]
  assert config_changes(before, now) == []
  before["retired"] = 7
  assert config_changes(before, now) == [("retired", 7, None, OnResume.FIXED)]


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model": "tiny"}, "trained with config.model 'qwen2_7b_res448', now it is 'tiny'; give"),
    ({"lora.rank": 8}, "config.lora.rank 0, now it is 8"),
    ({"optimizer.name": "muon"}, "config.optimizer.name 'adamw'"),
    ({"num_steps": 7}, None),
  ],
)
def test_a_checkpoint_of_another_config_is_refused_by_the_field(changes, words):
  config = default_config()
  config.update_from_flattened_dict(changes)
  saved, where = {"config": as_json(default_config())}, Path("checkpoints/5")
  if words is None:
    check_checkpoint(as_json(config), where, saved)
    return
  with pytest.raises(InputError) as caught:
    check_checkpoint(as_json(config), where, saved)
  said = str(caught.value)
  assert said.startswith("checkpoints/5: ") and words in said and "\n" not in said


def test_every_objective_of_a_config_is_implemented():
  (field_,) = (each for each in config_fields() if each.path == "objective")
  assert field_.accepts == " or ".join(OBJECTIVES)
