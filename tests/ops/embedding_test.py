"""The embedding's gradient: summed in float32, and not by tokens that are no text; int8 tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from videochat_flash_jax.ops.embedding import embed
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

VOCABULARY, WIDTH = 32, 8
LAYOUTS = {
  "no mesh": lambda: ONE_DEVICE,
  "a mesh": lambda: Layout(make_mesh(MeshConfig(), jax.devices()[:1])),
}


def gradient_of(token_ids, layout=ONE_DEVICE, dtype=jnp.bfloat16, weights=1.0):
  """The gradient of the sum of all embeddings, each times its weight."""

  def loss(table):
    embedded = embed(table, jnp.asarray(token_ids), layout).astype(jnp.float32)
    return (embedded * jnp.asarray(weights)).sum()

  return jax.jit(jax.grad(loss))(jnp.zeros((VOCABULARY, WIDTH), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_thousands_of_equal_tokens_are_all_counted(layout):
  ids = np.full((2, 2060), 7, np.int32)
  ids[:, :12] = 3
  gradient = gradient_of(ids, LAYOUTS[layout]())
  assert gradient.dtype == jnp.bfloat16
  expected = np.zeros((VOCABULARY, WIDTH))
  expected[7], expected[3] = 4096, 24
  np.testing.assert_array_equal(np.asarray(gradient, np.float64), expected)


def test_the_sums_of_the_program_are_float32():
  program = str(jax.make_jaxpr(lambda: gradient_of([[1, 1]]))())
  (line,) = (line for line in program.splitlines() if "scatter-add" in line)
  assert f"f32[{VOCABULARY},{WIDTH}]" in line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_below_zero_read_a_row_and_give_it_no_gradient(layout):
  ids, weights = [[-1, 0, -100, 5]], np.array([[[1e30], [1], [1e30], [2]]], np.float32)
  gradient = gradient_of(ids, LAYOUTS[layout](), jnp.float32, weights)
  expected = np.zeros((VOCABULARY, WIDTH))
  expected[0], expected[5] = 1, 2
  np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ids", [[[7]], [[7, -1, 31], [0, 3, 3]]])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_an_int8_table_are_read_in_the_dtype_of_its_scales(layout, ids, dtype):
  wide = jnp.asarray(np.random.default_rng(0).standard_normal((VOCABULARY, WIDTH)), jnp.float32)
  table = qwix.quantize(wide, jnp.int8, channelwise_axes=(0,)).astype(dtype)
  embedded = jax.jit(embed, static_argnums=2)(table, jnp.asarray(ids), LAYOUTS[layout]())
  assert embedded.dtype == dtype
  expected = qwix.dequantize(table)[np.maximum(ids, 0)]
  np.testing.assert_array_equal(embedded, expected)
