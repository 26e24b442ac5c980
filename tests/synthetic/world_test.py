"""The synthetic world: scenes keep their rules, any size shows the same, a seed fixes the files."""

import itertools
import json

import av
import numpy as np
import pytest
from PIL import Image

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.synthetic import render as rendering
from videochat_flash_jax.synthetic import world as synthetic
from videochat_flash_jax.synthetic.render import COLOURS, render
from videochat_flash_jax.synthetic.shapes import KINDS, signed_distance


def scenes(num_seconds, count=20):
  return [
    synthetic.draw_scene(np.random.default_rng([seed, num_seconds]), num_seconds)
    for seed in range(count)
  ]


def test_there_are_sixteen_kinds_and_eight_colours_and_no_two_silhouettes_agree():
  assert len(set(KINDS)) == 16 and len(COLOURS) == 8
  line = np.linspace(-1.1, 1.1, 64, dtype=np.float32)
  x, y = np.meshgrid(line, line)
  inside = [signed_distance(kind, x, y) < 0 for kind in range(len(KINDS))]
  for one, other in itertools.combinations(inside, 2):
    assert (one ^ other).sum() > 0.12 * (one | other).sum()


@pytest.mark.parametrize("num_seconds", [4, 8, 32, 64, 120])
def test_events_have_distinct_kinds_last_up_to_eight_seconds_and_follow_one_another(num_seconds):
  for scene in scenes(num_seconds):
    kinds = [event.kind for event in scene.events]
    assert 1 <= len(kinds) <= 12 and len(set(kinds)) == len(kinds)
    assert num_seconds < 8 or len(kinds) >= 2
    end = 0
    for event in scene.events:
      assert event.start >= end and 1 <= event.length <= 8
      end = event.start + event.length
    assert end <= num_seconds


def test_events_start_at_every_phase_of_a_clip_and_have_every_length():
  events = [event for scene in scenes(64, 40) for event in scene.events]
  assert {event.start % 4 for event in events} == {0, 1, 2, 3}
  assert {event.length for event in events} == set(range(1, 9))


def test_a_thing_is_seen_in_the_middle_of_each_of_its_seconds_and_in_no_other():
  for scene in scenes(16):
    _, cover = render(scene, np.arange(16) + 0.5, 32)
    seen = cover.mean(axis=(1, 2)) > 0.02
    assert seen.tolist() == [scene.event_at(second) >= 0 for second in range(16)]


def test_everything_moves_within_a_second():
  for scene in scenes(16):
    frames, _ = render(scene, np.arange(17) / 8, 64)
    changed = np.abs(np.diff(frames.astype(int), axis=0)).max(axis=-1) > 4
    assert changed.mean(axis=(1, 2)).min() > 0.01


def test_a_small_picture_is_a_large_one_shrunk():
  scene = scenes(16)[0]
  seconds = np.arange(16) + 0.5
  small, large = (render(scene, seconds, size)[0] for size in (32, 256))
  for one, other in zip(small, large, strict=True):
    shrunk = np.asarray(Image.fromarray(other).resize((32, 32), Image.Resampling.BOX), int)
    assert np.abs(one - shrunk).mean() < 2.0


def test_things_are_drawn_where_they_are_as_if_everywhere(monkeypatch):
  moments = np.sort(np.random.default_rng(0).uniform(0, 16, 9)), 5 + (np.arange(8) + 0.5) / 8
  several = [(scene, seconds) for scene in scenes(16, count=4) for seconds in moments]
  windowed = [render(*about, 48) for about in several]
  monkeypatch.setattr(rendering, "_window", lambda *_: (slice(None), slice(None)))
  for about, (frames, cover) in zip(several, windowed, strict=True):
    whole_frames, whole_cover = render(*about, 48)
    np.testing.assert_array_equal(frames, whole_frames)
    np.testing.assert_array_equal(cover, whole_cover)


def test_attribute_answers_are_the_colours_drawn():
  for scene in scenes(32, 5):
    asked = synthetic.ask(scene, np.random.default_rng(0), "attribute")
    assert len(asked) == len(scene.events)
    for event in scene.events:
      (question,) = [q for q in asked if KINDS[event.kind] in q.text]
      assert question.answer == list(COLOURS)[event.colour]
      frames, cover = render(scene, np.array([event.start + 0.5]), 64)
      painted = np.median(frames[cover > 0.99], axis=0)
      nearest = min(COLOURS, key=lambda name: np.abs(painted - COLOURS[name]).sum())
      assert nearest == question.answer


def test_absence_questions_follow_the_events():
  for scene in scenes(32, 5):
    shown = [KINDS[event.kind] for event in scene.events]
    absence = synthetic.ask(scene, np.random.default_rng(1), "absence")
    for question in absence:
      (kind,) = [k for k in KINDS if f" {k}" in question.text]
      assert question.answer == ("yes" if kind in shown else "no")
    answers = [question.answer for question in absence]
    assert answers.count("yes") == answers.count("no") > 0


def test_the_same_seed_writes_the_same_files_and_another_seed_others(tmp_path):
  written = []
  for name, seed in (("a", 3), ("b", 3), ("c", 4)):
    synthetic.write_dataset(tmp_path / name, 2, (4, 8), seed)
    files = sorted((tmp_path / name).rglob("*.*"))
    written.append({file.name: file.read_bytes() for file in files})
  assert written[0] == written[1]
  assert written[0].keys() == written[2].keys() == {"0000.mp4", "0001.mp4", "annotations.json"}
  assert all(written[0][name] != written[2][name] for name in written[0])


def test_a_video_is_h264_and_lasts_as_many_seconds_as_it_has_sampled_frames(tmp_path):
  rows = synthetic.write_dataset(tmp_path, 3, (4, 12), 0, synthetic.QUESTION_KINDS, 5)
  annotations = json.loads((tmp_path / "annotations.json").read_text())
  assert len(annotations) == rows
  assert {row["kind"] for row in annotations} == set(synthetic.QUESTION_KINDS)
  assert annotations[0]["video"] == "videos/0000.mp4"
  assert annotations[0]["conversations"][0]["value"].startswith("<image>\n")
  for path in sorted((tmp_path / "videos").iterdir()):
    with av.open(str(path)) as container:
      stream = container.streams.video[0]
      assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
      num_frames = sum(1 for _ in container.decode(stream))
      assert num_frames % (4 * synthetic.VIDEO_FPS) == 0
      assert stream.duration * stream.time_base == num_frames // synthetic.VIDEO_FPS


def test_a_range_without_a_multiple_of_four_is_refused_before_anything_is_written(tmp_path):
  with pytest.raises(InputError, match="no multiple of 4 lies in the range of frames 5:7"):
    synthetic.write_dataset(tmp_path / "out", 1, (5, 7), 0)
  assert not (tmp_path / "out").exists()


def test_existing_annotations_are_not_overwritten(tmp_path):
  (tmp_path / "annotations.json").write_text("[]")
  with pytest.raises(InputError, match=r"annotations\.json exists"):
    synthetic.write_dataset(tmp_path, 1, (4, 4), 0)
