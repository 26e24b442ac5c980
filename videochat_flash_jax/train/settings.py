"""A training config, checked and typed (see `settings_types`), and what batches it asks for."""

import dataclasses
import re

from ml_collections import ConfigDict

from videochat_flash_jax.data.batches.data_config import DataConfig, ExampleConfig
from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.media.frame_sampling import CLIP_FRAMES
from videochat_flash_jax.data.text.conversation import TEMPLATES
from videochat_flash_jax.models.config import (
  DROPOUT_KINDS,
  DropoutConfig,
  LoraConfig,
  VideoChatFlashConfig,
)
from videochat_flash_jax.models.layer_stack import REMAT
from videochat_flash_jax.models.token_dropout import check_dropout
from videochat_flash_jax.parallel.mesh_config import SEQUENCE_PARALLEL, MeshConfig
from videochat_flash_jax.synthetic.world import QUESTION_KINDS
from videochat_flash_jax.train.config_checks import Section, is_count, is_number, require
from videochat_flash_jax.train.settings_types import (
  CheckpointSettings,
  DataSettings,
  EvalSettings,
  OptimizerSettings,
  TrainSettings,
)

MODELS = tuple(
  name for name, member in vars(VideoChatFlashConfig).items() if isinstance(member, classmethod)
)
OBJECTIVES = ("answers", "patches")
OPTIMIZERS = ("adamw", "muon")


