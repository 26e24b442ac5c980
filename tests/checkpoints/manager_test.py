"""Checkpoints of a run: what is saved can be read, and the newest two stay."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from videochat_flash_jax.checkpoints.manager import save_checkpoint


def test_a_checkpoint_reads_back_as_it_was_and_the_newest_two_stay(tmp_path):
  for step in range(3):
    weights = {"decoder": {"norm": jnp.arange(4.0) + step}, "vision": {"bias": jnp.ones(2) * step}}
    save_checkpoint(tmp_path / "checkpoints", step, weights)
  assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    restored = manager.restore(2, args=ocp.args.StandardRestore(weights))
  np.testing.assert_array_equal(restored["decoder"]["norm"], np.arange(4.0) + 2)
  np.testing.assert_array_equal(restored["vision"]["bias"], [2, 2])
