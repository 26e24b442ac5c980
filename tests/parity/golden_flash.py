"""The whole model of golden family 06: inputs, rows of sequences, and what it makes of them."""

import functools
import re

import numpy as np
from flax import nnx

from tests.conftest import Golden
from tests.parity.golden_models import decoder_config, load_golden, pixels_of, vision_config
from videochat_flash_jax.data.media.image_tiling import sequence_order
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL, VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.models.config import ConnectorConfig, DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

FAMILY = Golden("06_flash_full")
MANIFEST = FAMILY.json()
INPUTS = FAMILY.tensors("inputs")
NAMES = [key.removesuffix("_u8") for key in INPUTS if key.endswith("_u8")]
CLIP_FRAMES = MANIFEST["config"]["mm"]["mm_local_num_frames"]
TILE_TOKENS = MANIFEST["single_image_tokens"]["one_crop_4d"]
VIDEOS = [  # as many tokens for a clip as for a tile of an image
  name
  for name in NAMES
  if MANIFEST["lengths"][name]["image_tokens"] * CLIP_FRAMES
  == len(INPUTS[f"{name}_u8"]) * TILE_TOKENS
]
IMAGES = [name for name in NAMES if name not in VIDEOS]
GRIDS = [
  tuple(map(int, re.fullmatch(r"grid_w(\d+)_h(\d+)", grid).groups()))
  for grid in FAMILY.json("layout.json")["layouts"]
]
LONGEST = max(lengths["total_len"] for lengths in MANIFEST["lengths"].values()) + 32

HIDDEN_TOLERANCE = 2e-5  # relative
GRADIENT_TOLERANCE = 5e-5  # relative
LOGIT_TOLERANCE = 1e-4  # absolute
LOSS_TOLERANCE = 1e-5  # absolute


def make_flash(dropout: DropoutConfig | None = None) -> VideoChatFlash:
  """The model, with arrays of its own."""
  tensors = FAMILY.tensors("weights")
  sizes = MANIFEST["config"]
  fc1_bias = next(tensors[name] for name in tensors if name.endswith("blocks.0.mlp.fc1.bias"))
  config = VideoChatFlashConfig(
    "golden",
    vision_config(sizes["tower"], len(fc1_bias)),
    ConnectorConfig(TILE_TOKENS, sizes["projector"]["num_attention_heads"]),
    decoder_config(sizes["llm"]),
    dropout=dropout,
  )
  return load_golden(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0)), tensors)


@functools.cache
def load_flash() -> VideoChatFlash:
  """The model, for all tests that leave it as it is."""
  return make_flash()


