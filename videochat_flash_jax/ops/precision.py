"""How exact the products of a program are."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


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
