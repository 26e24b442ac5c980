"""What a config.json may switch: dropout, YaRN and tiling, read, refused and written back."""

import dataclasses
import json

import pytest

from tests.checkpoints.hub.hf_config_test import RELEASED_FIELDS, assert_refused, read
from videochat_flash_jax.checkpoints.hub.hf_config import read_config, write_config
from videochat_flash_jax.models.config import (
  DROPOUT_KINDS,
  DropoutConfig,
  TilingConfig,
  VideoChatFlashConfig,
  YarnConfig,
)

DROPOUT = {
  "mm_llm_compress": True,
  "llm_compress_type": "uniform0_attention",
  "llm_compress_layer_list": [4, 18],
  "llm_image_token_ratio_list": [1, 0.75, 0.25],
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
GRIDS_3X2 = [[448, 448], [448, 896], [896, 448], [896, 896], [1344, 448], [1344, 896]]


def test_the_model_cards_dropout_is_read(tmp_path):
  assert read(tmp_path, RELEASED_FIELDS | DROPOUT).dropout == DropoutConfig.model_card()


@pytest.mark.parametrize("off", [None, False, {}])
def test_dropout_that_is_off_may_say_anything_else(tmp_path, off):
  fields = RELEASED_FIELDS | {"mm_llm_compress": off, "llm_compress_layer_list": "8,16,24"}
  assert read(tmp_path, fields).dropout is None


@pytest.mark.parametrize(
  "field, value",
  [
    ("llm_compress_type", "attention1"),
    ("llm_compress_type", None),
    ("llm_compress_layer_list", None),
    ("llm_compress_layer_list", []),
    ("llm_compress_layer_list", [0, 18]),
    ("llm_compress_layer_list", [18, 4]),
    ("llm_compress_layer_list", [4, 4]),
    ("llm_compress_layer_list", [4, 28]),
    ("llm_compress_layer_list", [4, 18.0]),
    ("llm_compress_layer_list", "4,18"),
    ("llm_image_token_ratio_list", None),
    ("llm_image_token_ratio_list", [1, 0.75]),
    ("llm_image_token_ratio_list", [1, 0.25, 0.75]),
    ("llm_image_token_ratio_list", [0.9, 0.75, 0.25]),
    ("llm_image_token_ratio_list", [1, 0.75, 0]),
    ("llm_image_token_ratio_list", [1, 0.75, "0.25"]),
    ("llm_image_token_ratio_list", [1, True, 0.25]),
    ("llm_image_token_ratio_list", [1, float("inf"), float("nan")]),
  ],
)
def test_a_dropout_that_cannot_be_is_refused(tmp_path, field, value):
  fields = RELEASED_FIELDS | DROPOUT | {field: value}
  assert_refused(tmp_path, fields, f"field '{field}' is {value!r}; it has to be ")


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_yarn_is_read_and_stretches_the_context(tmp_path, key):
  scaling = {key: "yarn", "factor": 4, "original_max_position_embeddings": 32768}
  decoder = read(tmp_path, RELEASED_FIELDS | {"rope_scaling": scaling}).decoder
  assert decoder.yarn == YarnConfig(4.0, 32768)
  assert decoder.max_positions == 131072


def test_yarn_without_its_original_length_stretches_the_models_own(tmp_path):
  scaling = {"rope_type": "yarn", "factor": 2.5}
  decoder = read(tmp_path, RELEASED_FIELDS | {"rope_scaling": scaling}).decoder
  assert (decoder.yarn, decoder.max_positions) == (YarnConfig(2.5, 32768), 81920)


def test_default_rotary_positions_are_no_yarn(tmp_path):
  fields = RELEASED_FIELDS | {"rope_scaling": {"rope_type": "default"}}
  assert read(tmp_path, fields).decoder.yarn is None


@pytest.mark.parametrize(
  "scaling",
  [
    "yarn",
    ["yarn"],
    {"type": "linear", "factor": 4.0},
    {"factor": 4.0},
    YARN | {"factor": None},
    YARN | {"factor": 0.5},
    YARN | {"factor": True},
    YARN | {"factor": float("nan")},
    YARN | {"original_max_position_embeddings": 0},
    YARN | {"original_max_position_embeddings": 32768.0},
    YARN | {"beta_fast": 64},
  ],
)
def test_another_scaling_is_refused(tmp_path, scaling):
  fields = RELEASED_FIELDS | {"rope_scaling": scaling}
  assert_refused(tmp_path, fields, "field 'rope_scaling' is ", "it has to be null, or yarn")


def in_new_form(parameters, **others):
  """The released fields as transformers 5 writes them."""
  fields = {field: value for field, value in RELEASED_FIELDS.items() if "rope" not in field}
  fields["dtype"] = fields.pop("torch_dtype")
  fields |= {"layer_types": ["full_attention"] * 28, "sliding_window": None}
  return fields | {"transformers_version": "5.3.0", "rope_parameters": parameters} | others


YARN_OF_5 = {
  "rope_type": "yarn",
  "rope_theta": 5e5,
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
}


def test_rotary_positions_of_transformers_5_are_read(tmp_path):
  decoder = read(tmp_path, in_new_form({"rope_theta": 5e5, "rope_type": "default"})).decoder
  assert (decoder.rope_theta, decoder.yarn, decoder.max_positions) == (5e5, None, 32768)
  decoder = read(tmp_path, in_new_form(YARN_OF_5)).decoder
  assert (decoder.rope_theta, decoder.yarn) == (5e5, YarnConfig(4.0, 32768))
  assert decoder.max_positions == 131072


@pytest.mark.parametrize(
  "options",
  [
    {"type": "yarn"},
    {"beta_fast": 32, "beta_slow": 1.0, "truncate": True, "partial_rotary_factor": 1.0},
    {"attention_factor": 1.138629436111989, "mscale": None, "beta_fast": None},
  ],
)
def test_options_of_yarn_may_say_what_holds_anyway(tmp_path, options):
  assert read(tmp_path, in_new_form(YARN_OF_5 | options)).decoder.yarn == YarnConfig(4.0, 32768)


@pytest.mark.parametrize(
  "parameters, words",
  [
    (YARN_OF_5 | {"beta_fast": 16}, "beta_fast can only be 32"),
    (YARN_OF_5 | {"attention_factor": 1.0}, "attention_factor can only be 1.13863"),
    (YARN_OF_5 | {"truncate": False}, "truncate can only be 1"),
    (YARN_OF_5 | {"mscale": 0.7}, "no mscale"),
    (YARN_OF_5 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor can only be 1"),
    (YARN_OF_5 | {"rope_type": "llama3"}, "'llama3'"),
    (YARN_OF_5 | {"rope_type": "linear"}, "'linear'"),
    (YARN_OF_5 | {"type": "default"}, "'rope_parameters.rope_type' ('yarn') contradicts"),
    ({"rope_theta": 1e6, "factor": 4.0}, "no factor"),
    ({"rope_theta": 1e6, "rope_type": "default", "beta_fast": 32}, "no beta_fast"),
    ({"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}, "no full_attention"),
    (1e6, "it has to be null, or yarn"),
  ],
)
def test_other_rotary_positions_of_transformers_5_are_refused(tmp_path, parameters, words):
  assert_refused(tmp_path, in_new_form(parameters), "'rope_parameters", words)


def test_a_missing_theta_is_named_and_a_wrong_one_by_its_own_field(tmp_path):
  for parameters in (
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": None},
  ):
    assert_refused(tmp_path, in_new_form(parameters), "fields missing: rope_theta")
  assert_refused(tmp_path, in_new_form({"rope_theta": -1}), "'rope_parameters.rope_theta' is -1")
  assert_refused(
    tmp_path, in_new_form({"rope_theta": True}), "'rope_parameters.rope_theta' is True"
  )


@pytest.mark.parametrize(
  "fields, first, second",
  [
    ({"rope_theta": 1e4}, "'rope_parameters.rope_theta' (500000.0)", "'rope_theta' (10000.0)"),
    (
      {"rope_scaling": {"type": "yarn", "factor": 2}},
      "'rope_parameters' ({'rope_theta': 500000.0, 'rope_type': 'default'})",
      "'rope_scaling' ({'type': 'yarn', 'factor': 2})",
    ),
    (
      {"rope_scaling": {"type": "default", "rope_theta": 1e4}},
      "'rope_parameters.rope_theta' (500000.0)",
      "'rope_scaling.rope_theta' (10000.0)",
    ),
  ],
)
def test_old_and_new_fields_that_contradict_each_other_are_named(tmp_path, fields, first, second):
  fields = in_new_form({"rope_theta": 5e5, "rope_type": "default"}, **fields)
  assert_refused(tmp_path, fields, f"{first} contradicts {second}; correct one")


def test_old_and_new_fields_may_say_the_same(tmp_path):
  fields = in_new_form(YARN_OF_5, rope_theta=500000, rope_scaling=YARN)
  assert read(tmp_path, fields).decoder.yarn == YarnConfig(4.0, 32768)
  assert read(tmp_path, in_new_form(YARN_OF_5, rope_scaling=None)).decoder.yarn is not None


@pytest.mark.parametrize("parameters", [YARN_OF_5, {"rope_theta": 5e5, "rope_type": "default"}])
def test_what_transformers_5_wrote_is_written_as_every_version_reads_it(tmp_path, parameters):
  config, fields = read(tmp_path, in_new_form(parameters)), in_new_form(parameters)
  write_config(config, tmp_path, dtype="float16", base=fields)
  written = json.loads((tmp_path / "config.json").read_text())
  assert read_config(tmp_path) == config
  assert written.pop("rope_theta") == 5e5 and written.pop("torch_dtype") == "float16"
  assert written.pop("rope_scaling") == (YARN if "factor" in parameters else None)
  del fields["rope_parameters"], fields["dtype"]
  assert written == fields


def test_a_change_of_what_transformers_5_wrote_leaves_nothing_that_contradicts_it(tmp_path):
  before = read(tmp_path, in_new_form(YARN_OF_5))
  decoder = dataclasses.replace(
    before.decoder, yarn=None, rope_theta=1e4, max_positions=512, depth=5
  )
  config = dataclasses.replace(before, decoder=decoder)
  write_config(config, tmp_path, dtype="bfloat16", base=in_new_form(YARN_OF_5))
  assert read_config(tmp_path) == config


@pytest.mark.parametrize(
  "grids, tiling",
  [
    (None, TilingConfig()),
    ("(1x1),...,(6x6)", TilingConfig(6, 6)),
    ("(1x1), ..., (3x12)", TilingConfig(3, 12)),
    (GRIDS_3X2, TilingConfig(3, 2)),
    ([[448, 448]], TilingConfig(1, 1)),
  ],
)
def test_grids_of_tiles_are_read(tmp_path, grids, tiling):
  assert read(tmp_path, RELEASED_FIELDS | {"image_grid_pinpoints": grids}).tiling == tiling


@pytest.mark.parametrize(
  "grids",
  [
    "(2x1),...,(6x6)",
    "(1x1),...,(0x6)",
    "6x6",
    6,
    [],
    [448],
    [[448]],
    [["448", "448"]],
    [[224, 224]],
    [[448, 896], [448, 448]],
    [[448, 448], [896, 896]],
    [[448, 448], [448 * 10**9, 448 * 10**9]],
    GRIDS_3X2[:-1],
  ],
)
def test_other_grids_are_refused(tmp_path, grids):
  fields = RELEASED_FIELDS | {"image_grid_pinpoints": grids}
  assert_refused(tmp_path, fields, "'image_grid_pinpoints' is ", "all grids of 448-pixel tiles")


@pytest.mark.parametrize("kind", DROPOUT_KINDS)
@pytest.mark.parametrize("context", [20_000, 32_768, 131_072, 200_000])
def test_what_is_switched_is_written_and_read_back(tmp_path, kind, context):
  released = VideoChatFlashConfig.qwen2_7b_res448()
  config = dataclasses.replace(
    released,
    name=tmp_path.name,
    dropout=DropoutConfig(kind, (3, 9, 20), (1.0, 0.5, 0.5, 0.125)),
    tiling=TilingConfig(3, 2),
    decoder=dataclasses.replace(
      released.decoder, yarn=YarnConfig(4.0, 32768), max_positions=context
    ),
  )
  write_config(config, tmp_path, dtype="bfloat16")
  assert read_config(tmp_path) == config
  fields = json.loads((tmp_path / "config.json").read_text())
  assert fields["rope_scaling"] == YARN
  assert fields["image_grid_pinpoints"] == GRIDS_3X2
  assert fields["llm_compress_layer_list"] == [3, 9, 20]


def test_dropout_switched_off_leaves_the_rest_of_it_in_the_file(tmp_path):
  base = RELEASED_FIELDS | DROPOUT
  config = dataclasses.replace(read(tmp_path, base), dropout=None)
  write_config(config, tmp_path, dtype="bfloat16", base=base)
  fields = json.loads((tmp_path / "config.json").read_text())
  assert {field: fields[field] for field in DROPOUT} == DROPOUT | {"mm_llm_compress": False}
