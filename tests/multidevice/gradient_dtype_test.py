"""In which type devices add up gradients, and how exact these are in bfloat16."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.models.small_models import DECODER, fill_randomly
from tests.ops.embedding_test import VOCABULARY, WIDTH
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.ops.embedding import embed
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import dotted_path, is_small, weight_shardings
from videochat_flash_jax.train.losses import next_token_loss
from videochat_flash_jax.train.step import make_step, split_state

MESHES = [
  {"data": 2, "fsdp": 2, "sequence": 2},
  {"fsdp": 2, "sequence": 2, "tensor": 2},
  {"data": 4, "fsdp": 1, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_of_a_split_table_is_that_on_one_device(mesh):
  rng = np.random.default_rng(0)
  ids = rng.integers(-3, VOCABULARY, (8, 64)).astype(np.int32)
  ids[:, :32] = 7
  table, weights = (
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((VOCABULARY, 4 * WIDTH), (8, 64, 4 * WIDTH))
  )

  def computed(layout):
    def loss(table):
      return (embed(table, ids, layout) * weights).sum()

    return jax.jit(jax.value_and_grad(loss))(table)

  layout = Layout(make_mesh(MeshConfig(**mesh)))
  for ours, expected in zip(computed(layout), computed(ONE_DEVICE), strict=True):
    assert_close(ours, expected, relative=1e-5)


def decoder_step(compute_dtype, gradient_dtype, folder):
  """The gradients of a decoder over 8 devices; and, by type and shape, what these add up."""
  sizes = {"num_heads": 4, "num_kv_heads": 2, "vocab_size": 64, "mlp_width": 32}
  config = dataclasses.replace(DECODER, **sizes)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
  layout = Layout(mesh, zigzag=True, compute_dtype=jnp.dtype(compute_dtype))
  model = fill_randomly(lambda: nnx.Dict(decoder=Qwen2(config, rngs=nnx.Rngs(0))))
  optimizer = optax.trace(decay=0.0)  # which keeps the gradients
  graph, state = split_state(model, lambda path: True, optimizer)
  shardings = weight_shardings(mesh, state)
  state = jax.tree.map(jax.device_put, state, shardings)

  def loss(model, ids):
    decoder = model["decoder"]
    hidden = decoder(decoder.embed(ids, layout), layout=layout)
    return next_token_loss(decoder, hidden, jnp.roll(ids, -1, axis=1), layout)

  ids = layout.device_put(np.random.default_rng(0).integers(0, 64, (4, 32)), "batch", "sequence")
  step = make_step(
    graph, loss, optimizer, trained_dtype=jnp.dtype(gradient_dtype), shardings=shardings
  )
  # CPUs add up float32 only, so the types are read before the compiler converts them.
  dump = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
  compiled = step.lower(state, ids).compile(compiler_options=dump)
  (text,) = (path.read_text() for path in folder.glob("*after_spmd*"))
  state, _ = compiled(state, ids)
  kinds = "all-reduce|reduce-scatter|all-gather"
  found = Counter(re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({kinds})\(", text))
  sent = {(kind, dtype, shape.count(",") + bool(shape)) for dtype, shape, kind in found}
  return jax.tree.map(np.asarray, optax.tree.get(state.optimizer, "trace")), sent


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
  dtypes = {"exact": "float32 float32", "usual": "bfloat16 bfloat16", "wide": "bfloat16 float32"}
  return {
    name: decoder_step(*pair.split(), tmp_path_factory.mktemp(name))
    for name, pair in dtypes.items()
  }


@pytest.mark.parametrize("name, dtype", [("usual", "bf16"), ("wide", "f32")])
def test_gradients_of_matrices_are_sent_in_the_chosen_type_and_those_of_vectors_in_float32(
  steps, name, dtype
):
  sent = steps[name][1]
  added = {(what, axes) for kind, what, axes in sent if kind != "all-gather" and axes in (1, 2)}
  assert added == {(dtype, 2), ("f32", 1)}
  weights = {what for kind, what, axes in sent if kind == "all-gather" and axes == 2}
  assert weights == {"bf16"}


def test_in_bfloat16_gradients_are_near_those_of_float32(steps):
  """Rounded activations cost some hundredths; rounded sums no more than one rounding."""
  trees = [steps[name][0] for name in ("exact", "usual", "wide")]
  exact, usual, wide = (jax.tree_util.tree_leaves_with_path(tree) for tree in trees)
  for (path, expected), (_, ours), (_, wider) in zip(exact, usual, wide, strict=True):
    size = np.linalg.norm(expected)
    assert max(np.linalg.norm(x - expected) for x in (ours, wider)) < 0.06 * size, path
    assert np.linalg.norm(ours - wider) < 2**-8 * size, path
    if is_small(dotted_path(path), expected.ndim):
      np.testing.assert_array_equal(ours, wider)


def test_only_gradients_that_are_added_up_in_float32_have_more_digits_than_bfloat16(steps):
  def is_rounded(gradient):
    return np.array_equal(gradient, gradient.astype(ml_dtypes.bfloat16).astype(np.float32))

  targets = 4 * 32  # the loss is divided by this power of two
  for name, rounded in (("usual", True), ("wide", False)):
    gradients = jax.tree.leaves(steps[name][0])
    assert [is_rounded(x * targets) for x in gradients if x.ndim == 3] == [rounded] * 7
