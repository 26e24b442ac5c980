"""Attention as the TPU's compiler makes it: ahead of time, with no TPU (`make test-tpu`)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.precision import exact_products
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu

HEADS = {"7B": (28, 4), "2B": (12, 2)}  # of queries, and of keys and values
HEAD_SIZE = 128
LENGTH = 1 << 17
KERNELS = {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}


def layout_on(topology, kind="ring", **options):
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  return Layout(make_mesh(MeshConfig(fsdp=1, sequence=4), devices), kind, zigzag=True)


def compiled(layout, attend, shapes, axes, dtype=jnp.bfloat16):
  """The program for the result and gradients of `attend`, whose operands have these shapes."""

  def loss(*operands):
    return jnp.sum(attend(*operands).astype(jnp.float32) ** 2)

  sharding = NamedSharding(layout.mesh, layout.spec(*axes))
  operands = [
    jax.ShapeDtypeStruct(shape, dtype if len(shape) == 4 else jnp.int32, sharding=sharding)
    for shape in shapes
  ]
  gradients = exact_products(dtype)(jax.value_and_grad(loss, (0, 1, 2)))
  return jax.jit(gradients).lower(*operands).compile()


@functools.cache
def program(kind, model, length):
  """Causal self-attention of one packed row that is spread over four chips."""
  num_heads, num_kv_heads = HEADS[model]
  shapes = [(1, length, heads, HEAD_SIZE) for heads in (num_heads, num_kv_heads, num_kv_heads)]
  layout = layout_on("v5e:2x2", kind)
  attend = functools.partial(self_attention, layout=layout)
  return compiled(layout, attend, [*shapes, (1, length)], ("batch", "sequence"))


def kernels(program):
  call = r"%(splash_mha_[a-z]+)\S* = .* custom_call_target=\"tpu_custom_call\""
  return set(re.findall(call, program.as_text()))


def test_the_kernels_of_an_exact_float32_program_compile():
  layout, axes = layout_on("v5e:2x2"), ("batch", "sequence")
  shapes = [(1, 2048, heads, HEAD_SIZE) for heads in (12, 2, 2)]
  attend = functools.partial(self_attention, layout=layout)
  with jax.default_matmul_precision(None):  # as users have it
    exact = compiled(layout, attend, [*shapes, (1, 2048)], axes, jnp.float32)
  assert kernels(exact) == KERNELS


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_a_sharded_sequence_is_attended_to_by_kernels(kind, model):
  assert kernels(program(kind, model, LENGTH)) == KERNELS


def test_a_ring_passes_on_and_gathers_nothing():
  text = program("ring", "7B", LENGTH).as_text()
  assert " collective-permute-start(" in text
  assert not re.search(r" (all-gather|all-to-all)(-start)?\(", text)


def test_keys_and_values_travel_while_a_block_is_computed():
  text = program("ring", "7B", LENGTH).as_text()
  assert "is_scheduled=true" in text  # the order of the text is the order of execution
  bodies = []  # of the loops over hops; there a block is skipped or computed in a `conditional`
  for computation in text.split("\n}\n"):
    if " collective-permute-start(" in computation and not re.search(r"(?m)^ENTRY", computation):
      bodies.append(computation)
  assert len(bodies) == 2, "results, and gradients"
  sent = [re.findall(r"%(\S+) = \(b?f\d+\S+ .* collective-permute-start\(", b) for b in bodies]
  assert sorted(map(len, sent)) == [2, 4], "keys and values; on the way back their gradients, too"
  for body, starts in zip(bodies, sent, strict=True):
    block = body.index(" conditional(")
    for start in starts:
      assert body.index(f"%{start} = ") < block < body.index(f" collective-permute-done(%{start})")


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_memory_is_linear_in_the_length(kind):
  """Four times the length: at single lengths the compiler finds more arrays that share memory."""
  lengths = LENGTH // 2, 2 * LENGTH
  sizes = [program(kind, "7B", n).memory_analysis().temp_size_in_bytes for n in lengths]
  assert 0 < sizes[1] < 4 * 1.1 * sizes[0]


@pytest.mark.parametrize(
  "topology, options",
  [("v4:2x2x1", {"chip_config_name": "megacore"}), ("v5p:2x2x1", {}), ("v6e:2x2", {})],
)
@pytest.mark.parametrize("case", ["decoder", "encoder"])
def test_blocks_fit_the_fast_memory_of_every_chip(topology, options, case):
  layout = layout_on(topology, **options)
  shapes = {
    "decoder": [(4, 4096, heads, HEAD_SIZE) for heads in (28, 4, 4)],
    "encoder": [(4, 4 * 14 * 14, 16, 64)] * 3,
  }[case]
  attend = functools.partial(attention, causal=case == "decoder")
  spread = layout.shard_map(attend, [("clips",)] * 3, ("clips",))
  assert kernels(compiled(layout, spread, shapes, ("clips",))) == KERNELS
