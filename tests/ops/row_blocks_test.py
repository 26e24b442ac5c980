import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops import row_blocks
from videochat_flash_jax.ops.row_blocks import map_row_blocks

WEIGHTS = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)), jnp.float32)


def double_layer(x):
  return jnp.sin(x @ WEIGHTS) @ WEIGHTS


@pytest.fixture(autouse=True)
def blocks_of_three(monkeypatch):
  monkeypatch.setattr(row_blocks, "_BLOCK_VALUES", 12)


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 11])
def test_blocks_give_what_all_rows_give(rows):
  x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 5, 4)), jnp.float32)
  blocked = jax.jit(lambda x: map_row_blocks(double_layer, x, 4))
  assert_close(blocked(x), double_layer(x), relative=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(blocked(x) ** 2))(x)
  assert_close(gradient, jax.grad(lambda x: jnp.sum(double_layer(x) ** 2))(x), relative=1e-6)


def test_only_a_cpu_works_in_blocks():
  def program(platform):
    traced = jax.jit(lambda x: map_row_blocks(double_layer, x, 4)).trace(jnp.ones((11, 4)))
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert "while" in program("cpu")
  assert "while" not in program("tpu")
  assert "while" not in program("cuda")
