"""Checkpoints of a run: whole or not at all, on any mesh, and what goes wrong is one line."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoints.runs.saved_states import (
  BALLAST,
  CONFIG,
  DATA,
  RUN,
  State,
  assert_one_line,
  killed,
  shapes_of,
  state,
  steps,
)
from videochat_flash_jax.checkpoints.runs import manager
from videochat_flash_jax.checkpoints.runs.manager import RunCheckpoints
from videochat_flash_jax.errors import InputError


def assert_restores(directory, step, value):
  with RunCheckpoints(directory) as checkpoints:
    restored = checkpoints.restore(shapes_of(state()))
  assert restored.step == step and restored.data == DATA and restored.run["config"] == CONFIG
  expected = state(value)
  assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
  for ours, saved in zip(jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True):
    assert ours.dtype == saved.dtype
    np.testing.assert_array_equal(ours, saved)


def test_a_checkpoint_reads_back_as_it_was_with_who_wrote_it(tmp_path):
  with RunCheckpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    assert checkpoints.restore(shapes_of(state())) is None and checkpoints.newest_step is None
    checkpoints.save(5, state(5.0), DATA, RUN)
    checkpoints.wait()
    assert checkpoints.newest_step == 5
    run = checkpoints.restore(shapes_of(state())).run
  assert run["step"] == 5 and run["jax"] == jax.__version__ and run["version"]
  assert_restores(tmp_path / "run" / "checkpoints", 5, 5.0)


@pytest.fixture
def short_files():
  """No file may be longer than 100 kB: the system refuses more, as a full disk does."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

  yield limit
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["run [1]", "a\\b", "c%20d", "what?", "#|*"])
def test_a_directory_may_have_any_name(tmp_path, name):
  tree = {"trained": {"w": jnp.arange(4.0)}, "frozen": {"w": jnp.ones(2)}}
  with RunCheckpoints(tmp_path / name) as checkpoints:
    checkpoints.save(5, tree, DATA, RUN)
  assert [path.name for path in tmp_path.iterdir()] == [name]
  with RunCheckpoints(tmp_path / name) as checkpoints:
    restored = checkpoints.restore(shapes_of(tree))
  jax.tree.map(np.testing.assert_array_equal, restored.state, tree)


def test_the_newest_stay_and_so_do_those_of_every_so_many_steps(tmp_path):
  with RunCheckpoints(tmp_path, keep=2, keep_every=10) as checkpoints:
    for step in range(5, 35, 5):
      checkpoints.save(step, state(step), DATA, RUN)
  assert steps(tmp_path) == [10, 20, 25, 30]
  with RunCheckpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(35, state(35), DATA, RUN)
  assert steps(tmp_path) == [35]


@pytest.mark.parametrize("lost", ["run", "data/metadata", "state/manifest.ocdbt"])
def test_only_whole_checkpoints_count_among_those_that_are_kept(tmp_path, lost):
  with RunCheckpoints(tmp_path, keep=2, keep_every=10) as checkpoints:
    for step in (10, 15, 20, 25, 27):
      checkpoints.save(step, state(step), DATA, RUN)
  assert steps(tmp_path) == [10, 20, 25, 27]
  for step in (20, 27):
    (tmp_path / str(step) / lost).rename(tmp_path / f"lost of {step}")
  with RunCheckpoints(tmp_path, keep=2, keep_every=10) as checkpoints:
    assert checkpoints.newest_step == 25
    checkpoints.save(26, state(26), DATA, RUN)
    checkpoints.wait()
    for step in (20, 27):
      (tmp_path / f"lost of {step}").rename(tmp_path.parent / f"{tmp_path.name} lost of {step}")
    assert steps(tmp_path) == [10, 25, 26, 27]  # 27 is newer than what is kept, and not in the way
    checkpoints.save(28, state(28), DATA, RUN)
    checkpoints.save(29, state(29), DATA, RUN)
  assert steps(tmp_path) == [10, 28, 29]


