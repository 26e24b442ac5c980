"""Linear layers, which compute in the dtype of their input, whatever the dtype of their weights is.

The gradient of a weight is summed in the dtype of the weight, on one chip and over all of them. So
where weights come as float32, the gradients of a step in bfloat16 are summed in float32. Vectors
(biases, scales) are few numbers: their gradients are summed in float32 in any case.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from videochat_flash_jax.shapes import Array, Float

PRODUCT = "product"


class Linear(nnx.Linear):
  """`nnx.Linear` in the dtype of the input."""

  def __call__(self, inputs: Float[Array, "*batch E"]) -> Float[Array, "*batch M"]:
    """Returns inputs W + b."""
    y = product(inputs, self.kernel[...])
    return y if self.bias is None else plus(y, self.bias[...])


def product(x: Float[Array, "*batch E"], weight: Float[Array, "E M"]) -> Float[Array, "*batch M"]:
  """Returns x W in the dtype of x. The gradient of W is summed in the dtype of W.

  `jax.checkpoint` does not look into it: policies know the result by the name `PRODUCT`.
  """
  return checkpoint_name(_product(x, weight), PRODUCT)


@jax.custom_vjp
def _product(x, weight):
  return x @ weight.astype(x.dtype)


def _product_forward(x, weight):
  # Gradients that nobody needs, such as those of frozen weights, are not computed.
  keep_x = x.value if weight.perturbed else None
  keep_weight = weight.value if x.perturbed else None
  dtype = jnp.zeros((), weight.value.dtype)
  return _product(x.value, weight.value), (keep_x, keep_weight, dtype)


def _product_backward(residuals, gradient):
  x, weight, like_weight = residuals
  d_x = None if weight is None else gradient @ weight.astype(gradient.dtype).T
  if x is None:
    return d_x, None
  batch = tuple(range(x.ndim - 1))
  d_weight = jax.lax.dot_general(
    x, gradient, ((batch, batch), ((), ())), preferred_element_type=like_weight.dtype
  )
  return d_x, d_weight


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def plus(
  x: Float[Array, "*batch E"], weight: Float[Array, "*#batch E"]
) -> Float[Array, "*batch E"]:
  """Returns x + b in the dtype of x; the gradient of b is summed in float32."""
  return (x.astype(jnp.float32) + weight.astype(jnp.float32)).astype(x.dtype)


def times(x: Float[Array, "*batch E"], weight: Float[Array, "E"]) -> Float[Array, "*batch E"]:
  """Returns x s in the dtype of x; the gradient of s is summed in float32."""
  return (x.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)
