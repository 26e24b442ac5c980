import dataclasses
import json
import re

import pytest

from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.hub.hf_config import read_config, write_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig, VideoChatFlashConfig

RELEASED_FIELDS = {  # config.json of VideoChat-Flash-Qwen2-7B_res448, whole
  "architectures": ["VideoChatFlashQwenForCausalLM"],
  "auto_map": {
    "AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig",
    "AutoModel": "modeling_videochat_flash.VideoChatFlashQwenForCausalLM",
  },
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "frame_aspect_ratio": "square",
  "frame_grid_pinpoints": None,
  "hidden_act": "silu",
  "hidden_size": 3584,
  "image_aspect_ratio": "anyres_nopad",
  "image_crop_resolution": None,
  "image_grid_pinpoints": [[448 * w, 448 * h] for w in range(1, 7) for h in range(1, 7)],
  "image_split_resolution": None,
  "initializer_range": 0.02,
  "intermediate_size": 18944,
  "llm_compress_layer_list": [24],
  "llm_compress_type": "attention",
  "llm_image_token_ratio_list": [1.0, 0.5],
  "max_num_pixels": 14745600000,
  "max_position_embeddings": 32768,
  "max_window_layers": 28,
  "min_slow_num_frames": 4,
  "mm_close_init": False,
  "mm_hidden_size": 1024,
  "mm_llm_compress": False,
  "mm_local_num_frames": 4,
  "mm_newline_position": "nothing",
  "mm_num_compress_latents": 128,
  "mm_num_compress_query_type": "learnable",
  "mm_patch_merge_type": "spatial_nopad",
  "mm_pos_num_frames": 8,
  "mm_projector_lr": None,
  "mm_projector_type": "tome16_mlp_hd64",
  "mm_resampler_type": None,
  "mm_spatial_pool_mode": "bilinear",
  "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter",
  "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False,
  "mm_vision_select_feature": "patch",
  "mm_vision_select_layer": -2,
  "mm_vision_tower": "umt-hd-large",
  "mm_vision_tower_lr": 2e-06,
  "model_type": "videochat_flash_qwen",
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "pos_skipping_range": 4096,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": False,
  "tokenizer_model_max_length": 32768,
  "tokenizer_padding_side": "right",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.40.1",
  "use_cache": True,
  "use_mm_proj": True,
  "use_pos_skipping": False,
  "use_sliding_window": False,
  "vision_encode_type": "video_image",
  "vision_tower_pretrained": None,
  "vocab_size": 152064,
}
CONSTRUCTORS = [
  name for name, member in vars(VideoChatFlashConfig).items() if isinstance(member, classmethod)
]


def read(directory, fields):
  (directory / "config.json").write_text(json.dumps(fields))
  return read_config(directory)


def assert_refused(directory, fields, *words):
  with pytest.raises(InputError) as caught:
    read(directory, fields)
  message = str(caught.value)
  assert "\n" not in message
  for word in (str(directory / "config.json"), *words):
    assert word in message, message


def test_the_released_7b_config_is_read(tmp_path):
  config = read(tmp_path, RELEASED_FIELDS)
  expected = VideoChatFlashConfig.qwen2_7b_res448()
  assert config == dataclasses.replace(expected, name=tmp_path.name)


def test_a_number_may_be_written_without_its_point(tmp_path):
  config = read(tmp_path, RELEASED_FIELDS | {"rope_theta": 1000000})
  assert config == read(tmp_path, RELEASED_FIELDS)


def rewritten(directory, base, **changes):
  """The fields written for a config.json read from `base`, with changes to our config."""
  config = dataclasses.replace(read(directory, base), **changes)
  write_config(config, directory, dtype="bfloat16", base=base)
  assert read_config(directory) == config
  return json.loads((directory / "config.json").read_text())


def test_every_field_of_the_released_config_survives(tmp_path):
  assert rewritten(tmp_path, RELEASED_FIELDS) == RELEASED_FIELDS


def test_a_change_leaves_fields_that_it_does_not_concern(tmp_path):
  decoder = dataclasses.replace(read(tmp_path, RELEASED_FIELDS).decoder, max_positions=65536)
  fields = rewritten(tmp_path, RELEASED_FIELDS | {"mine": [1]}, decoder=decoder)
  context = {"max_position_embeddings": 65536, "tokenizer_model_max_length": 65536}
  assert fields == RELEASED_FIELDS | context | {"mine": [1]}


def test_a_released_config_written_from_nothing_says_what_the_original_reads(tmp_path):
  write_config(VideoChatFlashConfig.qwen2_7b_res448(), tmp_path, dtype="bfloat16")
  fields = json.loads((tmp_path / "config.json").read_text())
  assert {field: RELEASED_FIELDS[field] for field in fields} == fields
  left_out = set(RELEASED_FIELDS) - set(fields)
  dead = "compress|pinpoints|resolution|max_num|slow|close_init|_lr$|resampler|pool|pretrained"
  assert [field for field in left_out if not re.search(dead, field)] == []


