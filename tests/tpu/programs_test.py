"""Programs as the TPU's compiler makes them (`make test-tpu`)."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.benchmarks import ahead_of_time, hlo_flops
from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.benchmarks.hlo_text import parse
from videochat_flash_jax.cli.config_file import read_config
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.ops.precision import exact_products
from videochat_flash_jax.ops.sharded_attention import self_attention
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.parallel.sharding import weight_shardings
from videochat_flash_jax.train.config import train_settings
from videochat_flash_jax.train.program import train_program

pytestmark = pytest.mark.tpu

STAGE_3 = Path(__file__).parents[2] / "configs" / "stage3_long.py"
ROWS, LENGTH, CLIPS, CHIPS, SHARDS = 2, 2048, 4, 8, 4


def small_settings():
  """A step of a model that has all that the released ones have, but is narrow."""
  sizes = {"rows": ROWS, "tokens_per_row": LENGTH, "clips_per_shard": CLIPS, "mesh.fsdp": 2}
  sizes["tiles_per_shard"] = 0
  sizes["image_size"] = 96  # small pictures, and short rows: kernels compile sooner
  settings = train_settings(
    read_config(STAGE_3, [f"--config.{name}={size}" for name, size in sizes.items()])
  )
  model = settings.model
  sizes = {"width": 1024, "depth": 5, "num_heads": 8, "num_kv_heads": 2, "mlp_width": 2816}
  decoder = dataclasses.replace(model.decoder, vocab_size=32_000, **sizes)
  vision = dataclasses.replace(model.vision, width=256, depth=3, num_heads=4, mlp_width=1024)
  return dataclasses.replace(
    settings, model=dataclasses.replace(model, decoder=decoder, vision=vision)
  )


@pytest.fixture(scope="module")
def step():
  """The step, and shapes of what it takes."""
  return train_program(small_settings(), ahead_of_time.topology_devices("v5e:2x4"))


@pytest.fixture(scope="module")
def ring(step):
  """Text of the step's program."""
  return step.step.lower(step.state, step.batch).compile().as_text()


def gathered_attention():
  """Text of the attention of one row whose keys are gathered."""
  mesh = make_mesh(MeshConfig(fsdp=1, sequence=4), ahead_of_time.topology_devices("v5e:2x2"))
  layout = Layout(mesh, "all_gather", zigzag=True)
  tokens = NamedSharding(mesh, layout.spec("batch", "sequence"))
  shapes = [(1, LENGTH, heads, 128) for heads in (8, 2, 2)]
  operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=tokens) for s in shapes]
  segments = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=tokens)
  attend = jax.jit(functools.partial(self_attention, layout=layout))
  return attend.lower(*operands, segments).compile().as_text()


def shapes_in(text):
  """Shapes of all arrays that a chip ever holds."""
  computations, _ = parse(text)
  return {
    array.shape
    for computation in computations.values()
    for instruction in computation.instructions.values()
    for array in instruction.arrays
  }


def shapes_got_from_others(text):
  """Shapes of all arrays that chips make together; the compiler writes some gathers as sums."""
  computations, _ = parse(text)
  return [
    array.shape
    for computation in computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode.startswith(("all-gather", "all-reduce", "all-to-all"))
    for array in instruction.arrays
  ]


def gathered_along_the_sequence(text):
  """Numbers in each array that chips make together of the parts of a row."""
  lengths = {LENGTH, SHARDS * LENGTH}
  return [math.prod(shape) for shape in shapes_got_from_others(text) if lengths & set(shape)]


def strangers(text, weights):
  """Shapes of arrays from others that are larger than a chip's hidden states, and no weights."""
  known = {
    tuple(sorted(size for size in shape if size > 1))
    for leaf in jax.tree.leaves(weights)
    for shape in (leaf.shape, leaf.shape[1:], leaf.sharding.shard_shape(leaf.shape))
  }
  hidden = LENGTH // SHARDS * small_settings().model.decoder.width
  shapes = {shape for shape in shapes_got_from_others(text) if math.prod(shape) > hidden}
  return [s for s in shapes if tuple(sorted(size for size in s if size > 1)) not in known]


def test_a_ring_step_gathers_nothing_like_hidden_states_along_the_sequence(ring):
  """Of a row only numbers, such as labels, are ever gathered."""
  assert all(size <= CHIPS * LENGTH for size in gathered_along_the_sequence(ring))


def test_of_what_is_larger_than_a_chips_hidden_states_only_weights_are_whole(ring, step):
  assert strangers(ring, step.state) == []


def test_gathered_keys_would_be_seen():
  decoder = small_settings().model.decoder
  keys = LENGTH * decoder.num_kv_heads * decoder.head_size
  assert max(gathered_along_the_sequence(gathered_attention())) >= keys > CHIPS * LENGTH


def test_no_chip_holds_the_hidden_states_of_a_whole_row(ring):
  assert [s for s in shapes_in(ring) if LENGTH in s and math.prod(s) > CHIPS * LENGTH] == []


