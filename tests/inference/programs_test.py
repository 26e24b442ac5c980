"""What `vcflash compile` compiles is what the engine runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference import prefix as prefix_module
from videochat_flash_jax.inference import program_shapes, programs
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.inference.prefix import Prefix
from videochat_flash_jax.models.config import DropoutConfig, VideoChatFlashConfig
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig

CHUNK, TEXT, VISUAL, NEW = 64, 5, 150, 40
DROPOUT = {
  "off": None,
  "on": DropoutConfig("uniform0_attention", layers=(1, 2), ratios=(1.0, 0.5, 0.25)),
}


def shapes(tree):
  return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


class Taken(Exception):
  """What a program was given."""


def taken_by(monkeypatch, name, run):
  """What the engine gives to one of its programs, which is not run."""

  def take(*arguments):
    raise Taken(arguments)

  with monkeypatch.context() as patch:
    patch.setattr(programs, name, take)
    with pytest.raises(Taken) as taken:
      run()
  return taken.value.args[0]


@pytest.fixture
def small_chunks(monkeypatch):
  for module in (prefix_module, program_shapes):
    monkeypatch.setattr(module, "CHUNK", CHUNK)


@pytest.mark.parametrize("dropout", DROPOUT)
@pytest.mark.slow
def test_the_engine_takes_what_the_compiled_programs_say(monkeypatch, small_chunks, dropout):
  config = dataclasses.replace(VideoChatFlashConfig.tiny(), dropout=DROPOUT[dropout])
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  model = VideoChatFlash(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
  engine = Engine(model, stop_ids=[1], layout=Layout(mesh))
  visual_tokens = np.zeros((VISUAL, config.decoder.width), jnp.bfloat16)
  sizes = {"num_tokens": TEXT + VISUAL, "num_visual": VISUAL}
  prefix = Prefix(engine)
  prefix.add_text(np.zeros(TEXT, np.int32))
  prefix.expect(VISUAL)

  given = taken_by(monkeypatch, "read", lambda: prefix.add_visual(visual_tokens))
  program, said = program_shapes.prefill_program(config, mesh, **sizes)
  weights_to_cache = slice(2, 6)
  assert shapes(given[weights_to_cache]) == shapes(said[:4])
  assert shapes(prefix.caches[1:]) == shapes(said[4][: len(prefix.caches) - 1])
  (_, states), _ = jax.eval_shape(program, *said)
  assert given[-2:] == (range(said[3].depth), "" if states is None else "states")

  prefix = Prefix(engine)
  prefix.add_text(np.zeros(TEXT, np.int32))
  prefix.add_visual(visual_tokens)
  prefix.settle()
  reading = engine.read([np.zeros(9, np.int32), np.zeros(33, np.int32)], NEW, behind=[prefix])
  given = taken_by(monkeypatch, "decode", lambda: next(engine.write(reading, NEW)))
  _, said = program_shapes.decode_program(config, mesh, rows=2, **sizes, max_new_tokens=NEW)
  caches_to_finished = slice(3, 7)
  assert shapes(given[caches_to_finished]) == shapes(said[caches_to_finished])


def test_more_to_see_than_to_read_is_refused_with_the_fields_to_change():
  config, mesh = VideoChatFlashConfig.tiny(), make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(InputError, match="tokens_per_row or fewer clips_per_shard") as error:
    program_shapes.prefill_program(config, mesh, num_tokens=1024, num_visual=1025)
  assert "1,024 tokens has no room for 1,025 visual ones" in str(error.value)
