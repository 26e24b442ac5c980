"""Watching and asking: conversation, streaming, reuse of what was read."""

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints.small_checkpoints import with_far_token
from tests.data.media.video_files import pictures
from videochat_flash_jax.checkpoints import convert
from videochat_flash_jax.data.media.frame_sampling import inference_indices
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.data.mixture.broken import BrokenRow
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.chat import VideoChat
from videochat_flash_jax.inference.conversation import SeenImages
from videochat_flash_jax.inference.feature_encoding import group_clips
from videochat_flash_jax.models.config import DropoutConfig, YarnConfig
from videochat_flash_jax.parallel.mesh_config import MeshConfig
from videochat_flash_jax.testing.dummy import write_dummy_checkpoint, write_dummy_video

QUESTIONS = ("What colour is the star?", "Where does it go?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_dummy_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def chat(checkpoint):
  return VideoChat.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return write_dummy_video(tmp_path_factory.mktemp("video") / "a.mp4", num_frames=48, fps=2)


def ask(video, question, **options):
  return video.ask(question, max_new_tokens=24, **options)


def test_a_second_is_one_frame(chat, path):
  video = chat.watch(path)
  assert (video.seconds, video.num_frames) == (24.0, 24)
  assert chat.watch(path, max_frames=8).num_frames == 8


def write_pictures(folder, numbers):
  folder.mkdir()
  for number in numbers:
    Image.fromarray(pictures(12)[number]).save(folder / f"{number}.png")
  return str(folder)


def test_of_a_row_only_its_part_of_the_video_is_seen(chat, path, visual_tokens):
  seen = chat.see_row({"video": str(path), "start": 4, "end": 14})
  indices = 8 + inference_indices(20, 2.0, chat.config.sampling)
  assert (seen.seconds, seen.num_frames, len(indices)) == (10.0, 8, 8)
  with open_video(path) as video:
    frames = video.frames(indices, chat.config.vision.image_size)
    expected = chat.engine.encode(group_clips(frames, 4))
  np.testing.assert_array_equal(visual_tokens(seen), expected)
  assert chat.see_row({"video": str(path), "start": 4, "end": 14}, max_frames=4).num_frames == 4
  whole = chat.see_row({"video": str(path)})
  np.testing.assert_array_equal(visual_tokens(whole), visual_tokens(chat.watch(path)))


def test_a_part_of_a_folder_is_seen_as_a_folder_of_these_pictures(chat, tmp_path, visual_tokens):
  row = {"video": write_pictures(tmp_path / "all", range(12)), "video_read_type": "img"}
  seen = chat.see_row(row | {"start": 4, "end": 8})
  alone = chat.watch(write_pictures(tmp_path / "part", range(4, 8)))
  assert (seen.num_frames, seen.seconds) == (alone.num_frames, alone.seconds) == (4, 4.0)
  np.testing.assert_array_equal(visual_tokens(seen), visual_tokens(alone))


def test_rates_of_rows_are_those_of_training(chat, path, tmp_path):
  folder = write_pictures(tmp_path / "TVQA", range(12))
  assert chat.see_row({"video": folder, "video_read_type": "img"}).seconds == 4.0
  assert chat.see_row({"video": str(path), "video_read_type": "gif"}).seconds == 48.0


def test_rows_of_images_and_of_text_are_seen(chat, tmp_path, visual_tokens):
  folder = write_pictures(tmp_path / "all", range(2))
  images = [f"{folder}/0.png", f"{folder}/1.png"]
  seen = chat.see_row({"image": images})
  assert isinstance(seen, SeenImages) and seen.num_images == 2
  np.testing.assert_array_equal(visual_tokens(seen), visual_tokens(chat.look(images)))
  assert chat.see_row({})._prefix is None


@pytest.mark.parametrize(
  "row, reason",
  [
    ({"video": "gone.mp4"}, "missing file"),
    ({"image": ["gone.png"]}, "missing file"),
    ({"video": __file__}, "unreadable video"),
    ({"image": __file__}, "unreadable image"),
    ({"video": "a.mp4", "start": 50, "end": 60}, "bad times"),
  ],
)
def test_what_a_row_cannot_show_has_its_reason(chat, path, row, reason):
  row = {name: str(path) if value == "a.mp4" else value for name, value in row.items()}
  with pytest.raises(BrokenRow) as error:
    chat.see_row(row)
  assert error.value.reason == reason


def test_a_fault_of_the_model_does_not_break_a_row(chat, path, monkeypatch):
  def fail(clips):
    raise RuntimeError("out of memory")

  monkeypatch.setattr(chat.engine, "encode_groups", fail)
  with pytest.raises(RuntimeError, match="out of memory"):
    chat.see_row({"video": str(path)})


def test_the_same_video_and_question_give_the_same_answer(chat, checkpoint, path):
  answers = {ask(chat.watch(path), QUESTIONS[0]) for _ in range(2)}
  answers.add(ask(VideoChat.from_pretrained(checkpoint).watch(path), QUESTIONS[0]))
  assert len(answers) == 1


def test_chat_and_video_tell_what_they_are(chat, checkpoint, path):
  assert repr(chat) == f"VideoChat({checkpoint.name!r}, dtype=float32)"
  video = chat.watch(path, max_frames=8)
  assert repr(video) == "WatchedVideo(8 frames of 24.0 s, questions answered: 0)"
  ask(video, QUESTIONS[0])
  assert "questions answered: 1" in repr(video)


def test_the_context_can_be_set_and_stretched(checkpoint):
  own = VideoChat.from_pretrained(checkpoint).config.decoder
  short = VideoChat.from_pretrained(checkpoint, context=100)
  with pytest.raises(InputError, match="holds 100"):
    short.ask("star " * 60)
  stretched = VideoChat.from_pretrained(checkpoint, yarn=4.0).config.decoder
  assert stretched.max_positions == 4 * own.max_positions
  assert stretched.yarn == YarnConfig(4.0, own.max_positions)
  named = VideoChat.from_pretrained(checkpoint, yarn=YarnConfig(2.0, 500)).config.decoder
  assert (named.max_positions, named.yarn) == (1000, YarnConfig(2.0, 500))
  both = VideoChat.from_pretrained(checkpoint, yarn=4.0, context=9000).config.decoder
  assert (both.max_positions, both.yarn.factor) == (9000, 4.0)


def test_a_stretched_context_gives_other_answers(checkpoint, chat):
  stretched = VideoChat.from_pretrained(checkpoint, yarn=8.0)
  assert ask(stretched, "star " * 40) != ask(chat, "star " * 40)


@pytest.mark.parametrize(
  "setting, said",
  [
    ({"context": 0}, "context is 0"),
    ({"yarn": 0.5}, "yarn is 0.5"),
    ({"yarn": 1e30}, "yarn is 1e"),
    ({"dropout": "model_card"}, "dropout is 'model_card'"),
    ({"context": 3.5}, "context is 3.5: give a positive integer"),
    ({"context": True}, "context is True"),
    ({"yarn": True}, "yarn is True"),
    ({"yarn": "4"}, "yarn is '4'"),
    ({"yarn": YarnConfig(4.0, 0)}, "yarn is YarnConfig"),
    ({"yarn": YarnConfig(np.nan, 100)}, "yarn is YarnConfig"),
    ({"yarn": YarnConfig(4.0, 10**400)}, "yarn is YarnConfig"),
    ({"dropout": DropoutConfig("uniform", (1,), (1.0, np.nan))}, "dropout.ratios is"),
    ({"dropout": DropoutConfig("uniform", (True,), (1.0, 0.5))}, "dropout.layers is"),
    ({"dropout": DropoutConfig("", (1,), (1.0, 0.5))}, "dropout.kind is ''"),
    ({"mesh": 4}, "mesh is 4; give a MeshConfig"),
    ({"mesh": MeshConfig(tensor=True)}, "mesh.tensor is True"),
    ({"mesh": MeshConfig(data=1.0)}, "mesh.data is 1.0"),
    ({"features": 3}, "features is 3: give a path"),
    ({"dtype": "int8"}, "dtype is 'int8': give float32 or bfloat16 or float16"),
    ({"weights": "int4"}, "weights is 'int4': give int8"),
    ({"weights": True}, "weights is True"),
    ({"dtype": "float"}, "dtype is 'float64'"),
    ({"dtype": 3}, "dtype is 3"),
    ({"dropout": DropoutConfig.model_card()}, "dropout.layers is"),
  ],
)
def test_a_setting_that_cannot_be_is_refused(checkpoint, setting, said):
  with pytest.raises(InputError, match=said):
    VideoChat.from_pretrained(checkpoint, **setting)


def test_a_tokenizer_with_ids_that_the_model_does_not_embed_is_refused_before_weights_are_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(convert, "load_weights", lambda *_: pytest.fail("weights were read"))
  with pytest.raises(InputError) as caught:
    VideoChat.from_pretrained(with_far_token(tmp_path / "far"))
  assert str(caught.value) == (
    f"{tmp_path / 'far'}: the highest id of the tokenizer is 768, but the model embeds only 768 "
    "ids, from 0; take both from one checkpoint"
  )


@pytest.mark.parametrize("name", [None, 5, True, b"tiny"])
def test_a_model_that_is_no_name_is_refused(name):
  with pytest.raises(InputError, match="is no model; give a name or a directory"):
    VideoChat.from_pretrained(name)


@pytest.mark.parametrize("value", [True, 3.5, "3", None, -1, 0, np.nan, np.array([1, 2])])
@pytest.mark.parametrize("option", ["max_new_tokens", "temperature", "top_p", "seed", "stream"])
def test_an_option_of_another_type_is_named(chat, option, value):
  fine = {"temperature": (3.5, 0), "seed": (0,), "stream": (True,)}.get(option, ())
  if not isinstance(value, np.ndarray) and value in fine:
    return
  with pytest.raises(InputError, match=f"^{option} is ") as error:
    chat.ask("Why?", **{option: value})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [True, 3.5, "3", -1, 0, np.nan])
