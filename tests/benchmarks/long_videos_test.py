"""Long videos at sizes that take no time; what is measured is not asserted, only what is said."""

import json
import xml.etree.ElementTree

import pytest

from videochat_flash_jax.benchmarks import length, prefill, second_question, watch
from videochat_flash_jax.benchmarks.decode import prefill_work
from videochat_flash_jax.benchmarks.log_plot import Panel, log_plot
from videochat_flash_jax.benchmarks.long_videos import ranked_dropout

TINY = prefill.TINY


@pytest.mark.slow
def test_watch_reports():
  report = watch.run((64, 128))
  assert json.loads(json.dumps(report)) == report
  assert list(report["frames"]) == ["64", "128"]
  for found in report["frames"].values():
    alone = [found["seconds"][stage] for stage in watch.STAGES]
    assert found["seconds"][found["slowest"]] == max(alone) > 0
    assert found["times_slowest"] == found["seconds"]["watch"] / max(alone)
    assert found["times_sum"] == found["seconds"]["watch"] / sum(alone)
    assert found["times_least"] <= found["times_slowest"]
  assert list(report["exponents"]) == ["watch", *watch.STAGES, "flops_of_read"]
  assert len(watch.summary(report).splitlines()) == 2 + 2 * 2


@pytest.mark.slow
def test_prefill_reports(monkeypatch):
  monkeypatch.setattr("videochat_flash_jax.benchmarks.floors._PRODUCT_SIZE", 32)
  monkeypatch.setattr("videochat_flash_jax.benchmarks.floors._MEMORY_VALUES", 1024)
  report = prefill.run(prompts={"tiny": prefill.Prompt(TINY, 600)})
  assert json.loads(json.dumps(report)) == report
  (phase,) = report["phases"].values()
  assert phase["ratio_to_peer"] == phase["seconds"] / phase["peer_seconds"]


@pytest.mark.slow
def test_second_question_reports():
  cases = {"ranked": second_question.Case(dropout=ranked_dropout(3))}
  report = second_question.run((64,), cases, 1)
  assert json.loads(json.dumps(report)) == report
  found = report["frames"]["64"]["ranked"]
  assert found["percent_of_first"] == 100 * found["second_seconds"] / found["first_seconds"]
  assert found["times_one"] == found["eight_seconds"] / found["one_seconds"]
  assert len(second_question.summary(report).splitlines()) == 1 + 2


@pytest.mark.slow
def test_length_reports_and_draws(tmp_path):
  report = length.run((16, 64), stream=160, window=32)
  assert json.loads(json.dumps(report)) == report
  for setting in report["settings"].values():
    shorter, longest = setting["frames"].values()
    assert longest["peak_bytes"] >= longest["peak_bytes_before"] > longest["cache_bytes"] > 0
    without_cache = longest["peak_bytes"] - longest["cache_bytes"]
    assert setting["times_memory"] == without_cache / shorter["peak_bytes"]
  stream = report["stream"]
  assert len(stream["seconds_per_clip"]) == len(stream["peak_bytes"]) == 10
  assert stream["times_seconds"] == stream["seconds_per_clip"][9] / stream["seconds_per_clip"][0]
  assert stream["times_memory"] == stream["peak_bytes"][9] / stream["peak_bytes"][0] >= 1
  assert len(length.summary(report).splitlines()) == 1 + 2 * 3 + 1
  assert xml.etree.ElementTree.fromstring(length.plot(report)).tag.endswith("svg")


def test_growth_in_proportion_has_the_exponent_1():
  assert watch.exponent((1, 2, 4), (3, 6, 12)) == pytest.approx(1)
  assert watch.exponent((1, 2, 4), (3, 12, 48)) == pytest.approx(2)


def test_of_the_last_layer_only_keys_and_values_are_counted():
  last = prefill_work(TINY, 100).flops - prefill.prefix_work(TINY, 100).flops
  heads, attended = TINY.num_heads * TINY.head_size, 100 * 101 / 2
  rest_of_layer = 2 * 100 * TINY.width * (2 * heads + 3 * TINY.mlp_width)
  assert last == rest_of_layer + 4 * attended * heads


def test_a_plot_has_its_points_on_logarithmic_axes():
  svg = log_plot([Panel("seconds < 9", "frames", {"a & b": [(1, 1), (10, 10), (100, 100)]})])
  points = xml.etree.ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
  places = [(float(point.get("cx")), float(point.get("cy"))) for point in points]
  assert places == [(0, 320), (160, 160), (320, 0)]
