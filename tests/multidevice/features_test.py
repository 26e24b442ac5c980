"""Features made and used on a mesh are those of one device."""

import numpy as np

from tests.conftest import assert_close, quick_jit
from videochat_flash_jax.inference.engine import Engine
from videochat_flash_jax.parallel.layout import Layout
from videochat_flash_jax.parallel.mesh import make_mesh
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.testing.dummy import dummy_model


def pictures(*shape):
  return np.random.default_rng(0).integers(0, 256, (*shape, 32, 32, 3), np.uint8)


def test_an_engine_on_a_mesh_gives_and_takes_features_as_one_on_a_device():
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  one, spread = (
    Engine(dummy_model(), [0]),
    Engine(dummy_model(), [0], Layout(mesh, replicate_weights=True)),
  )
  clips = pictures(9, 4)
  features, same = (np.stack(list(engine.encode_features(clips))) for engine in (one, spread))
  assert_close(same, features, relative=2**-8)
  of_spread, of_one = (np.concatenate(list(e.project_groups(features))) for e in (spread, one))
  assert_close(of_spread, of_one, relative=1e-5)


def test_rows_split_over_a_mesh_are_projected_as_they_are_encoded():
  mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
  layout, model = Layout(mesh), dummy_model()
  clips, tiles = pictures(2, 4, 4), pictures(2, 4, 1)

  def both(model, clips, tiles):
    features, tile_features = (model.encode_features(x, layout) for x in (clips, tiles))
    projected = model.project_rows(features, layout, tile_features)
    return projected, model.encode_rows(clips, layout, tiles)

  split = layout.device_put((clips, tiles), "batch", "clips")
  projected, encoded = quick_jit(both)(model, *split)
  assert_close(projected, encoded, relative=1e-5)