def run_configs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of each stage by its name; of a config without `stages` itself, by "".

  Raises:
    InputError: there are no stages in `stages`.
  """
  if "stages" not in config:
    return {"": config}
  require(bool(config.stages), "stages", config.stages, "a ConfigDict of configs of runs")
  return {name: stage.copy_and_resolve_references() for name, stage in config.stages.items()}


def train_settings(config: ConfigDict) -> TrainSettings:
  """Checks a config such as configs/stage3_long.py, field by field.

  What only a run needs, `init_from` and `data.mixture`, may be missing.

  Raises:
    InputError: names the first field that is missing, unknown or cannot be used, and what to give.
  """
  fields = ["image_size", *_names(TrainSettings)]
  top = Section(config, "", fields)
  counts = ("num_steps", "rows", "tokens_per_row", "clips_per_shard", "accumulate", "log_every")
  seed = top.value("seed", lambda n: is_count(n, 0) and n < 2**32, "an integer below 2**32")
  model = _model(top)
  settings = TrainSettings(
    seed=seed,
    objective=top.choice("objective", OBJECTIVES),
    model=model,
    init_from=top.text("init_from", may_be_missing=True),
    tiles_per_shard=top.count("tiles_per_shard", 0),
    compute_dtype=top.choice("compute_dtype", ("bfloat16", "float32")),
    remat=top.choice("remat", REMAT),
    mesh=_mesh(config),
    sequence_parallel=top.choice("sequence_parallel", SEQUENCE_PARALLEL),
    zigzag=top.flag("zigzag"),
    optimizer=_optimizer(config),
    lora=_lora(config),
    dropout=_dropout(config, model.decoder.depth),
    data=_data(config),
    eval=_eval(config),
    checkpoint=_checkpoint(config),
    profile=tuple(top.value("profile", _is_profile, "() or the first and the last step")),
    heartbeat_seconds=top.count("heartbeat_seconds"),
    **{name: top.count(name) for name in counts},
  )
  even = settings.rows % settings.accumulate == 0
  require(even, "accumulate", settings.accumulate, f"a divisor of rows, which is {settings.rows}")
  return settings


def data_config(settings: TrainSettings, num_shards: int, streams: int) -> DataConfig:
  """What batches of a run are made of.

  Args:
    settings: of the run.
    num_shards: devices over which the tokens of a row are spread (`Layout.sequence_shards`).
    streams: independent packers, of all processes together.
  """
  data, model = settings.data, settings.model
  shared = ("frames", "sampling", "template", "time_message", "label_style", "position_skip")
  return DataConfig(
    example=ExampleConfig(
      image_size=model.vision.image_size,
      tiling=model.tiling,
      **{name: getattr(data, name) for name in shared},
    ),
    layout=RowShape(
      tokens=settings.tokens_per_row,
      clip_tokens=model.connector.clip_tokens,
      clips_per_shard=settings.clips_per_shard,
      tiles_per_shard=settings.tiles_per_shard,
      num_shards=num_shards,
      zigzag=settings.zigzag and num_shards > 1,
    ),
    rows=settings.rows,
    seed=settings.seed,
    streams=streams,
    workers=data.workers,
    max_broken_share=data.max_broken_share,
  )


def _names(kind):
  return [field.name for field in dataclasses.fields(kind)]


def _model(top):
  known = ", ".join(MODELS)
  name = top.value("model", lambda name: name in MODELS, f"one of {known}")
  model = getattr(VideoChatFlashConfig, name)()
  patch = model.vision.patch_size
  image_size = top.value(
    "image_size",
    lambda size: is_count(size) and size % patch == 0,
    f"pixels, a multiple of {patch} for {name}",
  )
  vision = dataclasses.replace(model.vision, image_size=image_size)
  return dataclasses.replace(model, vision=vision)


def _mesh(config):
  mesh = Section(config, "mesh", _names(MeshConfig))

  def axis(name):
    remedy = "a positive integer, or -1 for what is left"
    return mesh.value(name, lambda size: type(size) is int, remedy)

  return MeshConfig(**{name: axis(name) for name in _names(MeshConfig)})


def _optimizer(config):
  optimizer = Section(config, "optimizer", _names(OptimizerSettings))
  remedy = 'pairs of a regular expression and a factor from 0, such as (("vision", 0.2), ("", 1.0))'
  scales = optimizer.value("scales", _are_scales, remedy)
  return OptimizerSettings(
    name=optimizer.choice("name", OPTIMIZERS),
    learning_rate=optimizer.number("learning_rate", above=0),
    scales=tuple((pattern, float(factor)) for pattern, factor in scales),
    warm_up=optimizer.number("warm_up", most=1),
    final=optimizer.number("final", most=1),
    weight_decay=optimizer.number("weight_decay"),
    clip_norm=optimizer.number("clip_norm", above=0),
  )


def _are_scales(value):
  some = isinstance(value, tuple | list) and len(value) > 0
  return some and all(_is_scale(pair) for pair in value)


def _is_scale(pair):
  if not isinstance(pair, tuple | list) or len(pair) != 2:
    return False
  return _is_pattern(pair[0]) and is_number(pair[1]) and pair[1] >= 0


def _is_pattern(value):
  try:
    return isinstance(value, str) and re.compile(value) is not None
  except re.error:
    return False


def _lora(config):
  lora = Section(config, "lora", _names(LoraConfig))
  return LoraConfig(
    rank=lora.count("rank", 0),
    alpha=lora.number("alpha", above=0),
    targets=lora.value("targets", _is_pattern, "a regular expression"),
  )


def _dropout(config, depth):
  dropout = Section(config, "dropout", _names(DropoutConfig))
  kind = dropout.choice("kind", ("", *DROPOUT_KINDS))
  if not kind:
    return None
  chosen = DropoutConfig(kind, tuple(config.dropout.layers), tuple(config.dropout.ratios))
  check_dropout(chosen, depth)
  return chosen


def _data(config):
  data = Section(config, "data", _names(DataSettings))
  remedy = "the least and the most frames, multiples of 4, such as (64, 512)"
  return DataSettings(
    mixture=data.text("mixture", may_be_missing=True),
    synthetic=_synthetic(data),
    frames=tuple(data.value("frames", _are_frames, remedy)),
    sampling=data.choice("sampling", ("dynamic_fps1", "middle")),
    template=data.choice("template", TEMPLATES),
    time_message=data.choice("time_message", ("short", "long", "")) or None,
    label_style=data.choice("label_style", ("qwen", "clean")),
    position_skip=data.count("position_skip", 0),
    workers=data.count("workers", 0),
    streams=data.count("streams", 0),
    max_broken_share=data.number("max_broken_share", most=1),
    features=data.text("features"),
  )


def _synthetic(data):
  """Weights of kinds of questions; an empty part means that there is a mixture."""
  kinds = " and ".join(QUESTION_KINDS)
  remedy = f"a ConfigDict with weights from 0 for {kinds}, not all 0; or an empty one"
  return tuple(data.value("synthetic", _are_weights, remedy).items())


def _are_weights(value):
  if not isinstance(value, ConfigDict) or not set(value) <= set(QUESTION_KINDS):
    return False
  weights = list(value.values())
  usable = all(is_number(weight) and weight >= 0 for weight in weights)
  return usable and (not weights or sum(weights) > 0)


def _are_frames(value):
  pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(is_count, value))
  return pair and value[0] <= value[1] and not any(number % CLIP_FRAMES for number in value)


def _eval(config):
  section = Section(config, "eval", _names(EvalSettings))
  return EvalSettings(section.text("mixture"), section.count("every"), section.count("batches"))


def _checkpoint(config):
  checkpoint = Section(config, "checkpoint", _names(CheckpointSettings))
  every, keep = (checkpoint.count(name) for name in ("every", "keep"))
  return CheckpointSettings(every, keep, checkpoint.count("keep_every", 0))


def _is_profile(value):
  steps = isinstance(value, tuple | list) and all(map(is_count, value))
  return steps and (not value or (len(value) == 2 and value[0] <= value[1]))
