import dataclasses
import json

import pytest

from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.hf_config import read_config, write_config
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import SamplingConfig, VideoChatFlashConfig

RELEASED_FIELDS = {  # of config.json of VideoChat-Flash-Qwen2-7B_res448
  "architectures": ["VideoChatFlashQwenForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "llm_compress_layer_list": [24],
  "llm_compress_type": "attention",
  "llm_image_token_ratio_list": [1.0, 0.5],
  "max_position_embeddings": 32768,
  "mm_hidden_size": 1024,
  "mm_llm_compress": False,
  "mm_local_num_frames": 4,
  "mm_pos_num_frames": 8,
  "mm_projector_type": "tome16_mlp_hd64",
  "mm_vision_tower": "umt-hd-large",
  "model_type": "videochat_flash_qwen",
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
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
    ("rope_scaling", {"type": "yarn", "factor": 4.0}),
    ("use_sliding_window", True),
    ("mm_llm_compress", True),
    ("mm_local_num_frames", 8),
    ("mm_vision_select_layer", -1),
    ("mm_patch_merge_type", "flat"),
    ("mm_newline_position", "grid"),
    ("vision_encode_type", "image"),
  ],
)
def test_what_is_not_supported_is_refused(tmp_path, field, value):
  assert_refused(tmp_path, RELEASED_FIELDS | {field: value}, f"'{field}' is {value!r}", "only")


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
