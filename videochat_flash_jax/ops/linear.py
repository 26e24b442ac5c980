"""Linear layers, which compute in the dtype of their input, whatever the dtype of their weights is.

The gradient of a weight is summed in the dtype of the weight, on one chip and over all of them. So
where weights come as float32, the gradients of a step in bfloat16 are summed in float32. Vectors
(biases, scales) are few numbers: their gradients are summed in float32 in any case.

For inference a weight may be int8, as a `qwix.QArray`: values [E, M], and a scale [1, M] for each
output, in the dtype of the computation. It has no gradient.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from qwix import QArray

from videochat_flash_jax.shapes import Array, Float

PRODUCT = "product"
_PARTS = 16  # of the rows of a matrix
_LARGE = 1 << 20  # values of a matrix that is not in a cache of the processor


class Linear(nnx.Linear):
  """`nnx.Linear` in the dtype of the input."""

  def __call__(self, inputs: Float[Array, "*batch E"]) -> Float[Array, "*batch M"]:
    """Returns inputs W + b."""
    y = product(inputs, self.kernel[...])
    return y if self.bias is None else plus(y, self.bias[...])


def product(
  x: Float[Array, "*batch E"], weight: Float[Array, "E M"] | QArray
) -> Float[Array, "*batch M"]:
  """Returns x W in the dtype of x. The gradient of W is summed in the dtype of W.

  `jax.checkpoint` does not look into it: policies know the result by the name `PRODUCT`.
  """
  if isinstance(weight, QArray):
    sums_in = jnp.promote_types(x.dtype, jnp.bfloat16)  # sums of int8 values overflow float16
    return _int8_product(x, weight, sums_in).astype(x.dtype)
  return checkpoint_name(_product(x, weight), PRODUCT)


@jax.custom_vjp
def _product(x, weight):
  return _matmul(x, weight.astype(x.dtype))


def _matmul(x, weight):
  """Returns x W, summed in the dtype of x.

  A CPU multiplies one vector by a large matrix in parts of its rows: it then reads memory at full
  speed. As one product, XLA reads a matrix of 8,960 x 1,536 at two thirds of it.
  """
  if x.size != len(weight) or weight.size < _LARGE or len(weight) % _PARTS:
    return x @ weight

  def in_parts(x, weight):
    """The sum of the products of all parts."""
    parts = x.reshape(_PARTS, 1, -1) @ weight.reshape(_PARTS, -1, weight.shape[1])
    return parts.sum(axis=0).reshape(*x.shape[:-1], -1)

  return jax.lax.platform_dependent(x, weight, cpu=in_parts, default=jnp.matmul)


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


def float32_product(
  x: Float[Array, "*batch E"], weight: Float[Array, "E M"] | QArray
) -> Float[Array, "*batch M"]:
  """Returns x W in float32, whatever the dtype of x is."""
  if isinstance(weight, QArray):
    return _int8_product(x, weight, jnp.float32)
  return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


def _int8_product(x, weight, sums_in):
  """Returns x W, summed in the dtype `sums_in`.

  The sums are scaled, not the weights: so the compiler converts int8 values while it reads them,
  and the wide weight is never in memory. They are scaled in their own dtype, since devices that
  share a sum would otherwise send each other float32.
  """
  sums = jnp.matmul(x, weight.qvalue.astype(x.dtype), preferred_element_type=sums_in)
  return sums * weight.scale[0]


def plus(
  x: Float[Array, "*batch E"], weight: Float[Array, "*#batch E"]
) -> Float[Array, "*batch E"]:
  """Returns x + b in the dtype of x; the gradient of b is summed in float32."""
  return (x.astype(jnp.float32) + weight.astype(jnp.float32)).astype(x.dtype)


def times(x: Float[Array, "*batch E"], weight: Float[Array, "E"]) -> Float[Array, "*batch E"]:
  """Returns x s in the dtype of x; the gradient of s is summed in float32."""
  return (x.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)
