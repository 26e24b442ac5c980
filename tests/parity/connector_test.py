"""The connector of the original, golden family 04: outputs and gradients of every run."""

import re

import jax
import pytest
from flax import nnx

from tests.conftest import Golden, assert_close
from tests.parity.golden_models import hub_gradients, load_golden
from videochat_flash_jax.models.config import ConnectorConfig
from videochat_flash_jax.models.connector import Connector

MANIFEST = Golden("04_projector").json()
TOLERANCE = 2e-6


def as_clips(x, kwargs):
  """Frames [F, P, E] as the clips that the run's arguments make of them."""
  if not kwargs["compress"]:
    return x  # images: a clip of one frame each
  local_frames = kwargs["local_num_frames"]
  num_clips = 1 if local_frames == -1 else len(x) // local_frames
  return x.reshape(num_clips, -1, x.shape[-1])


@pytest.mark.parametrize("run", MANIFEST["runs"], ids=lambda run: run["name"])
def test_outputs_and_gradients_agree(golden, run):
  sizes = MANIFEST["config"]
  config = ConnectorConfig(clip_tokens=run["target"], merge_heads=sizes["num_attention_heads"])
  widths = sizes["mm_hidden_size"], sizes["hidden_size"]
  connector = load_golden(
    lambda: Connector(config, *widths, rngs=nnx.Rngs(0)),
    golden("04_projector").tensors("weights"),
    "connector",
  )
  tensors = golden("04_projector").tensors(run["name"])
  graph, weights = nnx.split(connector)

  @jax.jit
  def run_both_ways(weights, x, grad_out):
    def forward(weights, x):
      return nnx.merge(graph, weights)(as_clips(x, run["kwargs"]))

    out, vjp = jax.vjp(forward, weights, x)
    return out, *vjp(grad_out)

  out, grads, grad_x = run_both_ways(weights, tensors["x"], tensors["grad_w"])
  assert_close(out, tensors["out"], relative=TOLERANCE)
  stored = [key for key in tensors if re.match(r"grad(_x|\.)", key)]
  assert stored
  named = hub_gradients(grads, "connector")
  for key in stored:
    if key.startswith("grad_x"):
      actual = grad_x[:, :: int(key.removeprefix("grad_x").removeprefix("_sub") or 1)]
    else:
      actual = named[key.removeprefix("grad.")]
    assert_close(actual, tensors[key], relative=TOLERANCE)


def test_some_run_stores_gradients_of_weights(golden):
  runs = [golden("04_projector").tensors(run["name"]) for run in MANIFEST["runs"]]
  assert any(key.startswith("grad.") for run in runs for key in run)
