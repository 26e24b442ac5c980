"""Costs read from compiled programs, where the truth is known."""

from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from videochat_flash_jax.benchmarks.chips import roofline
from videochat_flash_jax.benchmarks.hlo_costs import Costs, program_costs
from videochat_flash_jax.parallel.chips import CHIPS

TPU_STEP = (Path(__file__).parent / "tpu_step.hlo").read_text()
PARTS = ("compute", "memory", "link", "data_centre")
PRODUCT = 2 * 8 * 16 * 16  # flops of [8, 16] x [16, 16]


def costs_of(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return program_costs(jax.jit(function).lower(*arguments).compile().as_text())


def layers(x, weights):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def test_a_product_is_counted():
  assert costs_of(jnp.matmul, (8, 16), (16, 16)).flops == PRODUCT


def test_a_batched_product_is_counted():
  assert costs_of(jnp.matmul, (3, 8, 16), (3, 16, 16)).flops == 3 * PRODUCT


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  costs = costs_of(layers, (8, 16), (7, 16, 16))
  assert costs.flops == 7 * PRODUCT and costs.guessed_loops == 0


def test_a_loop_in_a_loop_counts_as_often_as_both_run():
  def repeated(x, weights):
    return jax.lax.fori_loop(0, 5, lambda _, x: layers(x, weights), x)

  assert costs_of(repeated, (8, 16), (7, 16, 16)).flops == 35 * PRODUCT


def test_gradients_and_rematerialisation_are_counted():
  def loss(x, weights):
    body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
    return jnp.sum(jax.lax.scan(body, x, weights)[0])

  costs = costs_of(jax.grad(loss, argnums=(0, 1)), (8, 16), (7, 16, 16))
  assert costs.flops == 4 * 7 * PRODUCT


def test_of_a_condition_the_most_costly_branch_counts():
  def either(x, weights, flag):
    return jax.lax.cond(flag.sum() > 0, lambda: layers(x, weights), lambda: x @ weights[0])

  assert costs_of(either, (8, 16), (7, 16, 16), (1,)).flops == 7 * PRODUCT


def test_bytes_of_a_sum_are_what_it_reads_and_writes():
  costs = costs_of(lambda x, y: x + y, (1000,), (1000,))
  assert costs.num_bytes == 3 * 4000 and costs.flops == 0


def test_of_stacked_weights_each_run_reads_its_own():
  num_bytes = costs_of(layers, (8, 16), (100, 16, 16)).num_bytes
  stack = 4 * 100 * 16 * 16
  assert stack < num_bytes < 6 * stack  # cut out, and read again; not 100 stacks


def test_of_a_stack_that_a_fusion_within_a_fusion_cuts_the_piece_counts():
  text = """
%retiled (r0: bf16[28,8,128]) -> bf16[28,8,128] {
  %r0 = bf16[28,8,128] parameter(0)
  ROOT %copied = bf16[28,8,128] copy(%r0)
}

%cut (p0: bf16[28,8,128], p1: s32[]) -> bf16[8,128] {
  %p0 = bf16[28,8,128] parameter(0)
  %p1 = s32[] parameter(1)
  %tiles = bf16[28,8,128] fusion(%p0), kind=kLoop, calls=%retiled
  %flat = bf16[28,1024] bitcast(%tiles)
  %zero = s32[] constant(0)
  %layer = bf16[1,1024] dynamic-slice(%flat, %p1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %out = bf16[8,128] bitcast(%layer)
}

%product (q0: bf16[28,8,128], q1: s32[], q2: bf16[8,8]) -> bf16[8,128] {
  %q0 = bf16[28,8,128] parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = bf16[8,8] parameter(2)
  %layer = bf16[8,128] fusion(%q0, %q1), kind=kLoop, calls=%cut
  ROOT %out = bf16[8,128] dot(%q2, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[28,8,128], i: s32[], b: bf16[8,8]) -> bf16[8,128] {
  %a = bf16[28,8,128] parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[8,8] parameter(2)
  ROOT %out = bf16[8,128] fusion(%a, %i, %b), kind=kOutput, calls=%product
}
"""
  costs = program_costs(text)
  layer, index, left = 2 * 8 * 128, 4, 2 * 8 * 8
  assert costs.num_bytes == layer + index + left + layer
  assert costs.flops == 2 * 8 * 8 * 128


def test_collectives_of_a_tpu_program_are_counted_with_their_loops():
  costs = program_costs(TPU_STEP)
  runs = 6  # from 1 to 7
  gathered, summed, hop = 64 * 16 * 2, 64 * 64 * 4, 64 * 8 * 2
  assert costs.counts == {
    "all-gather": runs,  # its second piece is no second one
    "reduce-scatter": runs,
    "collective-permute": runs,
    "all-reduce": 1,
  }
  assert costs.sizes == {
    "all-gather": runs * gathered,
    "reduce-scatter": runs * summed,
    "collective-permute": runs * hop,
    "all-reduce": summed,
  }
  assert costs.sent == {
    "all-gather": runs * gathered / 2,
    "reduce-scatter": runs * summed * 7 / 8,
    "collective-permute": runs * hop,
    "all-reduce": 2 * summed * 3 / 4,
  }
  assert costs.flops == 2 * 64**3 and costs.guessed_loops == 0


@pytest.mark.parametrize(
  "constant, other",
  [
    ("%first = s32[] constant(1)", "%first = s32[] copy(%c)"),
    ("%one = s32[] constant(1)", "%one = s32[] copy(%i)"),
  ],
)
def test_a_loop_that_starts_or_steps_by_what_nobody_knows_is_a_guess(constant, other):
  assert TPU_STEP.count(constant) == 1
  text = TPU_STEP.replace("  %b = ", "  %c = s32[] parameter(2)\n  %b = ")
  costs = program_costs(text.replace(constant, other))
  assert costs.guessed_loops == 1 and costs.counts["collective-permute"] == 1


def test_what_is_sent_to_other_slices_is_a_kind_of_its_own_with_its_loops():
  sent = """
  %token = token[] after-all()
  %send = (bf16[64,8]{1,0}, u32[], token[]) send(%x, %token), is_host_transfer=true, MEGASCALE
  %sent = token[] send-done(%send), is_host_transfer=true, MEGASCALE
  %recv = (bf16[64,8]{1,0}, u32[], token[]) recv(%token), is_host_transfer=true, MEGASCALE
  %received = (bf16[64,8]{1,0}, token[]) recv-done(%recv), is_host_transfer=true, MEGASCALE
  %done = """
  place = "\n  %done = "
  assert TPU_STEP.count(place) == 1
  handler = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
  before = program_costs(TPU_STEP)
  with_sends = TPU_STEP.replace(place, sent)
  costs = program_costs(with_sends.replace("MEGASCALE", handler))
  runs, num_bytes = 6, 64 * 8 * 2
  assert costs.counts == before.counts + Counter({"between slices": runs})
  assert costs.sizes["between slices"] == costs.sent["between slices"] == runs * num_bytes
  assert costs.num_bytes == before.num_bytes + runs * 2 * num_bytes, "read, and written"
  to_its_host = program_costs(with_sends.replace("MEGASCALE", "frontend_attributes={}"))
  assert to_its_host.counts == before.counts


def started(kind, given, *operands):
  """A program that is the start of one instruction of two operands."""
  left, right = operands
  return program_costs(f"""
ENTRY %main (a: {left}, b: {right}) -> {given} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %start = {given} {kind}-start(%a, %b), replica_groups=[2,4]<=[8], dimensions={{0}}
}}
""")


def test_all_that_a_gather_of_two_arrays_gives_is_counted():
  given = "((bf16[8,16], bf16[2,16]), (bf16[32,16], bf16[8,16]))"
  costs = started("all-gather", given, "bf16[8,16]", "bf16[2,16]")
  taken, gathered = 2 * 16 * (8 + 2), 2 * 16 * (32 + 8)
  assert costs.sizes == {"all-gather": gathered} and costs.num_bytes == taken + gathered


def test_all_that_a_sum_of_two_arrays_gives_is_counted():
  costs = started("all-reduce", "(f32[8,16], f32[2,16])", "f32[8,16]", "f32[2,16]")
  assert costs.sizes == {"all-reduce": 4 * 16 * (8 + 2)}


def test_copies_and_cuts_that_are_only_started_move_what_they_give():
  fast = "bf16[64,128]{1,0:T(8,128)(2,1)S(1)}"
  costs = program_costs(f"""
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {{
  %a = bf16[64,128]{{1,0}} parameter(0)
  %cut = ((bf16[64,128]{{1,0}}), bf16[8,128]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%a)
  %fetch = ({fast}, bf16[64,128]{{1,0}}, u32[]{{:S(2)}}) copy-start(%a)
  %fetched = {fast} copy-done(%fetch)
  %store = (bf16[64,128]{{1,0}}, {fast}, u32[]{{:S(2)}}) copy-start(%fetched)
  ROOT %stored = bf16[64,128]{{1,0}} copy-done(%store)
}}
""")
  assert costs.num_bytes == 2 * 8 * 128 + 2 * (2 * 64 * 128)  # each passes main memory once


@pytest.mark.parametrize(
  "window, labels, shapes, flops",
  [
    (
      "size=1",
      "0bf_io0->0bf",
      ("16,784,1024", "1024,512,1", "16,784,512"),
      2 * 16 * 784 * 1024 * 512,
    ),
    # A batched product: of 16 x 16 pairs only the equal ones meet.
    (
      "size=16 stride=15 lhs_dilate=16",
      "0bf_0io->0bf",
      ("16,64,784", "16,784,1024", "16,64,1024"),
      2 * 16 * 64 * 784 * 1024,
    ),
    # Three places of the kernel, one beyond each end: 3 * 10 - 2 pairs.
    ("size=3 pad=1_1", "b0f_0io->b0f", ("2,10,4", "3,4,5", "2,10,5"), 2 * 2 * 4 * 5 * 28),
  ],
)
def test_convolutions_count_what_is_no_padding(window, labels, shapes, flops):
  left, kernel, result = (f"f32[{shape}]" for shape in shapes)
  text = f"""
ENTRY %main (a: {left}, b: {kernel}) -> {result} {{
  %a = {left} parameter(0)
  %b = {kernel} parameter(1)
  ROOT %c = {result} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
  assert program_costs(text).flops == flops


@pytest.mark.parametrize("num_blocks", [None, 1, 8])
def test_a_causal_kernel_counts_the_blocks_that_it_visits(num_blocks):
  q, k, order = "bf16[28,4096,128]", "bf16[4,4096,128]", "s32[4096,128]"
  operands = {"q": q, "k": k, "v": k, "o": order}
  if num_blocks:  # tables of the blocks of keys that a block of queries sees
    table = f"[1,{num_blocks},{num_blocks}]"
    operands = {"next": f"s16{table}", "seen": f"s8{table}", **operands}
  lines = [f"  %{name} = {kind} parameter({i})" for i, (name, kind) in enumerate(operands.items())]
  names = ", ".join(f"%{name}" for name in operands)
  text = "\n".join(
    [
      f"ENTRY %main () -> {q} {{",
      *lines,
      f'  ROOT %splash_mha_dq.1 = {q} custom-call({names}), custom_call_target="tpu_custom_call"',
      "}",
    ]
  )
  share = {None: 1, 1: 1, 8: 36 / 64}[num_blocks]
  assert program_costs(text).flops == 3 * 2 * 28 * 4096**2 * 128 * share


def test_the_roofline_names_what_takes_longest():
  costs = Costs(flops=197e12, num_bytes=819e9 / 2)
  costs.sent["all-gather"] = 50e9
  bound = roofline(CHIPS["v5e"], costs)
  assert [bound[f"{part}_seconds"] for part in PARTS] == [1.0, 0.5, 0.25, 0]
  assert bound["bound_by"] == "compute" and bound["is"] == "an estimate"


@pytest.mark.parametrize(
  "chip, seconds, bound_by",
  [("v5e", 2.0, "data_centre"), ("v5p", 1.0, "data_centre"), ("v6e", 0.5, "link")],
)
def test_what_goes_to_other_slices_takes_its_time_beside_the_links(chip, seconds, bound_by):
  costs = Costs()
  costs.sent.update({"all-gather": 250e9, "between slices": 6.25e9})
  bound = roofline(CHIPS[chip], costs)
  assert bound["data_centre_seconds"] == seconds and bound["bound_by"] == bound_by
  assert bound["link_seconds"] == round(250e9 / CHIPS[chip].sent_bytes_per_second, 6)


def test_a_data_centre_network_of_unknown_speed_is_said_to_be_unknown():
  costs = Costs(flops=1)
  costs.sent["between slices"] = 1e9
  bound = roofline(CHIPS["v4"], costs)
  assert bound["data_centre_seconds"] is None and bound["bound_by"] == "compute"
  assert "not published" in bound["is"]
