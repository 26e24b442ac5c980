"""A decoder that drops visual tokens, as the TPU's compiler makes it (`make test-tpu`)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.benchmarks import ahead_of_time
from videochat_flash_jax.benchmarks.hlo_text import parse
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import weight_shardings

pytestmark = [pytest.mark.tpu, pytest.mark.usefixtures("in_haste")]

LENGTHS = (3072, 2048, 1024)  # of a row: before, between and after two drops
CHIPS, WIDTH = 4, 384


def layout_of_a_row():
  devices = ahead_of_time.topology_devices("v5e:2x2")
  return Layout(make_mesh(MeshConfig(fsdp=1, sequence=CHIPS), devices), zigzag=True)


def plan_of_a_row():
  """Two conversations, most of each visual; evenly spaced tokens stay, then the best of these."""
  is_visual = np.ones((1, LENGTHS[0]), bool)
  is_visual[:, ::16] = False
  segment_ids = np.repeat([[1, 2]], LENGTHS[0] // 2, axis=1).astype(np.int32)
  config = DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.6, 0.25))
  plan = plan_dropout(config, is_visual, segment_ids, ~is_visual, lambda n: -(-n // 1024) * 1024)
  assert [drop.indices.shape[1] for drop in plan.drops.values()] == [*LENGTHS[1:]]
  return plan


def narrow_decoder():
  """Three layers, each of which sees fewer tokens than the one before it."""
  sizes = {"width": WIDTH, "depth": 3, "num_heads": 3, "num_kv_heads": 1, "mlp_width": 640}
  decoder = VideoChatFlashConfig.qwen2_7b_res224().decoder
  return dataclasses.replace(decoder, vocab_size=512, **sizes)


def instructions_of(program):
  computations, _ = parse(program.compile().as_text())
  return [i for c in computations.values() for i in c.instructions.values()]


def tokens_of(layout, length=LENGTHS[0]):
  tokens = NamedSharding(layout.mesh, layout.spec("batch", "sequence"))
  return jax.ShapeDtypeStruct((1, length, WIDTH), jnp.bfloat16, sharding=tokens)


@pytest.fixture(scope="module")
def gradients():
  """Instructions of the gradients of all weights, for a row that is spread over all chips."""
  layout = layout_of_a_row()
  config = narrow_decoder()
  model = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
  graph, weights = nnx.split({"decoder": model})
  weights = nnx.to_pure_dict(weights)
  shardings = weight_shardings(layout.mesh, weights)

  def loss(weights, x, plan):
    hidden, _ = nnx.merge(graph, weights)["decoder"].read_and_drop(x, plan, layout)
    return (hidden.astype(jnp.float32) ** 2).sum()

  def shape(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  rows = NamedSharding(layout.mesh, layout.spec("batch"))
  plan = jax.tree.map(lambda array: shape(array, rows), plan_of_a_row())
  x = tokens_of(layout)
  program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(shardings, x.sharding))
  return instructions_of(program.lower(jax.tree.map(shape, weights, shardings), x, plan))


def whole_rows(instructions):
  """Arrays of a whole row that have more than a few numbers for each of its tokens."""
  shapes = {array.shape for instruction in instructions for array in instruction.arrays}
  held = [shape for shape in shapes if set(shape) & set(LENGTHS)]
  return [shape for shape in held if math.prod(shape) > CHIPS * LENGTHS[0]]


def largest_gathered(instructions):
  """Numbers in the largest array that any chip gets from all others at once."""
  kinds = ("all-gather", "all-reduce", "all-to-all")
  gathered = [i for i in instructions if i.opcode.startswith(kinds)]
  return max(math.prod(array.shape) for i in gathered for array in i.arrays)


def test_no_chip_holds_hidden_states_queries_or_keys_of_a_whole_row(gradients):
  """Of a row only numbers, such as places and scores, are ever whole."""
  assert whole_rows(gradients) == []


def test_nothing_as_large_as_hidden_states_is_gathered(gradients):
  assert largest_gathered(gradients) < LENGTHS[-1] * WIDTH


def test_gathered_hidden_states_would_be_seen():
  layout = layout_of_a_row()
  for length in LENGTHS:
    in_order = jax.jit(layout.from_zigzag, out_shardings=tokens_of(layout).sharding)
    instructions = instructions_of(in_order.lower(tokens_of(layout, length)))
    assert whole_rows(instructions)
    assert largest_gathered(instructions) >= length * WIDTH