def test_no_chip_holds_the_logits_of_all_its_tokens(ring):
  decoder = small_settings().model.decoder
  with_words = [s for s in shapes_in(ring) if decoder.vocab_size in s]
  assert max(math.prod(s) for s in with_words) == decoder.width * decoder.vocab_size


def test_weights_are_gathered_layer_by_layer(ring):
  decoder, shapes = small_settings().model.decoder, shapes_in(ring)
  kernel = {decoder.width, decoder.mlp_width}
  assert any(kernel == {n for n in s if n > 1} for s in shapes), "one layer's"
  assert not any(kernel <= set(s) and decoder.depth in s for s in shapes), "all layers'"


def test_keys_and_values_travel_in_bfloat16_and_their_gradients_in_float32(ring):
  decoder = small_settings().model.decoder
  hop = 2 * LENGTH // SHARDS * decoder.num_kv_heads * decoder.head_size * 2  # bytes
  costs = program_costs(ring)
  hops = costs.sizes["collective-permute"] / hop / decoder.depth
  # Forwards, again, and beside the gradients, which are twice as wide and go home. A first hop
  # may serve for two.
  assert 3 * (SHARDS - 1) + 2 * SHARDS - 3 <= hops <= 3 * (SHARDS - 1) + 2 * SHARDS + 0.5
  assert costs.guessed_loops == 0


def layer_weights(decoder):
  heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
  return decoder.width * (heads * decoder.head_size + 3 * decoder.mlp_width)


def test_flops_of_a_step_are_those_counted_by_hand(ring):
  model = small_settings().model
  decoder, vision = model.decoder, model.vision
  heads = decoder.num_heads * decoder.head_size
  weights = decoder.depth * layer_weights(decoder) + decoder.width * decoder.vocab_size
  products = 4 * ROWS * LENGTH * weights  # forwards, again, and two for the gradients
  products += 11 * ROWS * LENGTH**2 / 2 * heads * decoder.depth  # see ops/splash.py
  patches = ROWS * SHARDS * CLIPS * vision.clip_frames * vision.grid_size**2
  block = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
  products += 4 * patches * vision.depth * block
  products += 11 * patches * vision.clip_frames * vision.grid_size**2 * vision.width * vision.depth
  assert program_costs(ring).flops == pytest.approx(2 * products / CHIPS, rel=0.1)


def decoder_gradients(depth, dtype=jnp.bfloat16):
  """A decoder's gradients on four chips, its weights spread over them: compiled."""
  config = dataclasses.replace(small_settings().model.decoder, depth=depth)
  model = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), param_dtype=dtype))
  graph, weights = nnx.split({"decoder": model})
  weights = nnx.to_pure_dict(weights)
  layout = Layout(make_mesh(MeshConfig(), ahead_of_time.topology_devices("v5e:2x2")), "none")
  shardings = weight_shardings(layout.mesh, weights)

  def loss(weights, x):
    hidden = nnx.merge(graph, weights)["decoder"](x, layout=layout)
    return hidden.astype(jnp.float32).sum()

  rows = NamedSharding(layout.mesh, layout.spec("batch"))
  x = jax.ShapeDtypeStruct((32, 128, config.width), dtype, sharding=rows)
  weights = jax.tree.map(
    lambda w, sharding: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding),
    weights,
    shardings,
  )
  gradients = exact_products(dtype)(jax.grad(loss, (0, 1)))
  gradients = jax.jit(gradients, out_shardings=(shardings, rows))
  return gradients.lower(weights, x).compile()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_float32_keep_all_digits_and_those_of_bfloat16_stay_fast(dtype, in_haste):
  with jax.default_matmul_precision(None):  # as users have it
    text = decoder_gradients(1, dtype).as_text()
  products = [line for line in text.splitlines() if " convolution(" in line]
  exact = ["operand_precision={highest,highest}" in line for line in products]
  assert len(products) > 10 and set(exact) == {dtype == jnp.float32}


def test_loops_count_as_often_as_they_run(monkeypatch, in_haste):
  """Against the compiler's own count, which is right where no loop is left.

  It knows nothing of what a kernel does, so kernels are left out.
  """
  monkeypatch.setattr(hlo_flops, "_KERNEL_PRODUCTS", {})
  looped = program_costs(decoder_gradients(depth=4).as_text())
  with monkeypatch.context() as patch:
    patch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    one, two = (decoder_gradients(depth) for depth in (1, 2))
  counted = [program.cost_analysis()["flops"] for program in (one, two)]
  true = counted[0] + 3 * (counted[1] - counted[0])  # linear in the depth
  assert looped.flops == pytest.approx(true, rel=0.05)
  gathered = 2 * 4 * 2 * layer_weights(small_settings().model.decoder)  # bytes, twice, 4 layers
  assert looped.sizes["all-gather"] == pytest.approx(gathered, rel=0.01)
