import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.mesh_config import AXES
from videochat_flash_jax.parallel.sharding import weight_shardings, weight_spec

RELEASED = [
  "qwen2_7b_res224",
  "qwen2_7b_res448",
  "qwen2_5_2b_res448",
  "qwen2_5_7b_1m_res224",
  "qwen2_5_7b_internvideo2_1b",
]


GATHERED = ("fsdp", "sequence")


def weights_of(name):
  config = getattr(VideoChatFlashConfig, name)()
  model = nnx.eval_shape(lambda: VideoChatFlash(config, rngs=nnx.Rngs(0)))
  return nnx.to_pure_dict(nnx.state(model))


def mesh(**sizes):
  return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


@pytest.mark.parametrize(
  "path, ndim, spec",
  [
    ("decoder.layers.stacked.up_proj.kernel", 3, (None, GATHERED, "tensor")),
    ("decoder.layers.stacked.o_proj.kernel", 3, (None, ("tensor", *GATHERED), None)),
    ("decoder.layers.stacked.q_proj.bias", 2, (None, "tensor")),
    ("decoder.layers.stacked.input_norm.scale", 2, ()),
    ("decoder.embed_tokens.embedding", 2, ("tensor", GATHERED)),
    ("decoder.lm_head.kernel", 2, (GATHERED, "tensor")),
    ("vision.blocks.stacked.qkv.kernel", 3, (None, None, GATHERED)),
    ("connector.fc1.kernel", 2, (None, GATHERED)),
    ("decoder.layers.stacked.up_proj.kernel.qvalue", 3, (None, GATHERED, "tensor")),
    ("decoder.layers.stacked.up_proj.kernel.scale", 3, (None, None, "tensor")),
    ("decoder.layers.stacked.k_proj.kernel.scale", 3, (None, None, "tensor")),
    ("decoder.layers.stacked.down_proj.kernel.scale", 3, ()),
    ("decoder.embed_tokens.embedding.scale", 2, ("tensor", None)),
    ("decoder.lm_head.kernel.scale", 2, (None, "tensor")),
  ],
)
def test_the_table_says_how_a_weight_is_split(path, ndim, spec):
  assert weight_spec(path, ndim) == PartitionSpec(*spec)


def test_a_gathered_weight_is_split_over_tensor_alone():
  for path, spec in [
    ("decoder.layers.stacked.up_proj.kernel", (None, None, "tensor")),
    ("decoder.layers.stacked.down_proj.kernel", (None, "tensor", None)),
  ]:
    assert weight_spec(path, 3, replicated=True) == PartitionSpec(*spec)


@pytest.mark.parametrize("name", RELEASED)
def test_every_large_weight_of_a_released_model_is_split(name):
  weights = weights_of(name)
  shardings = weight_shardings(mesh(fsdp=4, sequence=8, tensor=2), weights)
  pairs = zip(jax.tree.leaves(weights), jax.tree.leaves(shardings), strict=True)
  local = {True: 0, False: 0}
  for leaf, sharding in pairs:
    split = np.prod(sharding.shard_shape(leaf.shape)) < np.prod(leaf.shape)
    local[split] += np.prod(leaf.shape)
  assert local[False] < 0.002 * local[True]


def test_the_state_of_an_optimiser_is_split_as_its_weights_are():
  weights = weights_of("qwen2_7b_res224")
  state = jax.eval_shape(optax.adamw(1e-3).init, weights)
  shardings = weight_shardings(mesh(fsdp=8), state)
  expected = weight_shardings(mesh(fsdp=8), weights)
  assert shardings[0].mu == shardings[0].nu == expected


def test_a_split_that_cannot_be_is_refused_with_path_and_axis():
  with pytest.raises(
    InputError, match=r"decoder\.\S+ \(.*\): axis \d of \d+ cannot .* \(mesh\.tensor\)"
  ):
    weight_shardings(mesh(tensor=5), weights_of("qwen2_7b_res224"))


@pytest.mark.parametrize("name, most", [("qwen2_7b_res224", 512), ("qwen2_5_2b_res448", 256)])
def test_so_many_chips_along_fsdp_and_sequence_share_weights_and_more_are_told_what_to_do(
  name, most
):
  weights = weights_of(name)
  weight_shardings(mesh(fsdp=most // 4, sequence=4), weights)
  message = r"mesh\.fsdp x mesh\.sequence\); make their product .* devices on mesh\.data"
  with pytest.raises(InputError, match=message):
    weight_shardings(mesh(fsdp=most // 2, sequence=4), weights)
