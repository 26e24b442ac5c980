"""A training config, checked and typed."""

import dataclasses

from ml_collections import ConfigDict

from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.parallel.layout import SEQUENCE_PARALLEL
from videochat_flash_jax.parallel.mesh import MeshConfig
from videochat_flash_jax.train.config_checks import are_names, is_count, is_number, require

PARTS = ("vision", "connector", "decoder")
MODELS = tuple(
  name for name, member in vars(VideoChatFlashConfig).items() if isinstance(member, classmethod)
)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """What a step on a mesh is made of.

  Attributes:
    model: sizes of the model, and of the pictures that it is trained on.
    trained: names of its parts that are trained; the others are frozen.
    mesh: how many devices stand along each axis.
    sequence_parallel: see `parallel.layout.Layout`.
    zigzag: see `parallel.layout.Layout`.
    rows: of a step, on all devices together.
    tokens_per_row: conversations are packed into rows of so many tokens.
    clips_per_shard: room for clips on each part of a row's tokens.
    tiles_per_shard: room for image tiles on each; 0 where nothing but videos is read.
    frames: the least and the most frames of a video.
    num_steps: of the run.
    learning_rate: the highest.
    vision_learning_rate: the highest for the video encoder.
  """

  model: VideoChatFlashConfig
  trained: tuple[str, ...]
  mesh: MeshConfig
  sequence_parallel: str
  zigzag: bool
  rows: int
  tokens_per_row: int
  clips_per_shard: int
  tiles_per_shard: int
  frames: tuple[int, int]
  num_steps: int
  learning_rate: float
  vision_learning_rate: float


def train_settings(config: ConfigDict) -> TrainSettings:
  """Checks a config such as configs/stage3_long.py, field by field.

  Raises:
    InputError: names the first field that is missing or cannot be used, and what to give.
  """
  model, trained, frames = (config.get(name) for name in ("model", "trained", "frames"))
  require(model in MODELS, "model", model, f"one of {', '.join(MODELS)}")
  usable = are_names(trained) and set(trained) <= set(PARTS)
  require(usable, "trained", trained, f"names out of {PARTS}")
  kind, zigzag = config.get("sequence_parallel"), config.get("zigzag")
  require(kind in SEQUENCE_PARALLEL, "sequence_parallel", kind, " or ".join(SEQUENCE_PARALLEL))
  require(isinstance(zigzag, bool), "zigzag", zigzag, "True or False")
  tiles = config.get("tiles_per_shard")
  require(is_count(tiles, 0), "tiles_per_shard", tiles, "0 or a positive integer")
  usable = isinstance(frames, tuple | list) and len(frames) == 2 and all(map(is_count, frames))
  usable = usable and frames[0] <= frames[1]
  require(usable, "frames", frames, "the least and the most frames, such as (64, 512)")
  return TrainSettings(
    model=_model(model, config.get("image_size")),
    trained=tuple(trained),
    mesh=_mesh(config.get("mesh")),
    sequence_parallel=kind,
    zigzag=zigzag,
    tiles_per_shard=tiles,
    frames=tuple(frames),
    **{name: _count(config, name) for name in ("rows", "tokens_per_row", "clips_per_shard")},
    **{name: _rate(config, name) for name in ("learning_rate", "vision_learning_rate")},
    num_steps=_count(config, "num_steps"),
  )


def _model(name, image_size):
  model = getattr(VideoChatFlashConfig, name)()
  patch = model.vision.patch_size
  usable = is_count(image_size) and image_size % patch == 0
  require(usable, "image_size", image_size, f"pixels, a multiple of {patch} for {name}")
  vision = dataclasses.replace(model.vision, image_size=image_size)
  return dataclasses.replace(model, vision=vision)


def _mesh(mesh):
  fields = [field.name for field in dataclasses.fields(MeshConfig)]
  known = isinstance(mesh, ConfigDict) and set(mesh) <= set(fields)
  require(known, "mesh", mesh, f"a ConfigDict with fields out of {', '.join(fields)}")
  for name, size in mesh.items():
    require(type(size) is int, f"mesh.{name}", size, "a positive integer, or -1 for what is left")
  return MeshConfig(**mesh)


def _count(config, name):
  require(is_count(config.get(name)), name, config.get(name), "a positive integer")
  return config[name]


def _rate(config, name):
  rate = config.get(name)
  require(is_number(rate) and rate > 0, name, rate, "a positive number")
  return float(rate)