def test_a_number_of_frames_that_is_none_is_refused_before_the_file_is_opened(chat, number):
  with pytest.raises(InputError, match=r"^max_frames is "):
    chat.watch("nothing.mp4", number)
  with pytest.raises(InputError, match=r"^progress is 'no': give True or False"):
    chat.watch("nothing.mp4", progress="no")


def test_numbers_of_numpy_are_options_too(chat, path):
  video = chat.watch(path, np.int64(8))
  assert video.num_frames == 8
  options = {"temperature": np.float32(0.5), "top_p": np.float64(0.9), "seed": np.int32(3)}
  answer = video.ask("Why?", max_new_tokens=np.int64(5), **options)
  video.reset()
  assert answer == video.ask("Why?", max_new_tokens=5, temperature=0.5, top_p=0.9, seed=3)


@pytest.mark.parametrize("fps", [0, -1.0, np.nan, np.inf, True, "1", None])
def test_a_rate_that_is_none_is_refused(chat, path, fps):
  with pytest.raises(InputError, match=r"^fps is "):
    chat.watch(path).extend(np.zeros((4, 8, 8, 3), np.uint8), fps)


def test_streamed_pieces_join_to_the_answer(chat, path):
  pieces = list(ask(chat.watch(path), QUESTIONS[0], stream=True))
  assert len(pieces) > 1
  assert "".join(pieces) == ask(chat.watch(path), QUESTIONS[0])


