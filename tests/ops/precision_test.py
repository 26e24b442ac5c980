"""float32 means float32: of such a program every product is exact, on every kind of device."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from tests.train.run_test import small
from videochat_flash_jax.inference import programs
from videochat_flash_jax.inference.program_shapes import decode_program, prefill_program
from videochat_flash_jax.ops.attention import attention
from videochat_flash_jax.ops.precision import exact_products
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.program import train_program

EXACT = (Precision.HIGHEST, Precision.HIGHEST)
DEFAULT = (Precision.DEFAULT, Precision.DEFAULT)


@pytest.fixture(autouse=True)
def _default_precision():
  """As users have it; tests otherwise ask for the highest everywhere."""
  with jax.default_matmul_precision(None):
    yield


def products(program):
  """The dtype of the operands, and the precision, of every product of a program."""
  for equation in program.eqns:
    if equation.primitive.name == "dot_general":
      dtypes = {operand.aval.dtype.name for operand in equation.invars}
      yield dtypes, equation.params["precision"]
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr)
    ):
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, jax.extend.core.Jaxpr):
        yield from products(inner)


def step_program(compute_dtype, **changes):
  settings = train_settings(small(optimizer__name="muon", compute_dtype=compute_dtype, **changes))
  program = train_program(settings, jax.devices()[:1])
  return [
    traced.jaxpr.jaxpr
    for traced in (
      program.step.trace(program.state, program.batch),
      program.evaluate.trace(program.state, program.batch),
    )
  ]


def inference_programs(dtype):
  """The programs that encode a clip, read a part of a video and write answers."""
  model = train_settings(small()).model
  mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
  sizes = {"num_tokens": 64, "num_visual": 24}

  def in_dtype(x):
    is_rounded = getattr(x, "dtype", None) == jnp.bfloat16
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding) if is_rounded else x

  program, arguments = prefill_program(model, mesh, **sizes)
  yield program.trace(*jax.tree.map(in_dtype, arguments)).jaxpr.jaxpr
  program, arguments = decode_program(model, mesh, rows=2, **sizes, max_new_tokens=8)
  graph, layout, *others = arguments
  others = jax.tree.map(in_dtype, others)
  yield program.trace(graph, layout, *others).jaxpr.jaxpr
  clips = jax.ShapeDtypeStruct((1, 1, 4, 32, 32, 3), jnp.uint8)
  yield programs.encode.trace(graph, layout, others[0], clips).jaxpr.jaxpr


@pytest.mark.parametrize("make", [step_program, inference_programs])
def test_all_products_in_float32_are_exact(make):
  for program in make("float32"):
    found = list(products(program))
    assert len(found) > 5
    assert all(dtypes == {"float32"} and precision == EXACT for dtypes, precision in found), found


@pytest.mark.parametrize("make", [step_program, inference_programs])
def test_in_bfloat16_only_what_merges_tokens_is_exact(make):
  """It compares in float32 which tokens are alike."""
  for program in make("bfloat16"):
    rounded = [precision for dtypes, precision in products(program) if "bfloat16" in dtypes]
    assert len(rounded) > 5
    assert sum(precision == EXACT for precision in rounded) <= 2  # the sums of merged features


@pytest.mark.parametrize("dtype, expected", [(jnp.float32, EXACT), (jnp.bfloat16, DEFAULT)])
def test_the_kernel_for_tpus_computes_in_the_precision_of_its_program(dtype, expected):
  q, k, v = (jnp.ones((1, 128, heads, 128), dtype) for heads in (2, 1, 1))

  def loss(*qkv):
    return attention(*qkv, causal=True, implementation="splash").astype(jnp.float32).sum()

  gradients = exact_products(jnp.dtype(dtype))(jax.value_and_grad(loss, (0, 1, 2)))
  found = list(products(jax.make_jaxpr(gradients)(q, k, v).jaxpr))
  assert len(found) >= 2 + 5
  assert {precision for _, precision in found} == {expected}


def test_other_programs_keep_the_precision_that_their_caller_asks_for():
  def precisions(dtype):
    with jax.default_matmul_precision("tensorfloat32"), exact_products(dtype):
      program = jax.make_jaxpr(jnp.dot)(jnp.ones((2, 2)), jnp.ones((2, 2)))
    return [precision for _, precision in products(program.jaxpr)]

  assert precisions(jnp.float32) == [EXACT]
  assert precisions(jnp.bfloat16) == [(Precision.HIGH, Precision.HIGH)]
