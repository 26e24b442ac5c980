"""Adds plans of which visual tokens are dropped to batches, and fits their lengths to the batch.

The number of kept tokens of a row depends on what was packed into it. A program has fixed shapes,
and all hosts must run the same program. So the host makes plans with room for whole rows
(`with_plan`). Right before a step, `shorten` cuts off the room that no row of the whole batch
needs, to a multiple of an eighth of a row. So few programs are compiled, and all hosts see the same
lengths.

  row of 16 tokens   indices of the kept tokens   longest   shortened to
  first drop         0 1 2 5 8 9 15 - - - -...      7          8
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from videochat_flash_jax.models.config import DropoutConfig
from videochat_flash_jax.models.token_dropout import DropoutPlan, plan_dropout
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.zigzag import unzigzag_order

_NUM_LENGTHS = 8  # different lengths of a shortened row


def with_plan(
  batch: Mapping[str, np.ndarray], dropout: DropoutConfig, layout: Layout
) -> dict[str, Any]:
  """Adds the field `dropout` to a batch: a plan with room for whole rows.

  Args:
    batch: this process's rows, on the host, as `data.batches.sharded_rows` lays them out.
    dropout: in which layers tokens are dropped, how many, and by which rule.
    layout: says in which order the tokens of a row are.
  """
  fields = (batch[name] for name in ("visual_index", "segment_ids", "labels"))
  if layout.zigzag:
    order = unzigzag_order(batch["labels"].shape[1], layout.sequence_shards)
    fields = (field[:, order] for field in fields)
  visual_index, segment_ids, labels = fields
  num_tokens = labels.shape[1]
  plan = plan_dropout(
    dropout, visual_index >= 0, segment_ids, labels >= 0, round_length=lambda _: num_tokens
  )
  return {**batch, "dropout": plan}


def shorten(plan: DropoutPlan, layout: Layout) -> DropoutPlan:
  """Cuts off the room that no row needs; waits only until the plan is on the devices.

  Args:
    plan: of a batch on the devices, from `with_plan`.
    layout: gives the number of parts that a length must be divisible by.
  """
  num_tokens = plan.is_visual.shape[1]
  parts = 2 * layout.sequence_shards
  unit = -(-num_tokens // (_NUM_LENGTHS * parts)) * parts
  needed = jax.device_get(_longest(tuple(drop.indices for drop in plan.drops.values())))
  drops = {}
  for (layer, drop), longest in zip(plan.drops.items(), needed, strict=True):
    length = min(-(-max(int(longest), 1) // unit) * unit, num_tokens)
    drops[layer] = type(drop)(_cut(drop.indices, length))
  return plan._replace(drops=drops)


@jax.jit
def _longest(slots):
  """The largest number of kept tokens of a row, for each drop."""
  return [(x < x.shape[1]).sum(axis=1).max() for x in slots]


@functools.partial(jax.jit, static_argnums=1)
def _cut(slots, length):
  return slots[:, :length]


class ShorteningStep:
  """A step, or an evaluation, that shortens the plan of its batch before it computes."""

  def __init__(self, step: Callable, layout: Layout):
    """Wraps a jitted step, for batches on a mesh."""
    self._step, self._layout = step, layout

  def __call__(self, state, batch: dict[str, Any]):
    """The step on a batch from `with_plan`."""
    return self._step(state, {**batch, "dropout": shorten(batch["dropout"], self._layout)})

  def lower(self, state, batch: dict[str, Any]):
    """Lowers the step for plans with room for whole rows: shapes do not say what is needed."""
    return self._step.lower(state, batch)