def test_a_question_continues_the_conversation_as_if_it_were_read_from_the_start(chat, path):
  video = chat.watch(path)
  answers = [ask(video, question) for question in QUESTIONS]
  assert video.history == list(zip(QUESTIONS, answers, strict=True))
  fresh = chat.watch(path)
  fresh.history = [(QUESTIONS[0], answers[0])]
  assert ask(fresh, QUESTIONS[1]) == answers[1]


def test_only_what_is_new_is_read_again(chat, path, reads):
  video = chat.watch(path)
  (_, num_watched), *more = reads
  assert num_watched > 24 / 4 * 12 and not more
  ask(video, QUESTIONS[0])
  video.reset()
  ask(video, QUESTIONS[1])
  (_, opening), (_, first), (_, second) = reads[1:]  # the opening of all questions is read once
  assert opening + first < num_watched and second <= first


def test_after_a_reset_the_answer_is_that_of_a_new_conversation(chat, path):
  video = chat.watch(path)
  first = ask(video, QUESTIONS[0])
  ask(video, QUESTIONS[1])
  video.reset()
  assert ask(video, QUESTIONS[0]) == first


def test_a_stream_left_early_spoils_nothing(chat, path):
  video = chat.watch(path)
  next(iter(ask(video, QUESTIONS[1], stream=True)))
  assert video.history == []
  assert ask(video, QUESTIONS[0]) == ask(chat.watch(path), QUESTIONS[0])


