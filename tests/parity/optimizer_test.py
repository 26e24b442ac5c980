"""A step of the optimiser from the original's gradients, golden family 06, is a plain AdamW's."""

import dataclasses

import numpy as np

from tests.parity.golden_flash import FAMILY
from tests.train.optimizer_test import ADAMW, plain_adamw, stepped


def golden_gradients():
  """The gradients that are stored of one training row, by the names of their weights."""
  tensors = FAMILY.tensors("c_train")
  key = next(name.split(".grad.")[0] for name in tensors if ".grad." in name)
  prefix = f"{key}.grad."
  return {
    name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
  }


def test_steps_from_golden_gradients_are_those_of_a_plain_adamw():
  gradients = golden_gradients()
  rng = np.random.default_rng(0)
  weights = {
    name: rng.normal(0, 0.02, value.shape).astype(np.float32) for name, value in gradients.items()
  }
  settings = dataclasses.replace(ADAMW, learning_rate=1e-3, warm_up=0.1, clip_norm=0.1)
  steps = [gradients] * 3
  found = stepped(weights, steps, settings, 20)
  for name, expected in plain_adamw(weights, steps, settings, 20).items():
    assert np.abs(found[name] - expected).max() <= 1e-6 * np.abs(expected).max(), name
    assert np.abs(expected - weights[name]).max() > 1e-5, name
