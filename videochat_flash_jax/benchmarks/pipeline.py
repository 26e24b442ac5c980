"""`vcflash bench pipeline`: does the training step wait for its batches?

Rows like those of stage 3 are packed from text and from H.264 videos, with 64 to 512 frames of each
video. The consumer takes a batch and then sleeps as long as a training step takes, as a host waits
for its accelerator. The time of a step is measured first: a complete training step of a small model
on this machine, on an eighth of a row, times eight. Real models and real chips are both much
larger; the result that also holds for them is the number of frames per second.
"""

import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.benchmarks.comparison import usable_cores
from videochat_flash_jax.benchmarks.read_files import write_film
from videochat_flash_jax.benchmarks.timing import time_in_turns
from videochat_flash_jax.data.batches.data_config import DataConfig, ExampleConfig
from videochat_flash_jax.data.batches.sharded_rows import PER_TOKEN, RowShape
from videochat_flash_jax.data.batches.train_batches import batch_metrics, mixture_batches
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import Rows, open_rows
from videochat_flash_jax.data.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.synthetic.training import vocabulary_lines
from videochat_flash_jax.train.device_batches import device_batches
from videochat_flash_jax.train.losses import answer_loss
from videochat_flash_jax.train.step import make_step, split_state

_STEP_PARTS = 8  # of a row; the step is measured on one part
_CLIP_TOKENS, _CLIP_FRAMES = 64, 4
_VOCABULARY = 768
_ROWS_ABOUT_FILM = 8, 4, 2, 1  # rows per film, from the shortest film to the longest
_PATCH_SIZE = 16
_STEP_WIDTH = 32  # of the encoder of the small model
_WORKERS = 2, 0


@dataclasses.dataclass(frozen=True)
class Load:
  """The data that is read and packed.

  Attributes:
    film_frames: number of frames of each film, at 30 per second.
    height: of the films, in pixels.
    width: of the films, in pixels.
    num_texts: annotation rows without a film.
    tokens: tokens of a training row.
    image_size: size of the sampled frames, in pixels.
    frames: the least and the most frames that are sampled from a film.
    num_batches: how many batches are taken without a pause, and again with the pause of a step.
  """

  film_frames: tuple[int, ...] = (2000, 4000, 8000, 16_000)
  height: int = 224
  width: int = 398
  num_texts: int = 10
  tokens: int = 16_384
  image_size: int = 224
  frames: tuple[int, int] = (64, 512)
  num_batches: int = 2


STAGE3_LIKE = Load()


def run(load: Load = STAGE3_LIKE) -> dict[str, Any]:
  """Writes the films, measures a step, and takes batches, with and without worker processes."""
  step_seconds = _step_seconds(load)
  with tempfile.TemporaryDirectory() as folder:
    rows = open_rows(read_mixture(_write_mixture(Path(folder), load)), folder, load.frames[1])
    vocabulary = Path(folder) / "vocabulary.model"
    train_sentencepiece(vocabulary_lines(), vocabulary, _VOCABULARY)
    make_tokenizer = functools.partial(SentencePieceTokenizer, vocabulary)
    measured = {
      f"workers {workers}": _consume(load, workers, rows, make_tokenizer, step_seconds)
      for workers in _WORKERS
    }
  return {
    "name": "pipeline",
    "threads": usable_cores(),
    "load": dataclasses.asdict(load),
    "step": {
      "seconds": step_seconds,
      "what": f"training step of a small model (one layer of width {_STEP_WIDTH}, one of 128) on "
      f"this machine, measured on 1/{_STEP_PARTS} of a row and scaled; the consumer sleeps as long",
    },
    **measured,
  }


def summary(report: dict[str, Any]) -> str:
  """A report as text, with one line for each number of workers.

  pipeline (2 threads), rows of 16384 tokens, a step of 4.1 s
    workers 2     412 frames/s   tokens filled 98.1 %   waits 0.3 % of the time
  """
  lines = [
    f"pipeline ({report['threads']} threads), rows of {report['load']['tokens']} tokens, "
    f"a step of {report['step']['seconds']:.3g} s"
  ]
  for name in (f"workers {workers}" for workers in _WORKERS):
    found = report[name]
    lines.append(
      f"  {name}{found['frames_per_second']:8.4g} frames/s   tokens filled "
      f"{100 * found['tokens_filled']:.1f} %   waits {100 * found['wait_share']:.1f} % of the time"
    )
  return "\n".join(lines)