def test_an_overtaken_stream_is_refused_and_spoils_nothing(chat, path):
  video = chat.watch(path)
  streams = [video.ask(question, stream=True, max_new_tokens=40) for question in QUESTIONS]
  with pytest.raises(InputError, match="overtaken"):
    next(streams[0])
  stream = video.ask(QUESTIONS[0], stream=True, max_new_tokens=40)
  next(stream)
  later = ask(video, QUESTIONS[1])
  with pytest.raises(InputError, match="overtaken"):
    list(stream)
  assert video.history == [(QUESTIONS[1], later)]
  video.reset()
  assert ask(video, QUESTIONS[1]) == later == ask(chat.watch(path), QUESTIONS[1])


def test_a_refused_question_spoils_nothing(chat, path):
  video = chat.watch(path)
  expected = ask(chat.watch(path), QUESTIONS[0])
  with pytest.raises(InputError, match="empty"):
    video.ask("  ")
  with pytest.raises(InputError, match="context"):
    video.ask("star " * 3000)
  with pytest.raises(InputError, match="max_new_tokens"):
    video.ask("Why?", max_new_tokens=0)
  with pytest.raises(InputError, match="UTF-8"):
    video.ask("caf\udce9?")
  with pytest.raises(InputError, match="the question is None; give a text"):
    video.ask(None)
  assert ask(video, QUESTIONS[0]) == expected


def test_an_extended_video_answers_as_one_watched_whole(chat, path):
  with open_video(path) as reader:
    frames = reader.read(range(0, 48, 2))
  whole, grown = chat.watch(path), chat.watch(path)
  for video in (whole, grown):
    ask(video, QUESTIONS[0])
    video.reset()
  whole.extend(frames)
  for part in np.split(frames, 3):
    grown.extend(part)
  assert (grown.num_frames, grown.seconds) == (48, 48.0)
  assert ask(grown, QUESTIONS[0]) == ask(whole, QUESTIONS[0])


@pytest.mark.parametrize(
  "frames, said",
  [
    (np.zeros((3, 8, 8, 3), np.uint8), "multiple of 4"),
    (np.zeros((0, 8, 8, 3), np.uint8), "no frame"),
    (np.zeros((4, 8, 8, 3), np.float32), "uint8"),
    (np.zeros((4, 8, 8), np.uint8), "uint8"),
    ("a.mp4", "a.mp4"),
    ([], "no frame"),
    (list(np.zeros((3, 8, 8, 3), np.uint8)), "multiple of 4"),
    ([[1, 2], [3], [4], [5]], "frame 0 is of type list"),
    (None, "NoneType cannot be watched"),
    (np.zeros((4, 0, 8, 3), np.uint8), "uint8"),
  ],
)
def test_frames_of_another_form_are_refused(chat, path, frames, said):
  with pytest.raises(InputError, match=said):
    chat.watch(path).extend(frames)