def test_the_context_is_what_positions_were_made_for_not_where_the_original_cuts(tmp_path):
  config = read(tmp_path, RELEASED_FIELDS | {"max_position_embeddings": 1_010_000})
  assert config.decoder.max_positions == 1_010_000


def test_a_snapshot_of_the_hubs_cache_has_the_name_of_its_repository(tmp_path):
  snapshot = tmp_path / "models--OpenGVLab--VideoChat-Flash-Qwen2-7B_res448" / "snapshots" / "1a2b"
  snapshot.mkdir(parents=True)
  assert read(snapshot, RELEASED_FIELDS) == VideoChatFlashConfig.qwen2_7b_res448()


def test_a_language_model_alone_names_the_command_that_adds_an_encoder(tmp_path):
  fields = {"model_type": "qwen2", "hidden_size": 8}
  assert_refused(tmp_path, fields, "a language model alone", "vcflash convert --encoder")


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_a_written_config_is_read_back(tmp_path, constructor):
  config = dataclasses.replace(getattr(VideoChatFlashConfig, constructor)(), name=tmp_path.name)
  write_config(config, tmp_path, dtype="bfloat16")
  assert read_config(tmp_path) == config


def test_sizes_that_upstream_has_no_field_for_are_read_back(tmp_path):
  sampling = SamplingConfig(min_frames=3, max_frames=9, local_frames=2)
  decoder = dataclasses.replace(CONFIG.decoder, head_size=10, rope_theta=5e5, norm_eps=1e-5)
  config = dataclasses.replace(CONFIG, name=tmp_path.name, decoder=decoder, sampling=sampling)
  write_config(config, tmp_path, dtype="float32")
  assert read_config(tmp_path) == config


@pytest.mark.parametrize(
  "field, value, known",
  [
    ("mm_vision_tower", "siglip", "umt-large, umt-hd-large, internvideo2"),
    ("mm_projector_type", "resampler", "tome16_mlp_hd64"),
  ],
)
def test_an_unknown_part_is_named_beside_the_known_ones(tmp_path, field, value, known):
  assert_refused(tmp_path, RELEASED_FIELDS | {field: value}, f"'{field}' is '{value}'", known)


@pytest.mark.parametrize(
  "field, value",
  [
    ("hidden_act", "gelu"),
    ("hidden_act", None),
    ("use_sliding_window", True),
    ("image_aspect_ratio", "pad"),
    ("frame_aspect_ratio", "anyres"),
    ("mm_local_num_frames", 8),
    ("mm_vision_select_layer", -1),
    ("mm_patch_merge_type", "flat"),
    ("mm_newline_position", "grid"),
    ("vision_encode_type", "image"),
  ],
)
def test_what_is_not_supported_is_refused(tmp_path, field, value):
  assert_refused(tmp_path, RELEASED_FIELDS | {field: value}, f"'{field}' is {value!r}", "only")


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"dtype": "float32"}, "'dtype' ('float32') contradicts 'torch_dtype' ('bfloat16')"),
    ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "'layer_types' is ['full"),
    ({"layer_types": ["full_attention"] * 27}, "once for each of the 28 layers"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ({"partial_rotary_factor": True}, "'partial_rotary_factor' is True"),
    (
      {"quantization_config": {"bits": 4}},
      "'quantization_config' is {'bits': 4}; it has to be null, or",
    ),
    (
      {
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
        "original_max_position_embeddings": 4096,
      },
      "'rope_scaling.original_max_position_embeddings' (32768) contradicts",
    ),
    ({"text_config": {"hidden_size": 8}}, "'text_config' is {'hidden_size': 8}; only null"),
    ({"mm_hidden_size": 1408}, "'mm_hidden_size' (1408) contradicts the encoder, whose width is"),
    (
      {
        "videochat_flash_jax": {"vision": dataclasses.asdict(CONFIG.vision)},
        "image_grid_pinpoints": None,
      },
      "contradicts 'mm_vision_tower' ('umt-hd-large')",
    ),
    (
      {"videochat_flash_jax": {"connector": {"clip_tokens": 16}}},
      "'videochat_flash_jax.connector' ({'clip_tokens': 16}) contradicts 'mm_projector_type'",
    ),
    (
      {"videochat_flash_jax": {"max_positions": 1024}},
      "'videochat_flash_jax.max_positions' (1024) contradicts 'max_position_embeddings' (32768)",
    ),
  ],
)
def test_fields_that_contradict_each_other_are_refused(tmp_path, fields, words):
  assert_refused(tmp_path, RELEASED_FIELDS | fields, words)


