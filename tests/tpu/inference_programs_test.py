"""Prefill and decode as the TPU's compiler makes them: ahead of time, with no TPU."""

import dataclasses
import functools
import math

import jax
import pytest

from videochat_flash_jax.benchmarks.hlo_costs import program_costs
from videochat_flash_jax.benchmarks.hlo_text import parse
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.programs import decode_program, prefill_program
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

pytestmark = pytest.mark.tpu

ROWS, LENGTH, TENSOR = 2, 2048, 2
READ, NUM_SLOTS = 24_576, 1 << 15  # read before the first token is written; in caches for both
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
def mesh():
  from jax.experimental import topologies

  chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  return make_mesh(MeshConfig(tensor=TENSOR), chips)


def prompts(rows, length):
  return {"rows": rows, "num_tokens": length, "num_visual": length - 64, "max_new_tokens": 256}


@functools.cache
def compiled(name, dropout):
  """A program, and the shapes that it takes."""
  build, length = (decode_program, READ) if name == "decode" else (prefill_program, LENGTH)
  program, arguments = build(config_of(dropout), mesh(), **prompts(ROWS, length))
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


@pytest.mark.parametrize("dropout", DROPOUT)
def test_no_weights_and_no_cache_travel_while_an_answer_is_written(dropout):
  program, (_, _, weights, *_) = compiled("decode", dropout)
  kernels = [x for x in jax.tree.leaves(weights["decoder"]) if x.ndim == 3]  # stacked
  smallest = min(2 * math.prod(kernel.shape[1:]) for kernel in kernels)
  assert 0 < smallest < 2 * NUM_SLOTS * 128, "a row's keys of one layer are larger"
  assert gathered_bytes(program) < smallest
  costs = program_costs(program.as_text())
  assert costs.guessed_loops == 1, "over tokens"
  assert max(costs.sizes.values()) < smallest


@pytest.mark.parametrize("dropout", DROPOUT)
def test_the_cache_is_written_in_place(dropout):
  program, arguments = compiled("decode", dropout)
  shards = [
    leaf.sharding.shard_shape(leaf.shape) for cache in arguments[3] for leaf in (cache.k, cache.v)
  ]
  cache_bytes = sum(2 * math.prod(shape) for shape in shards)
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes >= cache_bytes
  assert memory.temp_size_in_bytes < cache_bytes


def test_prompts_are_read_by_kernels_with_one_sum_for_each_half_of_a_layer():
  program, _ = compiled("prefill", "off")
  text = program.as_text()
  costs = program_costs(text)
  assert "splash_mha_fwd" in text
  assert gathered_bytes(program) == 0
  assert costs.counts["all-reduce"] == 1 + 2 * config_of("off").decoder.depth, "and the embedding"


def test_dropping_tokens_gathers_no_hidden_states():
  program, _ = compiled("prefill", "on")
  assert "splash_mha_fwd" in program.as_text()
  assert gathered_bytes(program) < 2 * LENGTH * config_of("on").decoder.width


def test_rows_that_do_not_fill_the_mesh_are_refused():
  with pytest.raises(InputError, match="rows: 3 is no multiple of 2"):
    decode_program(config_of("off"), mesh(), **prompts(3, LENGTH))


def test_more_to_see_than_to_read_is_refused():
  with pytest.raises(InputError, match="2,048 tokens has no room for 4,096 visual ones"):
    prefill_program(config_of("off"), mesh(), **prompts(ROWS, LENGTH) | {"num_visual": 4096})


def test_more_than_a_chip_reads_at_once_is_refused_with_what_helps_at_inference():
  with pytest.raises(InputError, match="at most 524,288 in one reading; use fewer frames"):
    prefill_program(config_of("off"), mesh(), **prompts(ROWS, 1 << 20))
