"""What chips of other kinds, and several slices, send in a training step (`make test-tpu`)."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from tests.tpu.programs_test import (
  CHIPS,
  LENGTH,
  SHARDS,
  gathered_along_the_sequence,
  small_settings,
  strangers,
)
from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.benchmarks.hlo_text import parse
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.train.program import train_program

pytestmark = [pytest.mark.tpu, pytest.mark.usefixtures("in_haste")]

DEPTH = 2


def compiled_step(mesh, topology, **changes):
  """A step of a shallow model, its state, and the text of its program."""
  settings = dataclasses.replace(small_settings(), **changes)
  model, parts = settings.model, {}
  for name in ("decoder", "vision"):
    parts[name] = dataclasses.replace(getattr(model, name), depth=DEPTH)
  settings = dataclasses.replace(settings, model=dataclasses.replace(model, **parts), mesh=mesh)
  program = train_program(settings, ahead_of_time.topology_devices(topology, mesh.num_slices))
  return program.state, program.step.lower(program.state, program.batch).compile().as_text()


@pytest.fixture(scope="module")
def torus():
  """On v5p, whose compiler writes gathers as sums where it thinks that faster."""
  return compiled_step(MeshConfig(fsdp=2, sequence=SHARDS), "v5p:2x2x2")


def test_on_a_torus_nothing_like_hidden_states_is_gathered(torus):
  state, text = torus
  assert strangers(text, state) == []
  assert all(size <= CHIPS * LENGTH for size in gathered_along_the_sequence(text))
  assert program_costs(text).guessed_loops == 0


def test_gathered_hidden_states_would_be_seen_on_a_torus(torus):
  devices = ahead_of_time.topology_devices("v5p:2x2x1")
  layout = Layout(make_mesh(MeshConfig(fsdp=1, sequence=SHARDS), devices), zigzag=True)
  tokens = NamedSharding(layout.mesh, layout.spec("batch", "sequence"))
  width = small_settings().model.decoder.width
  x = jax.ShapeDtypeStruct((1, LENGTH, width), jnp.bfloat16, sharding=tokens)
  in_order = jax.jit(layout.from_zigzag, out_shardings=tokens)
  text = in_order.lower(x).compile().as_text()
  assert strangers(text, torus[0])
  assert max(gathered_along_the_sequence(text)) >= LENGTH * width


def sent_between_slices(text):
  """Bytes that a chip sends to another slice in a step."""
  computations, entry = parse(text)
  return sum(
    instruction.arrays[0].num_bytes * (1 if name == entry else DEPTH)  # else of each layer
    for name, computation in computations.items()
    for instruction in computation.instructions.values()
    if instruction.opcode == "send"
  )


def test_only_gradients_cross_from_slice_to_slice_and_each_once():
  """Beside them, a few sums of the loss. Of each gradient every chip of a slice sends its part."""
  mesh = MeshConfig(data=2, fsdp=1, sequence=SHARDS, num_slices=2)
  state, text = compiled_step(mesh, "v5e:2x2")
  parts = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.trained))
  gradients = 2 * sum(map(math.prod, parts))  # in bfloat16
  assert sent_between_slices(text) == pytest.approx(gradients, rel=0.01)
  assert program_costs(text).sizes["between slices"] == sent_between_slices(text)
  assert "xla_megascale" in text, "which is what carries them"


def test_where_it_is_asked_for_all_gradients_are_added_up_in_float32():
  """The compiler may compute in bfloat16 what is converted to it afterwards."""
  mesh = MeshConfig(fsdp=2, sequence=SHARDS)
  _, text = compiled_step(mesh, "v5e:2x4", gradient_dtype="float32")
  computations, _ = parse(text)
  arrays = {
    (instruction.opcode.removesuffix("-start"), array.num_bytes // math.prod(array.shape))
    for computation in computations.values()
    for instruction in computation.instructions.values()
    for array in instruction.arrays
    if len(array.shape) == 2  # weights of a layer, or the head; hidden states have a batch, too
  }
  assert {("all-reduce", 4), ("reduce-scatter", 4), ("all-gather", 2)} <= arrays
  assert not {("all-reduce", 2), ("reduce-scatter", 2)} & arrays
  decoder = small_settings().model.decoder
  columns = decoder.width // mesh.fsdp // mesh.sequence
  assert re.search(rf"= f32\[{decoder.vocab_size},{columns}\]\S* scatter\(", text)
