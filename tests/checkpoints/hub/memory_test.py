"""Weights stream: the host holds the largest tensor and little more, however large the model is."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.checkpoints.small_checkpoints import make_model
from tests.fake_devices import fake_devices
from tests.models.small_models import CONFIG
from videochat_flash_jax.checkpoints.convert import flat_weights
from videochat_flash_jax.checkpoints.hub.hf_config import write_config
from videochat_flash_jax.checkpoints.hub.hf_mapping import hub_tensors
from videochat_flash_jax.checkpoints.hub.safetensors_files import StoredTensor, write_directory

ROOT = Path(__file__).parents[3]
DECODER = dataclasses.replace(CONFIG.decoder, num_heads=16, num_kv_heads=4, head_size=64)
PATTERN = np.random.default_rng(0).standard_normal(65_537).astype(jnp.bfloat16)


def blocks(shape):
  """Values that repeat, but not from row to row."""
  for start in range(0, shape[0], 1024):
    yield np.resize(np.roll(PATTERN, start), (min(1024, shape[0] - start), *shape[1:]))


def write(directory, decoder):
  """Writes a checkpoint in bfloat16 with a large decoder; returns bytes of all, and of the largest.

  Its tensors are never all in memory.
  """
  config = dataclasses.replace(CONFIG, decoder=decoder)
  state = nnx.state(nnx.eval_shape(lambda: make_model(config)))
  shapes = {path: leaf.shape for path, leaf in flat_weights(state)}
  tensors = {
    name: StoredTensor(tensor.shape, "BF16", functools.partial(blocks, tensor.shape))
    for name, tensor in hub_tensors(shapes).items()
  }
  directory.mkdir()
  num_bytes = write_directory(directory, "test", tensors, shard_bytes=10**9)
  write_config(config, directory, dtype="bfloat16")
  return num_bytes, max(2 * int(np.prod(tensor.shape)) for tensor in tensors.values())


@pytest.fixture(autouse=True)
def _compiled_as_for_users(monkeypatch):
  """What tests tell the compiler makes it quick, and the stacking of layers slow."""
  monkeypatch.delenv("XLA_FLAGS", raising=False)


def load(directory, *weights, num_devices=1):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    **fake_devices(num_devices),
  }
  command = [sys.executable, "-m", "tests.checkpoints.hub.loading_process", str(directory)]
  command += weights
  output = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert output.returncode == 0, output.stderr[-2000:]
  return json.loads(output.stdout)


@pytest.mark.slow
def test_layers_go_to_their_stacks_and_shards_one_by_one(tmp_path):
  # Stacks of up to 160 MB, of which groups of 64 MiB are on the host at once.
  decoder = dataclasses.replace(DECODER, width=1024, mlp_width=4096, depth=20)
  num_bytes, _ = write(tmp_path / "model", decoder)
  report = load(tmp_path / "model", num_devices=4)
  assert report["differ"] == []
  assert report["host_bytes"] < 0.6 * num_bytes


@pytest.mark.slow
def test_the_host_holds_less_than_the_largest_tensor_and_a_gibibyte(tmp_path):
  decoder = dataclasses.replace(
    DECODER, vocab_size=100_000, width=2048, mlp_width=8192, depth=24, head_size=128
  )
  num_bytes, largest = write(tmp_path / "model", decoder)
  assert num_bytes > largest + 3 * 2**30
  assert load(tmp_path / "model")["host_bytes"] < largest + 2**30
  assert load(tmp_path / "model", "int8")["host_bytes"] < largest + 2**30