def clips_of(name: str):
  """Pixels [C, F, height, width, 3] of an input: clips of a video, or tiles of an image."""
  frames = INPUTS[f"{name}_u8"]
  pixels = pixels_of(frames, MANIFEST["config"]["tower"]["img_size"] // frames.shape[-1])
  return pixels.reshape(-1, CLIP_FRAMES if name in VIDEOS else 1, *pixels.shape[1:])


@nnx.jit
def run_encoder(model, clip):
  features = model.vision(clip)
  return features, model.connector(features)


@functools.cache
def encoded(name: str) -> tuple[np.ndarray, np.ndarray]:
  """The encoder's features [C, P, E] and the visual tokens [C, V, D], clip after clip."""
  parts = [run_encoder(load_flash(), clip[None]) for clip in clips_of(name)]
  return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def visual_tokens_of(*names: str) -> np.ndarray:
  """Visual tokens [V, D] of a row of these inputs."""
  width = load_flash().config.decoder.width
  tokens = [encoded(name)[1].reshape(-1, width) for name in names]
  return np.concatenate([np.zeros((0, width), np.float32), *tokens])


def order_of(name: str) -> np.ndarray:
  """The order in which an input's visual tokens enter the sequence."""
  if name in VIDEOS:
    return np.arange(len(clips_of(name)) * TILE_TOKENS)
  return sequence_order(*grid_of(name), TILE_TOKENS)


def grid_of(name: str) -> tuple[int, int]:
  """Columns and rows of an image: a stored layout with as many tiles, and what words tell.

  Of images with as many tiles the first has the first size in the manifest's words, and so on.
  """
  num_tiles = {image: len(INPUTS[f"{image}_u8"]) for image in IMAGES}
  alike = [image for image in IMAGES if num_tiles[image] == num_tiles[name]]
  tile = MANIFEST["config"]["tower"]["img_size"]
  pairs = re.findall(r"\((\d+), ?(\d+)\)", MANIFEST["inputs"])
  written = [(int(width) // tile, int(height) // tile) for width, height in pairs]
  layouts, written = (  # beside its tiles stands the whole image
    [grid for grid in grids if grid[0] * grid[1] + 1 == num_tiles[name]]
    for grids in (GRIDS, written)
  )
  choices = [grid for grid in written if grid in layouts] or written or layouts
  assert choices, f"no grid of {num_tiles[name]} tiles in: {GRIDS}, {MANIFEST['inputs']}"
  return choices[min(alike.index(name), len(choices) - 1)]


def prompt_ids(row: dict, part: str | None = None) -> np.ndarray:
  """The prompt that a stored row's field names, or a part of its key, or else the first."""
  name = row.get("prompt") or part or "prompt"
  return INPUTS[name if name in INPUTS else f"{name}_ids"][0]


def row_of(ids: np.ndarray, *names: str) -> tuple[np.ndarray, np.ndarray]:
  """`token_ids` and `visual_index` of a row of one input per slot."""
  order, counts = [], []
  for name in names:
    counts.append(len(order_of(name)))
    order += (len(order) + order_of(name)).tolist()
  token_ids, index = open_slots(ids, counts)
  visual_index = np.where(index >= 0, np.array([*order, -1])[index], -1)
  return token_ids, visual_index.astype(np.int32)


def labels_in_sequence(ids, labels, visual_index) -> np.ndarray:
  """Labels of the text tokens in their places; visual tokens have none."""
  placed = np.full(len(visual_index), IGNORE_LABEL, np.int32)
  placed[visual_index < 0] = labels[ids != VISUAL_SLOT]
  return placed


def inputs_named(order) -> list[str | None]:
  """Inputs that words such as "video (8 frames)" mean; None for text."""
  names = []
  for words in order:
    match = re.match(r"(?:(image|video) \((\d+) |text)", words)
    assert match, words
    candidates = {"image": IMAGES, "video": VIDEOS, None: []}[match[1]]
    fitting = [name for name in candidates if len(INPUTS[f"{name}_u8"]) == int(match[2])]
    assert fitting or not candidates, words
    names.append(fitting[0] if fitting else None)
  return names


def unpadded(rows, counts) -> list[np.ndarray]:
  """Rows of a batch without their padding, by their attention mask."""
  return [row[seen == 1] for row, seen in zip(rows, counts, strict=True)]


def pad_rows(rows, fill, length: int | None = None) -> np.ndarray:
  """Rows of several lengths as one array; `fill` stands after their ends."""
  length = length or max(map(len, rows))
  widths = [[(0, length - len(row)), *[(0, 0)] * (row.ndim - 1)] for row in rows]
  return np.stack(
    [np.pad(row, width, constant_values=fill) for row, width in zip(rows, widths, strict=True)]
  )


@nnx.jit
def embeddings_and_logits(model, *batch):
  return model.embed_sequence(*batch), model.decoder.logits(model(*batch))


def cut(array, how: str):
  """`sub4`: every fourth token; `last8`: the last eight; `last`: the last alone."""
  if how.startswith("sub"):
    return array[:, :: int(how.removeprefix("sub"))]
  return array[:, -1] if how == "last" else array[:, -int(how.removeprefix("last")) :]
