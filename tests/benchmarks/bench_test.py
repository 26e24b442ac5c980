"""Benchmarks at sizes that take no time. What they measure is not asserted, only what they say."""

import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from videochat_flash_jax.benchmarks import decode, merge, read, vit
from videochat_flash_jax.benchmarks.floors import Limits, Work
from videochat_flash_jax.benchmarks.timing import Seconds, time_in_turns
from videochat_flash_jax.cli import bench
from videochat_flash_jax.cli.main import main
from videochat_flash_jax.inference.cpu_layers import unstack, unstack_decoder
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.qwen2 import Qwen2
from videochat_flash_jax.models.umt import UMT

TINY = VideoChatFlashConfig.tiny()


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
  monkeypatch.setattr("videochat_flash_jax.benchmarks.floors._PRODUCT_SIZE", 32)
  monkeypatch.setattr("videochat_flash_jax.benchmarks.floors._MEMORY_VALUES", 1024)


def assert_well_formed(report, phases):
  assert json.loads(json.dumps(report)) == report
  assert report["dtype"] == "float32" and report["threads"] >= 1
  assert all(rate > 0 for rate in report["limits"].values())
  assert list(report["phases"]) == phases
  for phase in report["phases"].values():
    assert phase["seconds"] >= phase["best_seconds"] > 0
    assert phase["floor_bound_by"] in ("flops", "bytes")
    assert phase["ratio_to_floor"] == phase["seconds"] / phase["floor_seconds"]
    assert (phase["peer_seconds"] is None) == (report["peer"] is None)
    if report["peer"] is not None:
      assert phase["ratio_to_peer"] == phase["seconds"] / phase["peer_seconds"]
  assert (report["note"] is None) == (report["peer"] is not None)
  assert len(bench.summary(report).splitlines()) == 1 + len(phases)


def test_merge_reports():
  report = merge.run(2, clips=2, tokens=16, target=4, width=8, num_heads=2)
  assert_well_formed(report, ["merge"])


@pytest.mark.slow
def test_vit_reports():
  assert_well_formed(vit.run(1, clips=1, config=TINY.vision), ["encode"])


@pytest.mark.slow
def test_decode_reports():
  report = decode.run(1, prompt_tokens=8, new_tokens=3, config=TINY.decoder)
  assert_well_formed(report, ["prefill", "decode_token"])


@pytest.mark.slow
def test_read_reports():
  films = {
    "repeated scenes": read.Film(750, 48, 64, 50, picks=9, repeats=1),
    "short": read.Film(40, 48, 64, 250, picks=8, repeats=2),
  }
  report = read.run(films)
  assert json.loads(json.dumps(report)) == report
  assert list(report["films"]) == list(films)
  for film in report["films"].values():
    assert film["times_full"] == film["full_seconds"] / film["seconds"]
    assert (film["decord_seconds"] is None) == (report["peer"] is None)
    assert film["frames_needed"] <= film["frames_from_key_frame_to_pick"]
    assert 1 <= film["decoded_of_needed"] <= 1.1
  assert len(read.summary(report).splitlines()) == 1 + len(films)


def test_every_benchmark_of_the_command_line_has_a_module():
  for name in bench.BENCHMARKS:
    assert importlib.util.find_spec(f"videochat_flash_jax.benchmarks.{name.replace('-', '_')}")


def test_the_floor_is_what_takes_longer():
  limits = Limits(10.0, bytes_read_per_second=2.0, bytes_copied_per_second=1.0)
  assert limits.floor(Work(flops=50, bytes=4)) == (5.0, "flops")
  assert limits.floor(Work(flops=50, bytes=40)) == (20.0, "bytes")


def test_merging_is_counted_as_similarities_and_sums():
  # 6 -> 4 tokens of width 8 in 2 heads: one round of 3 x 3 similarities of 4 channels.
  assert merge.clip_work(6, 4, 8, 2) == Work(2 * 3 * 3 * 4 + 2 * 6 * 8, (6 + 4) * 8 * 4)


def assert_counted_like_the_compiler(flops, function, *arguments):
  """The compiler counts norms and activations, too, which are a tenth at these sizes."""
  counted = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
  assert flops <= counted <= 1.15 * flops


@pytest.mark.slow
def test_flops_of_the_encoder_agree_with_the_compiler():
  model = UMT(TINY.vision, rngs=nnx.Rngs(0))
  model.blocks = unstack(model.blocks)  # of a scan, one step would be counted
  graph, weights = nnx.split(model)
  assert_counted_like_the_compiler(
    vit.work(TINY.vision, clips=2, num_weights=0).flops,
    lambda weights, pixels: nnx.merge(graph, weights)(pixels),
    weights,
    jnp.ones((2, 4, 32, 32, 3)),
  )


@pytest.mark.slow
def test_flops_of_the_decoder_agree_with_the_compiler():
  config, tokens = TINY.decoder, 64
  model = Qwen2(config, rngs=nnx.Rngs(0))
  unstack_decoder(model)
  graph, weights = nnx.split(model)

  def read(weights, x, cache):
    return nnx.merge(graph, weights).read(x, cache, jnp.array([x.shape[1]]))

  prompt = jnp.ones((1, tokens, config.width))
  prefill_flops = decode.prefill_work(config, tokens).flops
  decode_flops = decode.decode_work(config, tokens).flops
  for x, flops in ((prompt, prefill_flops), (prompt[:, :1], decode_flops)):
    cache = model.cache_type.empty(config, 1, tokens, depth=config.depth)
    assert_counted_like_the_compiler(flops, read, weights, x, cache)


def test_the_round_that_compiles_does_not_count():
  runs = []
  times = time_in_turns({"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, repeats=2)
  assert runs == ["a", "b"] * 3
  assert times["a"].best <= times["a"].median
  assert Seconds(6.0, 3.0).of_each(3) == Seconds(2.0, 1.0)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_its_report(monkeypatch, capsys, as_json):
  monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
  monkeypatch.setattr(merge, "run", functools.partial(merge.run, 1, clips=1, tokens=8, target=2))
  arguments = ["bench", "merge", "--json"] if as_json else ["bench", "merge"]
  assert main(arguments) == 0
  printed = capsys.readouterr().out
  if as_json:
    assert json.loads(printed)["name"] == "merge"
  else:
    assert printed.startswith("merge (float32,") and "x floor" in printed


def test_an_unknown_benchmark_is_one_line_and_code_2(capsys):
  assert main(["bench", "merg"]) == 2
  assert "merg" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["merge", "--plot", "a.svg"], "draws nothing"),
    (["length", "--plot", "no/a.svg"], "no folder"),
  ],
)
def test_a_plot_that_cannot_be_drawn_is_one_line_and_code_2(
  monkeypatch, tmp_path, capsys, arguments, message
):
  monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
  monkeypatch.chdir(tmp_path)
  assert main(["bench", *arguments]) == 2
  assert message in capsys.readouterr().err
