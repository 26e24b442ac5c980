"""Plans of what visual tokens are dropped, on their way from the host into a step.

How many tokens a row has left depends on what was packed into it, while a program has fixed shapes
and all hosts must run the same one. So the host plans with room for whole rows (`with_plan`), and
right before a step `shorten` cuts off what no row of the whole batch needs, to eighths of a row:
few programs are compiled, and all hosts see the same lengths.

  row of 16 tokens   slots of the rows            longest   shortened to
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

_LENGTHS = 8  # to which rows are shortened


def with_plan(
  batch: Mapping[str, np.ndarray], dropout: DropoutConfig, layout: Layout
) -> dict[str, Any]:
  """A batch of `data.batches.sharded_rows` with the plan of its own whole rows, as `dropout`.

  Args:
    batch: this process's rows, on the host.
    dropout: when, how many and how.
    layout: in whose order tokens stand.
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
  """Cuts off the room that no row needs; waits for the plan, and for nothing behind it.

  Args:
    plan: of a batch on the devices, from `with_plan`.
    layout: gives the parts into which a row must be divisible.
  """
  num_tokens = plan.is_visual.shape[1]
  parts = 2 * layout.sequence_shards
  unit = -(-num_tokens // (_LENGTHS * parts)) * parts
  needed = jax.device_get(_longest(tuple(drop.indices for drop in plan.drops.values())))
  drops = {}
  for (layer, drop), longest in zip(plan.drops.items(), needed, strict=True):
    length = min(-(-max(int(longest), 1) // unit) * unit, num_tokens)
    drops[layer] = type(drop)(_cut(drop.indices, length))
  return plan._replace(drops=drops)


@jax.jit
def _longest(slots):
  return [(x < x.shape[1]).sum(axis=1).max() for x in slots]


@functools.partial(jax.jit, static_argnums=1)
def _cut(slots, length):
  return slots[:, :length]


class ShorteningStep:
  """A step, or an evaluation, that is given whole plans and computes with shortened ones."""

  def __init__(self, step: Callable, layout: Layout):
    self._step, self._layout = step, layout

  def __call__(self, state, batch: dict[str, Any]):
    return self._step(state, {**batch, "dropout": shorten(batch["dropout"], self._layout)})

  def lower(self, state, batch: dict[str, Any]):
    """As of a jitted function; of plans that are described by shapes, those with the most room."""
    return self._step.lower(state, batch)
