"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trained adapters beside linear layers.

  y = x W + b + (x A) B * alpha / rank        A [in, rank], B [rank, out]; stacked: [L, in, rank]

B is initialised with zeros, so a model with new adapters computes the same as without them. The
weights of the layer keep their paths: beside `decoder.layers.stacked.q_proj.kernel` there are
`..q_proj.lora_a` and `..q_proj.lora_b`. For inference and on the hub, A B * alpha / rank is added
to W, see `checkpoints.runs.adapters`.
"""

import difflib
import re

import jax
import jax.numpy as jnp
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import LoraConfig
from videochat_flash_jax.ops.linear import Linear, product
from videochat_flash_jax.parallel.sharding import dotted_path
from videochat_flash_jax.shapes import Array, Float

_HEAD = "lm_head"  # the loss reads its kernel directly, so an adapter would have no effect


class AdaptedLinear(Linear):
  """A linear layer, or a stack of them, with an adapter; it shares the weights of `base`."""

  def __init__(self, base: Linear, lora: LoraConfig, *, rngs: nnx.Rngs):
    """Takes over all attributes of `base`, and draws the adapter."""
    for name, value in vars(base).items():
      if not name.startswith("_pytree"):
        setattr(self, name, value)
    *layers, inputs, outputs = base.kernel.shape
    # The default of torch's linear layers: uniform within 1 / sqrt(inputs).
    draw = jax.nn.initializers.variance_scaling(
      1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(layers)))
    )
    self.lora_a = nnx.Param(draw(rngs.params(), (*layers, inputs, lora.rank), jnp.float32))
    self.lora_b = nnx.Param(jnp.zeros((*layers, lora.rank, outputs), jnp.float32))
    self.lora_scale = lora.alpha / lora.rank

  def __call__(self, inputs: Float[Array, "*batch E"]) -> Float[Array, "*batch M"]:
    """The output of the layer plus that of the adapter."""
    y = super().__call__(inputs)
    adapter = product(product(inputs, self.lora_a[...]), self.lora_b[...])
    return y + adapter * self.lora_scale


def add_adapters(model: nnx.Module, lora: LoraConfig, rngs: nnx.Rngs):
  """Replaces the linear layers whose path `lora.targets` matches by adapted ones, in place.

  The head of the decoder gets no adapter.

  Args:
    model: newly built, or under `nnx.eval_shape`.
    lora: rank, alpha, and the regular expression, which is searched in paths such as
      `decoder.layers.stacked.q_proj`.
    rngs: what the matrices A are drawn from.

  Raises:
    InputError: the expression matches no layer, or it is no regular expression.
  """
  layers = {
    dotted_path(path): (path, module)
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Linear) and path[-1] != _HEAD
  }
  try:
    found = sorted(name for name in layers if re.search(lora.targets, name))
  except re.error as error:
    raise InputError(
      f"config.lora.targets: {lora.targets!r:.80} is no regular expression ({error}); correct it"
    ) from error
  if not found:
    near = difflib.get_close_matches(lora.targets, layers, n=3, cutoff=0.3) or sorted(layers)
    raise InputError(
      f"config.lora.targets: {lora.targets!r:.80} matches no linear layer; match some of "
      f"{', '.join(near)}"
    )
  for name in found:
    path, layer = layers[name]
    parent = model
    for step in path[:-1]:
      parent = parent[step] if isinstance(parent, nnx.Dict | nnx.List) else getattr(parent, step)
    setattr(parent, path[-1], AdaptedLinear(layer, lora, rngs=rngs))
