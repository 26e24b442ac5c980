"""At sizes that take no time; what it measures is not asserted, only what it says."""

import json

import pytest

from videochat_flash_jax.benchmarks import pipeline

SMALL = pipeline.Load(
  film_frames=(60, 120), height=48, width=64, num_texts=1, tokens=4096, image_size=64,
  frames=(4, 32), num_batches=1,
)  # fmt: skip


@pytest.mark.slow
def test_pipeline_reports(monkeypatch):
  monkeypatch.setattr(pipeline, "_step_seconds", lambda load: 0.01)
  report = pipeline.run(SMALL)
  assert json.loads(json.dumps(report))["name"] == "pipeline"
  assert report["step"]["seconds"] == 0.01
  for workers in ("workers 2", "workers 0"):
    found = report[workers]
    assert 0 <= found["wait_share"] <= 1 and 0.95 < found["tokens_filled"] <= 1
    assert found["frames_per_second"] * found["batch_seconds"] > 0
  assert len(pipeline.summary(report).splitlines()) == 3


@pytest.mark.slow
def test_a_step_takes_time():
  assert pipeline._step_seconds(SMALL) > 0