@pytest.mark.parametrize(
  "fields",
  [
    {"dtype": "bfloat16"},
    {"dtype": "torch.bfloat16"},
    {"torch_dtype": None, "dtype": "float32"},
    {"layer_types": ["full_attention"] * 28},
    {"layer_types": None, "partial_rotary_factor": 1.0, "text_config": None},
  ],
)
def test_fields_may_say_the_same_twice(tmp_path, fields):
  assert read(tmp_path, RELEASED_FIELDS | fields) == read(tmp_path, RELEASED_FIELDS)


def test_a_field_that_stands_there_twice_is_refused(tmp_path):
  text = json.dumps(RELEASED_FIELDS)
  (tmp_path / "config.json").write_text(text[:-1] + ', "rope_theta": 10000.0}')
  with pytest.raises(InputError, match="field 'rope_theta' stands there twice"):
    read_config(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(RELEASED_FIELDS), "utf-8-sig")
  assert read_config(tmp_path).decoder == VideoChatFlashConfig.qwen2_7b_res448().decoder


def test_a_misspelt_part_of_our_section_is_named(tmp_path):
  own = {"videochat_flash_jax": {"visoin": {}}}
  assert_refused(tmp_path, RELEASED_FIELDS | own, "'videochat_flash_jax' has no part visoin")


@pytest.mark.parametrize("field", ["rope_scaling", "use_sliding_window", "mm_llm_compress"])
@pytest.mark.parametrize("off", [None, False, {}])
def test_what_is_switched_off_in_any_way_is_accepted(tmp_path, field, off):
  read(tmp_path, RELEASED_FIELDS | {field: off})


@pytest.mark.parametrize(
  "field, value",
  [
    ("hidden_size", "abc"),
    ("vocab_size", None),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 2.5),
    ("num_attention_heads", 0),
    ("num_key_value_heads", True),
    ("head_dim", 0),
    ("rope_theta", -1.0),
    ("rope_theta", float("inf")),
    ("rope_theta", 10**400),
    ("rms_norm_eps", float("nan")),
    ("tie_word_embeddings", "no"),
    ("mm_vision_tower", ["a"]),
    ("mm_projector_type", None),
    ("videochat_flash_jax", []),
    ("mm_llm_compress", "yes"),
    ("rope_scaling", "yarn"),
    ("videochat_flash_jax", None),
  ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path, field, value):
  assert_refused(tmp_path, RELEASED_FIELDS | {field: value}, f"field '{field}' is ")


@pytest.mark.parametrize(
  "section, field, value",
  [
    ("sampling", "local_frames", 0),
    ("vision", "image_size", "32"),
    ("vision", "kind", 3),
    ("connector", "clip_tokens", None),
  ],
)
def test_a_value_of_our_section_that_cannot_be_is_refused(tmp_path, section, field, value):
  own = {section: dataclasses.asdict(getattr(CONFIG, section)) | {field: value}}
  fields = RELEASED_FIELDS | {"videochat_flash_jax": own}
  assert_refused(tmp_path, fields, f"field 'videochat_flash_jax.{section}.{field}' is {value!r}")


@pytest.mark.parametrize("section", ["vision", "connector", "sampling"])
@pytest.mark.parametrize("value", [None, [], 3])
def test_a_part_of_our_section_that_is_no_object_is_refused(tmp_path, section, value):
  fields = RELEASED_FIELDS | {"videochat_flash_jax": {section: value}}
  assert_refused(tmp_path, fields, f"field 'videochat_flash_jax.{section}' is no JSON object")


@pytest.mark.parametrize(
  "change, words",
  [
    ({"num_key_value_heads": 5}, "'num_key_value_heads': 28 has to be a multiple of 5"),
    ({"head_dim": 127}, "'head_dim', given or by default: 127 has to be a multiple of 2"),
    ({"hidden_size": 28 * 127}, "'head_dim', given or by default: 127 has to be a multiple of 2"),
    ({"hidden_size": 3585}, "'hidden_size' is no multiple of 'num_attention_heads'"),
    ({"videochat_flash_jax": {"connector": {"merge_heads": 7}}}, "'connector.merge_heads'"),
  ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, change, words):
  assert_refused(tmp_path, RELEASED_FIELDS | change, words)


def test_all_missing_fields_are_named(tmp_path):
  fields = dict(RELEASED_FIELDS)
  del fields["hidden_size"], fields["rope_theta"]
  assert_refused(tmp_path, fields, "fields missing: hidden_size, rope_theta")


@pytest.mark.parametrize(
  "text, words",
  [("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[]", "no JSON object")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, words):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(InputError, match=words):
    read_config(tmp_path)


@pytest.mark.parametrize("own", [{"vision": {"depht": 3}}, {"sampling": {"fps": 1}}])
def test_a_misspelt_field_of_our_section_is_refused(tmp_path, own):
  assert_refused(tmp_path, RELEASED_FIELDS | {"videochat_flash_jax": own}, "does not fit", *own)