def _config(load: Load, workers: int) -> DataConfig:
  return DataConfig(
    ExampleConfig(image_size=load.image_size, frames=load.frames),
    RowShape(load.tokens, _CLIP_TOKENS, clips_per_shard=load.tokens // _CLIP_TOKENS),
    rows=1,
    seed=0,
    workers=workers,
  )


def _consume(load: Load, workers: int, rows: Rows, make_tokenizer, step: float) -> dict[str, float]:
  """Takes batches without a pause, then with a pause of `step` seconds after each batch."""
  config = _config(load, workers)
  layout = Layout(make_mesh(MeshConfig(), jax.devices()[:1]))
  shardings = dict.fromkeys((*PER_TOKEN, "frames"), NamedSharding(layout.mesh, layout.spec()))
  batches = device_batches(mixture_batches(config, rows, make_tokenizer), shardings, config.rows)
  try:
    first_seconds, _ = _take(batches)
    taken = [_take(batches) for _ in range(load.num_batches)]
    seconds, num_frames = map(sum, zip(*taken, strict=True))
    _take(batches)
    time.sleep(step)
    waits = []
    for _ in range(load.num_batches):
      waits.append(_take(batches)[0])
      time.sleep(step)
    metrics = batch_metrics(batches.get_state())
  finally:
    batches.close()
  return {
    "first_batch_seconds": first_seconds,
    "batch_seconds": seconds / load.num_batches,
    "frames_per_batch": num_frames / load.num_batches,
    "frames_per_second": num_frames / seconds,
    "wait_share": sum(waits) / (sum(waits) + load.num_batches * step),
    "tokens_filled": metrics["tokens_filled"],
    "examples": metrics["examples"],
  }


def _take(batches) -> tuple[float, int]:
  """Seconds until the next batch is ready, and the number of its frames."""
  start = time.perf_counter()
  batch = jax.block_until_ready(next(batches))
  seconds = time.perf_counter() - start
  num_visual = int((np.asarray(batch["visual_index"]) >= 0).sum())
  return seconds, num_visual // _CLIP_TOKENS * _CLIP_FRAMES


def _step_seconds(load: Load) -> float:
  """Seconds of a training step on one row."""
  tiny = VideoChatFlashConfig.tiny()
  vision = {"image_size": load.image_size, "patch_size": _PATCH_SIZE, "num_heads": 1, "depth": 1}
  vision |= {"width": _STEP_WIDTH, "mlp_width": 2 * _STEP_WIDTH}
  config = dataclasses.replace(
    tiny,
    vision=dataclasses.replace(tiny.vision, **vision),
    connector=dataclasses.replace(tiny.connector, clip_tokens=_CLIP_TOKENS, merge_heads=1),
    decoder=dataclasses.replace(tiny.decoder, depth=1),
  )
  optimizer = optax.adamw(1e-4)
  model = VideoChatFlash(config, rngs=nnx.Rngs(0))
  graph, state = split_state(model, lambda path: True, optimizer)
  step = make_step(graph, answer_loss, optimizer)
  num_tokens, rng = load.tokens // _STEP_PARTS, np.random.default_rng(0)
  shape = 1, num_tokens // _CLIP_TOKENS, _CLIP_FRAMES, load.image_size, load.image_size, 3
  per_token = np.arange(num_tokens, dtype=np.int32)[None]
  batch = dict.fromkeys(("token_ids", "labels"), per_token % _VOCABULARY) | {
    "frames": rng.integers(0, 256, shape, np.uint8),
    # Every position has a visual token; which one it is does not change the time of a step.
    "visual_index": per_token,
    "positions": per_token,
    "segment_ids": np.ones_like(per_token),
  }
  batch = jax.device_put(batch)

  def take_step():
    """Runs one training step."""
    nonlocal state
    state, metrics = step(state, batch)
    return metrics

  return _STEP_PARTS * time_in_turns({"step": take_step}, repeats=3)["step"].median


def _write_mixture(folder: Path, load: Load) -> Path:
  """Writes films, rows about them and rows of text only; returns the path of the mixture."""
  rng, words = np.random.default_rng(0), " ".join(vocabulary_lines(20)).split()

  def conversation(opening: str, least: int, most: int) -> list[dict[str, str]]:
    """One question with an answer of random words, `least` to `most` of them."""
    answer = " ".join(rng.choice(words, rng.integers(least, most)))
    question = {"from": "human", "value": f"{opening}What happens?"}
    return [question, {"from": "gpt", "value": answer}]

  films, texts = [], []
  for number, num_frames in enumerate(load.film_frames):
    path = folder / f"{number}.mp4"
    write_film(path, num_frames, load.height, load.width, key_frame_distance=250)
    films += [
      {"video": str(path), "conversations": conversation("<image>\n", 50, 400)}
      for _ in range(_ROWS_ABOUT_FILM[number])
    ]
  texts = [{"conversations": conversation("", 200, 1500)} for _ in range(load.num_texts)]
  for name, rows in (("films", films), ("texts", texts)):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  mixture = folder / "mixture.yaml"
  mixture.write_text("datasets:\n  - json_path: films.jsonl\n  - json_path: texts.jsonl\n")
  return mixture
