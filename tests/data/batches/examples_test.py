"""Examples: which frames and tiles, what text stands around them, what is too long."""

import contextlib
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.data.batches.small_mixture import CLIP_TOKENS, SIZE, config, make_tokenizer
from tests.data.media.video_files import pictures, write_video
from videochat_flash_jax.data.batches.data_config import ExampleConfig
from videochat_flash_jax.data.batches.examples import ExampleReader, skipped_positions
from videochat_flash_jax.data.batches.row_media import read_row_video
from videochat_flash_jax.data.media.frame_sampling import clip_indices, training_indices
from videochat_flash_jax.data.media.image_tiling import cut_tiles, pad_to_square, sequence_order
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL, encode_row
from videochat_flash_jax.errors import InputError

TURNS = [
  {"from": "human", "value": "<image>\nWhat moves?"},
  {"from": "gpt", "value": "A cat."},
]
TWO_IMAGES = [TURNS[0] | {"value": "<image> or <image>?"}, TURNS[1]]
TEXT_TURNS = [TURNS[0] | {"value": "And then?"}, TURNS[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A video of 40 frames at 4 fps, folders of 12 pictures, and two images."""
  folder = tmp_path_factory.mktemp("media")
  write_video(folder / "a.mp4", pictures(40), fps=4)
  for name in ("plain", "tvqa"):
    (folder / name).mkdir()
    for number, picture in enumerate(pictures(12), start=1):
      Image.fromarray(picture).save(folder / name / f"{number}.png")
  for name, size in (("wide", (60, 130)), ("high", (90, 31)), ("line", (1, 17_000))):
    Image.fromarray(pictures(1, *size)[0]).save(folder / f"{name}.png")
  return folder


@pytest.fixture(scope="module")
def tokenizer():
  return make_tokenizer()


def read(row, **changes):
  """Reads a row; one about nothing but text has no placeholder."""
  made = config(position_skip=0, **changes)
  reader = ExampleReader(made.example, made.row_shape, make_tokenizer)
  turns = TURNS if {"video", "image"} & set(row) else [TURNS[0] | {"value": "Hm?"}, TURNS[1]]
  return reader.read({"conversations": turns} | row, np.random.default_rng(0))


def text_of(example, tokenizer):
  return tokenizer.decode(example.token_ids[example.visual_index < 0])


def test_a_video_gives_clips_the_time_message_and_a_position_for_each_visual_token(
  folder, tokenizer
):
  example = read({"video": str(folder / "a.mp4")})
  with open_video(folder / "a.mp4") as video:
    picks = training_indices("dynamic_fps1", 40, 4.0, num_picks=0, min_frames=4, max_frames=32)
    frames = video.read(picks, SIZE)
  assert len(picks) == 8
  np.testing.assert_array_equal(example.frames, frames.reshape(2, 4, SIZE, SIZE, 3))
  assert example.tiles.shape == (0, 1, SIZE, SIZE, 3)
  said = "\nThe video lasts for 10.00 seconds, and 8 frames are uniformly sampled from it. \nWhat"
  assert said in text_of(example, tokenizer)
  index = example.visual_index
  np.testing.assert_array_equal(index[index >= 0], np.arange(2 * CLIP_TOKENS))
  np.testing.assert_array_equal(example.positions, np.arange(len(index)))


@pytest.mark.parametrize("style", ["qwen", "clean"])
def test_labels_are_those_of_the_text_and_visual_tokens_have_none(folder, tokenizer, style):
  example = read({"video": str(folder / "a.mp4")}, label_style=style, time_message=None)
  row = {"video": "a.mp4", "conversations": TURNS}
  text = encode_row(row, tokenizer, label_style=style)
  is_text = example.visual_index < 0
  np.testing.assert_array_equal(example.labels[is_text], text.labels[text.ids >= 0])
  np.testing.assert_array_equal(example.token_ids[is_text], text.ids[text.ids >= 0])
  assert (example.labels[~is_text] == IGNORE_LABEL).all()


def test_stage_1_reads_four_frames_and_the_caption_alone(folder, tokenizer):
  row = {"video": str(folder / "a.mp4")}
  example = read(row, template="plain", sampling="middle", frames=(4, 4))
  assert example.frames.shape[0] == 1
  assert text_of(example, tokenizer) == "A cat.\n"


def test_a_clip_is_read_where_it_is_and_its_times_count_from_its_start(folder, tokenizer):
  row = {"video": str(folder / "a.mp4"), "start": 2, "end": "8.5"}
  example = read(row, time_message="long")
  with open_video(folder / "a.mp4") as video:
    picks = clip_indices(40, 4.0, 2.0, 8.5, 4)
    np.testing.assert_array_equal(example.frames[0], video.read(picks, SIZE))
  times = ", ".join(str(round(pick / 4 - 2, 1)) for pick in picks)
  said = f"The video lasts for 6.50 seconds, and 4 frames are uniformly sampled at {times} seconds."
  assert said in text_of(example, tokenizer)


@pytest.mark.parametrize(
  "name, fields, seconds, files",
  [
    ("plain", {}, 12.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    ("tvqa", {}, 4.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),  # counted as seconds all the same
    ("plain", {"start": 2, "end": 9}, 7.0, [2, 4, 7, 9]),
    ("plain", {"start": 1, "end": 1000}, 11.0, [1, 2, 4, 5, 7, 8, 10, 11]),
    ("tvqa", {"start": 0, "end": 1.5}, 1.5, [0, 1, 3, 4]),
  ],
)
def test_folders_of_pictures_are_read_as_by_the_original(folder, name, fields, seconds, files):
  row = {"video": str(folder / name), "video_read_type": "img"} | fields
  video = read_row_video(row, config().example)
  np.testing.assert_array_equal(
    video.clips.reshape(-1, SIZE, SIZE, 3), resize(pictures(12)[files], SIZE)
  )
  assert video.seconds == seconds
  fps = 3.0 if name == "tvqa" else 1.0
  np.testing.assert_allclose(video.frame_seconds, np.array(files) / fps - fields.get("start", 0))


def test_a_gif_is_counted_at_one_frame_a_second(folder):
  row = {"video": str(folder / "a.mp4"), "video_read_type": "gif"}
  video = read_row_video(row, config().example)
  assert video.seconds == 40 and len(video.clips) == 8


def test_one_image_is_cut_into_tiles_whose_tokens_stand_as_in_one_picture(folder):
  example = read({"image": str(folder / "wide.png")})
  tiles = cut_tiles(pictures(1, 60, 130)[0], 5, 2, SIZE)
  np.testing.assert_array_equal(example.tiles[:, 0], tiles)
  index = example.visual_index
  np.testing.assert_array_equal(index[index >= 0], sequence_order(5, 2, CLIP_TOKENS))


def test_several_images_are_padded_squares(folder, tokenizer):
  paths = [str(folder / "wide.png"), str(folder / "high.png")]
  row = {"image": paths, "conversations": TWO_IMAGES}
  example = read(row)
  for tile, size in zip(example.tiles, ((60, 130), (90, 31)), strict=True):
    np.testing.assert_array_equal(tile[0], resize(pad_to_square(pictures(1, *size)[0]), SIZE))
  index = example.visual_index
  np.testing.assert_array_equal(index[index >= 0], np.arange(2 * CLIP_TOKENS))
  assert "The video" not in text_of(example, tokenizer)


def test_text_alone_has_no_visual_token(tokenizer):
  example = read({})
  assert (example.visual_index == -1).all() and not example.frames.size and not example.tiles.size
  assert text_of(example, tokenizer).endswith("A cat.\n")


def test_a_long_conversation_is_cut_where_the_row_ends(folder):
  row = {"video": str(folder / "a.mp4"), "conversations": TURNS + TEXT_TURNS * 40}
  whole, cut = read(row, tokens=4096), read(row)
  assert len(whole.token_ids) > len(cut.token_ids) == 256
  assert (whole.is_cut, cut.is_cut) == (False, True)
  for name in ("token_ids", "labels", "visual_index", "positions"):
    np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[:256])


@pytest.mark.parametrize(
  "row, changes, said",
  [
    (
      {"video": "a.mp4"},
      {"tokens": 64, "clips_per_shard": 99, "frames": (32, 32)},
      "96 of them visual",
    ),
    ({"conversations": [TURNS[0] | {"value": "long " * 300}, TURNS[1]]}, {}, "a row has 256"),
    ({"video": "a.mp4"}, {"clips_per_shard": 1, "frames": (16, 16)}, "clips_per_shard is 1"),
    ({"image": "wide.png"}, {"tiles_per_shard": 5}, "tiles_per_shard is 5; give more"),
  ],
)
def test_what_would_lose_pictures_or_all_answers_is_too_long(folder, row, changes, said):
  row = {name: str(folder / v) if isinstance(v, str) else v for name, v in row.items()}
  if "96" in said:  # 32 frames are 8 clips of 12 tokens
    changes = changes | {"clip_tokens": 12}
  with pytest.raises(BrokenRow, match=said) as error:
    read(row, **changes)
  assert error.value.reason == "too long"


@pytest.mark.parametrize(
  "row, reason",
  [
    ({"video": "gone.mp4"}, "missing file"),
    ({"video": "wide.png/a.mp4"}, "missing file"),
    ({"image": "gone.png"}, "missing file"),
    ({"image": "a.mp4"}, "unreadable image"),
    ({"image": "plain"}, "unreadable image"),
    ({"video": "."}, "unreadable video"),
    ({"video": ["a.mp4", "a.mp4"]}, "bad media field"),
    ({"video": "a.mp4", "start": 50, "end": 60}, "bad times"),
    ({"video": "a.mp4", "start": 5, "end": 4}, "bad times"),
    ({"video": "a.mp4", "conversations": []}, "bad conversations"),
    ({"conversations": [TURNS[0] | {"value": "no \ud800 letter"}, TURNS[1]]}, "bad conversations"),
    ({"image": ["line.png", "line.png"], "conversations": TWO_IMAGES}, "unreadable image"),
  ],
)
def test_what_cannot_be_used_has_its_reason(folder, row, reason, tmp_path):
  for kind in {"video", "image"} & set(row):
    paths = row[kind] if isinstance(row[kind], list) else [row[kind]]
    whole = [str(tmp_path if path == "." else folder / path) for path in paths]
    row = row | {kind: whole if isinstance(row[kind], list) else whole[0]}
  with pytest.raises(BrokenRow) as error:
    read(row)
  assert error.value.reason == reason


@pytest.mark.parametrize("error", [RuntimeError("out of order"), ValueError("out of order")])
def test_a_decoder_that_fails_in_an_unknown_way_breaks_the_row_alone(folder, monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr("videochat_flash_jax.data.batches.row_media.read_image", fail)
  with pytest.raises(BrokenRow, match=r"unreadable image: .*wide.png: \w+Error: out of order"):
    read({"image": str(folder / "wide.png")})


def test_more_images_than_a_row_has_tokens_for_are_refused_unread(folder):
  row = {"image": [str(folder / "gone.png")] * 65}
  with pytest.raises(BrokenRow, match=r"^too long: 65 images of 4 tokens, but a row has 256"):
    read(row)


def test_the_positions_of_a_long_conversation_jump_within_what_is_kept_of_it():
  made = config(position_skip=50, tokens=128)
  reader = ExampleReader(made.example, made.row_shape, make_tokenizer)
  row = {"conversations": TEXT_TURNS * 80}
  for seed in range(5):
    found = reader.read(row, np.random.default_rng(seed)).positions
    expected = skipped_positions(128, 50, np.random.default_rng(seed))
    np.testing.assert_array_equal(found, expected)


def test_a_damaged_video_is_reported(folder, monkeypatch):
  assert not read({"video": str(folder / "a.mp4")}).is_damaged
  monkeypatch.setattr("videochat_flash_jax.data.media.video_reader.VideoReader.damaged", True)
  assert read({"video": str(folder / "a.mp4")}).is_damaged


@pytest.mark.parametrize("style", ["qwen", "clean"])
def test_a_row_is_too_long_until_a_word_of_the_answer_fits(tokenizer, style):
  """However little of the answer's turn is left; "qwen" learns its header, too."""
  kept = []
  for length in range(200, 260):
    turns = [TURNS[0] | {"value": " a" * length}, TURNS[1]]
    with contextlib.suppress(BrokenRow):
      example = read({"conversations": turns}, label_style=style)
      assert tokenizer.decode(example.token_ids).rpartition("assistant\n")[2].startswith("A")
      kept.append(length)
  assert 0 < len(kept) < 60 and kept == list(range(200, 200 + len(kept)))


@pytest.mark.parametrize("template", ["qwen_2", "plain"])
def test_an_answer_is_cut_if_a_word_of_it_is_missing(folder, tokenizer, template):
  row = {"video": str(folder / "a.mp4")}
  options = {"template": template, "frames": (4, 4), "num_shards": 1, "zigzag": False}
  whole = read(row, **options)
  no_words = IGNORE_LABEL, tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.newline_id
  last_word = np.flatnonzero(~np.isin(whole.labels, no_words))[-1]
  for tokens in range(last_word - 1, len(whole.token_ids) + 1):
    cut = read(row, tokens=int(tokens), **options)
    assert cut.is_cut == (tokens <= last_word) and len(cut.token_ids) == tokens


def test_positions_jump_twice_within_bounds():
  rng = np.random.default_rng(0)
  seconds, jumps = set(), set()
  for _ in range(300):
    steps = skipped_positions(5, 3, rng) - np.arange(5)
    assert steps.min() >= 0 and steps.max() <= 3 and (np.diff(steps) >= 0).all()
    assert np.count_nonzero(np.diff(steps)) <= 1
    seconds.add(int(steps[-1]))
    jumps |= set(np.flatnonzero(np.diff(steps)).tolist())
  assert seconds == {0, 1, 2, 3} and jumps == {0, 1, 2, 3}


def test_positions_without_skipping_are_plain():
  np.testing.assert_array_equal(skipped_positions(4, 0, np.random.default_rng(0)), np.arange(4))


def test_a_reader_crosses_processes_without_its_tokenizer(folder):
  made = config()
  reader = ExampleReader(made.example, made.row_shape, make_tokenizer)
  row = {"video": str(folder / "a.mp4"), "conversations": TURNS}
  first = reader.read(row, np.random.default_rng(5))
  assert len(pickle.dumps(reader)) < 2000
  again = pickle.loads(pickle.dumps(reader)).read(row, np.random.default_rng(5))
  for ours, theirs in zip(first, again, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_an_empty_time_message_is_none():
  assert ExampleConfig(image_size=SIZE, time_message="").time_message is None
  with pytest.raises(InputError, match="time_message is 'brief'; give short or long"):
    ExampleConfig(image_size=SIZE, time_message="brief")
