"""How exact the products of a program are."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dtype_of_products(weights: Any) -> jnp.dtype:
  """The dtype in which a tree of weights is computed with: that of all which are not int8."""
  return next(leaf.dtype for leaf in jax.tree.leaves(weights) if leaf.dtype != jnp.int8)


@contextlib.contextmanager
def exact_products(dtype: DTypeLike) -> Iterator[None]:
  """For tracing a program that computes in `dtype`: its products of float32 arrays are exact.

  By default a TPU rounds the operands of such products to bfloat16, and a GPU to 10 bits. In this
  context they keep all their digits. A program in bfloat16 is traced as it is, and stays as fast.
  """
  if jnp.dtype(dtype) != jnp.float32:
    yield
    return
  with jax.default_matmul_precision("highest"):
    yield
