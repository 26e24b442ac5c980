"""The tables of docs/one_step.md are what the code computes, at real sizes; nothing is allocated.

Each row names the function that makes its array. While the real programs are traced, these
functions are watched: which arrays they give, and which gradients come back to them.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.parallel.chip_order_test import chips_of
from tests.watched_functions import Kind, Watched, arrays_of, kind, normal, watching
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.inference import engine as engine_module
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.conversation import MAX_NEW_TOKENS
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.feature_encoding import group_clips
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.program import train_program

ROOT = Path(__file__).parents[1]
FORWARD, BACK, QUESTION = range(3)
MOST_LINES = 48  # of a walk
SECONDS, FPS = 128, 25  # of the video
TEXT_BEFORE, TEXT_BEHIND = 27, 49  # tokens


class Row(NamedTuple):
  """A row of a table; `where` is a file and a function in it, if the row names them."""

  array: str
  shape: tuple[int, ...] | None
  split: PartitionSpec | None
  on_chip: tuple[int, ...] | None
  dtype: str
  where: str


def read_tables(text: str) -> list[list[Row]]:
  """The three tables: forward, back, question."""
  tables = re.findall(r"^\| .*\n\|---.*\n((?:\|.*\n)+)", text, re.M)
  return [[read_row(line) for line in table.splitlines()] for table in tables]


def read_row(line: str) -> Row:
  """A line as a `Row`."""
  array, *cells = [cell.strip() for cell in line.strip("|\n").split(" | ")]
  if len(cells) == 3:
    shape, dtype, where = cells
    return Row(array, read_shape(shape), None, None, dtype, where.strip())
  shape, split, on_chip, dtype, where = cells
  return Row(array, read_shape(shape), read_split(split), read_shape(on_chip), dtype, where)


def read_shape(cell: str) -> tuple[int, ...] | None:
  """The shape that a cell gives, or None for "-"."""
  return None if cell == "-" else tuple(map(int, re.findall(r"\d+", cell)))


def read_split(cell: str) -> PartitionSpec:
  """`(data, fsdp), -, tensor` as a spec."""
  parts = re.findall(r"\(([^)]*)\)|([\w-]+)", cell)
  return normal(
    tuple(several.split(", ")) if several else None if one == "-" else one for several, one in parts
  )


TEXT = (ROOT / "docs" / "one_step.md").read_text()
TABLES = read_tables(TEXT)


def function_of(row: Row) -> str:
  """`models/umt.py UMT.__call__`, of a row of the first or the last table."""
  file, name = re.fullmatch(r"`(\S+\.py)` `(\S+)`", row.where).groups()
  return f"{file} {name}"


class Step(NamedTuple):
  """The traced training step.

  Attributes:
    watched: the functions of the first table.
    inputs: by names, arrays of the batch and of the state: kinds, with how they are split.
    computed: as `splits`, of `arrays_of`.
    mesh: of the step.
  """

  watched: Watched
  inputs: dict[str, set[tuple[Kind, PartitionSpec]]]
  computed: set[Kind]
  splits: set[tuple[Kind, PartitionSpec]]
  mesh: jax.sharding.Mesh


@pytest.fixture(scope="module")
def step():
  """The step of the page: traced for chips that are not there."""
  names = [function_of(row) for row in TABLES[FORWARD] if "shard_row" not in row.where]
  with watching(names) as watched:
    settings = train_settings(read_config(ROOT / "configs" / "stage3_long.py", []))
    program = train_program(settings, chips_to_trace_for("v5e:8x8"))
    jaxpr = program.jitted_step.trace(program.state, program.batch).jaxpr.jaxpr
  computed, splits = arrays_of(jaxpr)
  inputs = defaultdict(set)
  moments = [optax.tree.get(program.state.optimizer, name) for name in ("mu", "nu")]
  for tree in (program.batch, program.state.trained, *moments):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      inputs[dotted_path(path)].add((kind(leaf), normal(leaf.sharding.spec)))
  return Step(watched, inputs, computed, splits, program.layout.mesh)


def chips_to_trace_for(topology: str):
  """Chips that are not there, of which a traced program asks a little more than a mesh does."""
  chips = chips_of(topology)
  for chip in chips:
    chip.device_kind = "TPU v5 lite"
    chip.process_index = 0
  return chips


def names_in(array: str) -> list[str]:
  """Names of a batch's or a state's arrays: `token_ids`, `labels`."""
  return re.findall(r"`([\w.]+)`", array)


def check_array(row: Row, step: Step):
  """The step makes the array of a row of the first table."""
  if "shard_row" in row.where:
    for name in names_in(row.array):
      assert step.inputs[name] == {((row.dtype, row.shape), row.split)}
  elif row.array.startswith("logits"):  # which are there within the function only
    assert (row.dtype, row.on_chip) in step.computed
  else:
    of_function = row.on_chip if row.shape is None else row.shape
    assert (row.dtype, of_function) in step.watched.results[function_of(row)]
  if row.shape is not None:
    check_split(row, step)


def check_gradient(row: Row, step: Step):
  """The step makes the gradient of a row of the second table."""
  if row.array.startswith("`decoder."):
    (name,) = names_in(row.array)
    assert step.inputs[name] == {((row.dtype, row.shape), row.split)}  # weight and both moments
  else:
    (forward,) = [other for other in TABLES[FORWARD] if f"**{row.array}**" in other.array]
    of_function = row.on_chip if row.shape is None else row.shape
    assert (row.dtype, of_function) in step.watched.gradients[function_of(forward)]
  if row.shape is not None:
    check_split(row, step)


def check_split(row: Row, step: Step):
  """What lies on all chips is split as the row says, and so into parts of the size it says."""
  if row.shape:
    assert ((row.dtype, row.shape), row.split) in step.splits
  assert NamedSharding(step.mesh, row.split).shard_shape(row.shape) == row.on_chip


def check_question(row: Row, question: Watched):
  """The question makes the array of a row of the last table."""
  assert (row.dtype, row.shape) in question.results[function_of(row)]


@pytest.mark.parametrize("row", TABLES[FORWARD], ids=lambda row: row.array)
def test_a_training_step_makes_these_arrays(row, step):
  check_array(row, step)


@pytest.mark.parametrize("row", TABLES[BACK], ids=lambda row: row.array)
def test_a_training_step_makes_these_gradients(row, step):
  check_gradient(row, step)


@pytest.mark.parametrize("row", TABLES[QUESTION], ids=lambda row: row.array)
def test_a_question_makes_these_arrays(row, question):
  check_question(row, question)


def test_every_array_in_bold_has_its_gradient_in_the_second_table():
  bold = [re.findall(r"\*\*(.+)\*\*", row.array) for row in TABLES[FORWARD]]
  bold = [name for names in bold for name in names]
  *activations, weight = [row.array for row in TABLES[BACK]]
  assert sorted(activations) == sorted(bold) and weight.startswith("`decoder.")


def test_what_has_no_bold_name_has_no_gradient(step):
  for row in TABLES[FORWARD]:
    if "**" not in row.array and not row.array.startswith("logits"):
      assert not step.watched.gradients.get(function_of(row)), row.array


@pytest.fixture(scope="module")
def question():
  """The functions of the last table, watched while the question of the page is traced."""
  config = VideoChatFlashConfig.qwen2_5_2b_res448()
  config = dataclasses.replace(config, dropout=DropoutConfig.model_card())
  vision = config.vision
  indices = inference_indices(SECONDS * FPS, FPS, config.sampling)
  frames = [resize(np.zeros((90, 120, 3), np.uint8), vision.image_size)] * len(indices)
  clips = list(group_clips(frames, vision.clip_frames))
  with (
    watching(map(function_of, TABLES[QUESTION])) as watched,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(engine_module, "unstack_decoder", lambda decoder: None)
    for name in ("encode", "read", "last_queries", "score", "decode"):
      patch.setattr(programs, name, zeros_of(getattr(programs, name), watched))
    shapes = nnx.eval_shape(
      lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    )
    engine = Engine(shapes, stop_ids=[0])
    prefix = Prefix(engine)
    prefix.add_text(np.arange(TEXT_BEFORE))
    prefix.expect(len(clips) * config.clip_tokens)
    for visual_tokens in engine.encode_groups(clips):
      prefix.add_visual(visual_tokens)
    prefix.settle()
    reading = engine.read([np.arange(TEXT_BEHIND)], MAX_NEW_TOKENS, behind=[prefix])
    next(engine.write(reading, MAX_NEW_TOKENS))
  watched.note("data/media/frame_sampling.py inference_indices", indices)
  watched.note("data/media/resize.py resize", frames[0])
  watched.note("inference/feature_encoding.py group_clips", clips[0])
  return watched


def zeros_of(program, watched: Watched):
  """In place of a program of the engine: traces it, and gives zeros of its shapes."""

  @functools.wraps(program)
  def run(*arguments):
    """Takes in what the program would give."""
    watched.note_shapes(f"inference/programs.py {program.__name__}", program, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), program.eval_shape(*arguments))

  return run


def test_the_mesh_in_the_text_is_that_of_the_step(step):
  sizes = ", ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items())
  assert f"mesh of these {step.mesh.size} chips is {sizes}," in " ".join(TEXT.split())


def test_each_walk_fits_a_screen():
  walks = TEXT.split("\n## ")[1:]
  assert len(walks) == 2 and len(TABLES) == 3
  assert all(len(walk.splitlines()) <= MOST_LINES for walk in walks)


def others(row: Row) -> Iterator[Row]:
  """Yields the row with a dtype, with sizes and with a split that are not its own."""
  yield row._replace(dtype="float16")
  for column in ("shape", "on_chip"):
    if getattr(row, column) is not None:
      yield row._replace(**{column: (*getattr(row, column), 2)})
  if row.shape and row.split is not None:
    yield row._replace(split=PartitionSpec("data"))


@pytest.mark.parametrize(
  "number, check", [(FORWARD, check_array), (BACK, check_gradient), (QUESTION, check_question)]
)
def test_other_numbers_would_be_seen(number, check, step, question):
  for row in TABLES[number]:
    for other in others(row):
      with pytest.raises(AssertionError):
        check(other, question if number == QUESTION else step)