def test_a_checkpoint_that_could_not_be_written_pushes_none_out(tmp_path, short_files):
  checkpoints = RunCheckpoints(tmp_path, keep=2)
  for step in (1, 2):
    checkpoints.save(step, state(step), DATA, RUN)
  checkpoints.wait()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  short_files()
  checkpoints.save(3, {"w": jax.random.normal(jax.random.key(0), (200, 1000))}, DATA, RUN)
  with pytest.raises(InputError, match="step 3"):
    checkpoints.wait()
  assert steps(tmp_path) == [1, 2]
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  checkpoints.save(4, state(4), DATA, RUN)
  checkpoints.close()
  assert set(steps(tmp_path)) >= {2, 4}
  assert_restores(tmp_path, 4, 4)


def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_under_its_name(tmp_path):
  with RunCheckpoints(tmp_path, keep=1) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), DATA, RUN)
    while checkpoints._manager.is_saving_in_progress():  # then it is moved, and not yet removed
      time.sleep(0.01)
    assert steps(tmp_path / ".removed") == [1]
    assert [path.name for path in tmp_path.iterdir() if path.name.isdecimal()] == ["2"]
  assert steps(tmp_path) == [2]
  (tmp_path / ".removed" / "1").mkdir(parents=True)  # as a kill leaves it
  with RunCheckpoints(tmp_path, keep=1):
    assert steps(tmp_path) == [2]


def test_a_step_that_is_there_is_not_saved_again(tmp_path):
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state(5.0), DATA, RUN)
    checkpoints.save(5, state(6.0), DATA, RUN)
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state(7.0), DATA, RUN)
  assert_restores(tmp_path, 5, 5.0)


def test_steps_that_consume_the_state_do_not_change_what_is_being_saved(tmp_path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  weights = {"w": jnp.arange(500_000.0)}
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, weights, DATA, RUN)
    for _ in range(5):
      weights = jax.block_until_ready(step(weights))
    restored = checkpoints.restore(shapes_of(weights))
  np.testing.assert_array_equal(restored.state["w"], np.arange(500_000.0))


def test_what_a_kill_leaves_half_written_is_no_checkpoint_and_in_nobody_s_way(tmp_path):
  shapes = shapes_of({"state": state(), "ballast": {"w": jnp.zeros(BALLAST)}})

  def unfinished():
    return any(tmp_path.glob("*.orbax-checkpoint-tmp"))

  killed(tmp_path, lambda: (tmp_path / "3").is_dir() and unfinished())
  assert unfinished()
  with RunCheckpoints(tmp_path, keep=2) as checkpoints:
    restored = checkpoints.restore(shapes)
    step = restored.step
    np.testing.assert_array_equal(restored.state["state"].trained["decoder"]["norm"]["scale"],
                                  np.arange(4.0) + step)  # fmt: skip
    checkpoints.save(step + 1, restored.state, DATA, RUN)
    checkpoints.save(step + 2, restored.state, DATA, RUN)
  assert steps(tmp_path) == [step + 1, step + 2]


def test_what_is_left_of_one_that_was_being_removed_does_not_count(tmp_path):
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state(5.0), DATA, RUN)
    checkpoints.save(6, state(6.0), DATA, RUN)
  (tmp_path / "6" / "run").rename(tmp_path / "gone")
  assert_restores(tmp_path, 5, 5.0)
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(6, state(7.0), DATA, RUN)
  assert_restores(tmp_path, 6, 7.0)


def go_on_training(checkpoints):
  for _ in range(6000):
    checkpoints.check()
    time.sleep(0.01)


def test_a_full_disk_is_one_line_and_what_was_whole_stays(tmp_path, short_files, capfd):
  noise = {"w": jax.random.normal(jax.random.key(0), (200, 1000))}
  checkpoints = RunCheckpoints(tmp_path)
  checkpoints.save(5, state(5.0), DATA, RUN)
  checkpoints.wait()
  short_files()
  checkpoints.save(6, noise, DATA, RUN)
  with pytest.raises(InputError) as caught:
    go_on_training(checkpoints)
  assert_one_line(caught, "step 6", "File too large", "newest whole one is 5", "make room")
  assert steps(tmp_path) == [5]
  checkpoints.save(7, noise, DATA, RUN)
  with pytest.raises(InputError, match="step 7"):
    checkpoints.save(8, state(8.0), DATA, RUN)
  checkpoints.save(9, state(9.0), DATA, RUN)
  checkpoints.close()
  assert steps(tmp_path) == [5, 9] and "Traceback" not in capfd.readouterr().err
  assert_restores(tmp_path, 9, 9.0)


