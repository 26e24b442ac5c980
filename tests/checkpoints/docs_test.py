"""What docs/checkpoints.md says is so: its commands, and its numbers from the configs."""

import argparse
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from videochat_flash_jax.checkpoints.hub.int8_tensors import int8_shapes
from videochat_flash_jax.cli import convert
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash

TEXT = (Path(__file__).parent.parent.parent / "docs" / "checkpoints.md").read_text()
COMMANDS = [
  shlex.split(line)
  for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.S | re.M)
  for line in block.replace("\\\n", " ").splitlines()
]
ROWS = {
  name: cells.split(" | ")
  for name, cells in re.findall(r"^\| `(VideoChat-Flash-\S+)`[^|]*\| (.*) \|$", TEXT, re.M)
}
RELEASED = [
  getattr(VideoChatFlashConfig, name)()
  for name, member in vars(VideoChatFlashConfig).items()
  if isinstance(member, classmethod) and name != "tiny"
]
TOKENS_PER_FRAME = 16


def test_every_released_model_has_its_row():
  assert ROWS.keys() == {config.name for config in RELEASED}


@pytest.mark.parametrize("config", RELEASED, ids=lambda config: config.name)
def test_memory_and_frames_are_those_of_the_config(config):
  make = lambda: VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)  # noqa: E731
  wide = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
  weights, in_int8 = (
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for tree in (wide, int8_shapes(wide))
  )
  decoder = config.decoder
  cache_of_token = 2 * 2 * decoder.depth * decoder.num_kv_heads * decoder.head_size
  cache = 1000 * TOKENS_PER_FRAME * cache_of_token
  frames = decoder.max_positions // TOKENS_PER_FRAME // 1000 * 1000
  assert ROWS[config.name][1:] == [
    f"{weights / 1e9:.2f} GB",
    f"{in_int8 / 1e9:.2f} GB",
    f"{cache / 1e9:.2f} GB",
    f"{frames:,}",
  ]


def test_the_presets_share_of_tokens_is_computed():
  preset, depth = DropoutConfig.model_card(), VideoChatFlashConfig.qwen2_7b_res448().decoder.depth
  ends = (*preset.layers, depth)
  lengths = [end - start for start, end in zip((0, *preset.layers), ends, strict=True)]
  share = sum(n * ratio for n, ratio in zip(lengths, preset.ratios, strict=True)) / depth
  assert f"{share:.0%}".replace("%", " %") in TEXT


def test_every_command_is_one(tmp_path, monkeypatch):
  parser = argparse.ArgumentParser()
  convert.add_arguments(parser)
  monkeypatch.chdir(tmp_path)
  ran = 0
  for program, verb, *arguments in COMMANDS:
    assert (program, verb) == ("vcflash", "convert")
    if parser.parse_args(arguments).model == "tiny":
      assert main([verb, *arguments]) == 0
      ran += 1
  assert ran == 3 < len(COMMANDS)
