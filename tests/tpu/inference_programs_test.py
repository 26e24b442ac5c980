"""Reading and answering as the TPU's compiler makes them: ahead of time, with no TPU."""

import dataclasses
import functools
import math

import jax
import pytest

from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.benchmarks.hlo_text import parse
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.prefix import CHUNK
from videochat_flash_jax.inference.program_shapes import decode_program, prefill_program
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu

ROWS, NUM_TOKENS, TENSOR = 2, 24_576, 2
DROPOUT = {
  "off": None,
  "on": DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25)),
}


def config_of(dropout):
  """The tiny model with a decoder whose heads are as wide as those of the released ones."""
  tiny = VideoChatFlashConfig.tiny()
  sizes = {"width": 512, "head_size": 128, "mlp_width": 1024, "vocab_size": 4096, "depth": 3}
  decoder = dataclasses.replace(tiny.decoder, tied_embeddings=False, **sizes)
  return dataclasses.replace(tiny, decoder=decoder, dropout=DROPOUT[dropout])


@functools.cache
def mesh(fsdp=1, tensor=TENSOR):
  """Caches are split over both axes: heads over `tensor`, the slots of a video over `fsdp`."""
  from jax.experimental import topologies

  chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  return make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), chips[: fsdp * tensor])


@functools.cache
def compiled(name, dropout, fsdp=1):
  """A program, and the shapes that it takes."""
  sizes = {"num_tokens": NUM_TOKENS, "num_visual": NUM_TOKENS - 64}
  if name == "decode":
    sizes |= {"rows": ROWS, "max_new_tokens": 256}
  build = decode_program if name == "decode" else prefill_program
  program, arguments = build(config_of(dropout), mesh(fsdp), **sizes)
  return program.lower(*arguments).compile(), arguments


def gathered_bytes(program):
  """The largest array that is gathered from several chips."""
  computations, _ = parse(program.as_text())
  gathers = [
    instruction.num_bytes
    for computation in computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode in ("all-gather", "all-gather-start")
  ]
  return max(gathers, default=0)


def cache_bytes(caches):
  """Bytes of each cache on one chip."""
  return [
    sum(2 * math.prod(slots.sharding.shard_shape(slots.shape)) for slots in cache.stored)
    for cache in caches
  ]


@pytest.mark.parametrize("dropout, fsdp", [("off", 1), ("on", 1), ("on", 2)])
def test_no_weights_and_no_cache_travel_while_an_answer_is_written(dropout, fsdp):
  program, (_, _, weights, *_) = compiled("decode", dropout, fsdp)
  kernels = [x for x in jax.tree.leaves(weights["decoder"]) if x.ndim == 3]  # stacked
  smallest = min(2 * math.prod(kernel.shape[1:]) for kernel in kernels)
  assert 0 < smallest < 2 * (NUM_TOKENS // 4 // fsdp) * 128, "keys of one layer are larger"
  assert gathered_bytes(program) < smallest
  costs = program_costs(program.as_text())
  assert costs.guessed_loops == 1, "over tokens"
  assert max(costs.sizes.values()) < smallest


@pytest.mark.parametrize("tensor", [1, TENSOR])
def test_int8_weights_are_widened_while_they_are_read_and_not_copied(tensor):
  chips = mesh(1, tensor)
  sizes = {"rows": 1, "num_tokens": NUM_TOKENS, "num_visual": 0, "max_new_tokens": 256}
  memory = {}
  for weights in ("int8", None):
    program, arguments = decode_program(config_of("off"), chips, **sizes, weights=weights)
    memory[weights] = program.lower(*arguments).compile().memory_analysis()
  assert memory["int8"].argument_size_in_bytes < memory[None].argument_size_in_bytes
  assert memory["int8"].temp_size_in_bytes < 1.1 * memory[None].temp_size_in_bytes


@pytest.mark.parametrize("dropout", DROPOUT)
def test_answers_are_written_in_place_behind_caches_that_are_not_copied(dropout):
  program, (_, _, _, own, behind, *_) = compiled("decode", dropout)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= sum(cache_bytes(own))
  assert memory.temp_size_in_bytes < min(cache_bytes(caches[0] for caches in behind))


@pytest.mark.parametrize("dropout", DROPOUT)
def test_a_chunk_is_read_by_kernels_with_one_sum_for_each_half_of_a_layer(dropout):
  program, (*_, cache, _) = compiled("prefill", dropout)
  text = program.as_text()
  assert "splash_mha_fwd" in text
  assert gathered_bytes(program) == 0
  # Of the last layer of all, keys and values alone are needed.
  num_layers = cache.depth - (dropout == "off")
  assert program_costs(text).counts["all-reduce"] == 1 + 2 * num_layers, "and the embedding"


def test_where_the_slots_are_split_queries_travel_and_no_keys():
  program, _ = compiled("prefill", "off", 2)
  decoder = config_of("off").decoder
  queries = 2 * CHUNK * decoder.num_heads // TENSOR * decoder.head_size
  keys = 2 * NUM_TOKENS // 2 * decoder.num_kv_heads // TENSOR * decoder.head_size
  assert "splash_mha_fwd" in program.as_text()
  assert 0 < gathered_bytes(program) <= queries < keys


@pytest.mark.parametrize("dropout", DROPOUT)
def test_a_chunk_is_written_in_place_beside_the_caches_of_other_parts(dropout):
  program, (*_, cache, others) = compiled("prefill", dropout)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= sum(cache_bytes([cache, *others]))
  assert memory.temp_size_in_bytes < sum(cache_bytes([cache, *others]))


def test_a_chunk_is_read_behind_a_million_tokens():
  sizes = {"num_tokens": 1 << 20, "num_visual": (1 << 20) - 64}
  program, arguments = prefill_program(config_of("off"), mesh(), **sizes)
  assert "splash_mha_fwd" in program.lower(*arguments).compile().as_text()


def test_more_to_see_than_to_read_is_refused():
  with pytest.raises(InputError, match="2,048 tokens has no room for 4,096 visual ones"):
    prefill_program(config_of("off"), mesh(), num_tokens=2048, num_visual=4096)