def test_a_disk_that_is_full_for_frozen_weights_is_one_line_and_the_next_save_is_whole(
  tmp_path, short_files
):
  noise = jax.random.normal(jax.random.key(0), (200, 1000))
  frozen = {"trained": {"w": jnp.ones(3)}, "frozen": {"w": noise}}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with RunCheckpoints(tmp_path) as checkpoints:
    short_files()
    with pytest.raises(InputError) as caught:
      checkpoints.save(5, frozen, DATA, RUN)
    assert_one_line(caught, "step 5", "File too large", "no whole one", "make room")
    assert not list(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(6, frozen, DATA, RUN)
  with RunCheckpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(shapes_of(frozen))
  np.testing.assert_array_equal(restored.state["frozen"]["w"], noise)


def test_another_process_that_is_gone_is_not_taken_for_a_broken_disk(tmp_path, monkeypatch):
  def gone(_):
    raise jax.errors.JaxRuntimeError("Gloo all-gather failed: Connection closed by peer")

  monkeypatch.setattr(manager, "allgather_streams", gone)
  with RunCheckpoints(tmp_path) as checkpoints:
    with pytest.raises(InputError, match="could not be written"):  # one process has no others
      checkpoints.save(5, state(), DATA, RUN)
    with monkeypatch.context() as two:
      two.setattr(jax, "process_count", lambda: 2)
      with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        checkpoints.save(5, state(), DATA, RUN)


def test_a_directory_that_is_lost_meanwhile_is_one_line(tmp_path):
  checkpoints = RunCheckpoints(tmp_path / "checkpoints")
  (tmp_path / "checkpoints").rmdir()
  with pytest.raises(InputError) as caught:
    checkpoints.save(5, state(5.0), DATA, RUN)
  assert_one_line(caught, "step 5", "No such file", "no whole one")
  checkpoints.close()


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError) as caught:
    RunCheckpoints(tmp_path / "file" / "checkpoints")
  assert_one_line(caught, "checkpoints cannot be written", "Not a directory")


def test_a_checkpoint_may_be_refused_by_what_wrote_it(tmp_path):
  def refuse(where, run):
    raise InputError(f"{where} is of {run['config']}")

  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state(), DATA, RUN)
    with pytest.raises(InputError) as caught:
      checkpoints.restore(shapes_of(state()), refuse)
    assert_one_line(caught, str(tmp_path / "5"), str(CONFIG))
    assert "damaged" not in str(caught.value)
    assert checkpoints.restore(shapes_of(state()), lambda *_: None).step == 5


def test_arrays_of_another_config_are_refused_by_their_names(tmp_path):
  more = state()
  more.trained["lora_a"] = jnp.ones((3, 2))
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, state(), DATA, RUN)
    for other, words in (
      (state(size=6), ["trained.decoder.norm.scale", "holds [4]", "needs [6]"]),
      (more, ["trained.lora_a", "holds none", "needs [3, 2]"]),
      (State({}, state().optimizer), ["trained.decoder.norm.scale", "needs none"]),
    ):
      with pytest.raises(InputError) as caught:
        checkpoints.restore(shapes_of(other))
      assert_one_line(caught, *words)
      assert "damaged" not in str(caught.value)


def test_damaged_files_are_reported_with_the_remedy(tmp_path):
  weights = {"w": jnp.ones(3)}
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(5, weights, DATA, RUN)
    checkpoints.wait()
    for path in (tmp_path / "5" / "state").rglob("d/*"):
      path.unlink()
    with pytest.raises(InputError) as caught:
      checkpoints.restore(shapes_of(weights))
    assert_one_line(caught, str(tmp_path / "5"), "damaged", "the one before")


def test_orbax_does_not_ask_jax_for_signals_of_which_others_count_the_steps(tmp_path, monkeypatch):
  def asked(step):
    raise AssertionError(f"asked at step {step}")

  monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", asked)
  with RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state(), DATA, RUN)
  assert (tmp_path / "1").is_dir()
