"""A small mixture of videos, images and text, and a config that packs it."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.media.video_files import pictures, write_video
from videochat_flash_jax.data.batches.data_config import DataConfig, ExampleConfig
from videochat_flash_jax.data.batches.sharded_rows import RowShape
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.data.text.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[3]
VOCABULARY = Path(__file__).parents[2] / "golden" / "08_text"
make_tokenizer = functools.partial(BPETokenizer, VOCABULARY)
SIZE, CLIP_TOKENS = 32, 4


def config(**changes) -> DataConfig:
  """Two rows of 256 tokens over two zigzag shards; a clip of 4 frames is 4 tokens."""
  example = {"image_size": SIZE, "frames": (4, 32), "position_skip": 50}
  row_shape = {
    "tokens": 256, "clip_tokens": CLIP_TOKENS, "clips_per_shard": 24, "tiles_per_shard": 40,
    "num_shards": 2, "zigzag": True,
  }  # fmt: skip
  whole = {"rows": 2, "seed": 3}
  for name, value in changes.items():
    for part, values in ((ExampleConfig, example), (RowShape, row_shape), (DataConfig, whole)):
      if name in {field.name for field in dataclasses.fields(part)}:
        values[name] = value
  return DataConfig(ExampleConfig(**example), RowShape(**row_shape), **whole)


def conversation(opening: str, number: int) -> list[dict]:
  """A question and an answer that no other row has."""
  question = f"{opening}What is shown in number {number}?" + " Tell me more." * (number % 4)
  return [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number}."}]


def write_mixture(folder: Path, num_videos: int = 12, num_images: int = 8, num_texts: int = 10):
  """Writes annotations and media, and gives the path of the mixture."""
  videos, images, texts = [], [], []
  for number in range(num_videos):
    name = f"{number}.mp4"
    write_video(folder / name, pictures(8 + number * 56 // max(num_videos - 1, 1), 32, 32), fps=4)
    videos.append({"id": f"video {number}", "video": name})
  videos += [videos[-1] | {"start": 2, "end": 9.5}]
  for number in range(num_images):
    noise = np.random.default_rng(number).integers(0, 255, (40 + 9 * number, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"{number}.png")
    images.append({"id": f"image {number}", "image": f"{number}.png"})
  images += [{"id": "two images", "image": ["0.png", "1.png"]}] if num_images else []
  texts = [{"id": f"text {number}"} for number in range(num_texts)]
  entries = []
  for kind, rows in (("video", videos), ("image", images), ("text", texts)):
    for number, row in enumerate(rows):
      media = row.get(kind, [])
      opening = "<image>\n" * (1 if isinstance(media, str) else len(media))
      row["conversations"] = conversation(opening, number)
    if rows:
      (folder / f"{kind}s.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
      entries.append({"json_path": f"{kind}s.jsonl"})
      entries[-1] |= {"data_root": str(folder)} if kind != "text" else {"media_type": "text"}
  path = folder / "mixture.yaml"
  path.write_text(json.dumps({"datasets": entries}))  # JSON is YAML
  return path


def read_rows(mixture: Path):
  """The rows of a mixture, indexed beside it."""
  return open_rows(read_mixture(mixture), mixture.parent / "cache")


def assert_tells_its_own_error_alone(code: str, mixture: Path):
  """Runs a program that is given the mixture, reads batches, and fails with "of its own"."""
  process = subprocess.run(
    [sys.executable, "-c", code, str(mixture)],
    env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
  )  # fmt: skip
  assert process.stderr.endswith("ValueError: of its own\n") and process.returncode == 1
  assert process.stderr.count("Traceback") == 1
