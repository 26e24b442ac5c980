import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.ops import swiglu as module
from videochat_flash_jax.ops.swiglu import swiglu

RNG = np.random.default_rng(0)
GATE, UP, DOWN = (
  jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((4, 6), (4, 6), (6, 4))
)


def mlp(x):
  return swiglu(x, lambda x: x @ GATE, lambda x: x @ UP, lambda x: x @ DOWN, mlp_width=6)


def at_once(x):
  return (jax.nn.silu(x @ GATE) * (x @ UP)) @ DOWN


@pytest.fixture(autouse=True)
def blocks_of_three_rows(monkeypatch):
  monkeypatch.setattr(module, "_BLOCK_VALUES", 18)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 2), (1, 11)])
def test_blocks_of_rows_give_what_all_rows_give(shape):
  x = jnp.asarray(np.random.default_rng(1).standard_normal((*shape, 4)), jnp.float32)
  assert_close(jax.jit(mlp)(x), at_once(x), relative=1e-6)
  gradient = jax.grad(lambda x: jnp.sum(jax.jit(mlp)(x) ** 2))(x)
  assert_close(gradient, jax.grad(lambda x: jnp.sum(at_once(x) ** 2))(x), relative=1e-6)


def test_only_a_cpu_works_in_blocks():
  def program(platform):
    traced = jax.jit(mlp).trace(jnp.ones((1, 11, 4)))
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert "while" in program("cpu")
  assert "while" not in program("tpu")
  assert "while" not in program("cuda")
