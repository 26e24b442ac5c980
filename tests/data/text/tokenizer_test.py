"""Tokenizers: round trips, chat tokens, streaming, and what is said of broken files."""

import json
import pickle
import random
import shutil

import pytest

from tests.checkpoints.small_checkpoints import with_far_token
from videochat_flash_jax.data.text.tokenizer import (
  BPETokenizer,
  SentencePieceTokenizer,
  check_embedded,
  load_tokenizer,
  stream_text,
  train_sentencepiece,
)
from videochat_flash_jax.errors import InputError

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("star", "circle", "square")
SENTENCES = [f"What colour is the {shape}? {colour}" for shape in SHAPES for colour in COLOURS]

AWKWARD_TEXTS = (
  "",
  " ",
  "\n",
  "\n\n\n",
  "  two  blanks   three ",
  "tab\t, return\r\n, nothing\0.",
  "视频里有什么 Привет 日本語 عربى",
  "🐱 👩\u200d👩\u200d👧 e\u0301 \u2581blank sign\u2581\u2581 \ufffd",
  " <image> <0x41> <unk> |im_start|",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return train_sentencepiece(SENTENCES, tmp_path_factory.mktemp("tiny") / "tokenizer.model")


@pytest.fixture
def bpe_folder(golden):
  return golden("08_text").path


@pytest.fixture(params=["tiny", "bpe"])
def tokenizer(request, tiny, bpe_folder):
  return tiny if request.param == "tiny" else load_tokenizer(bpe_folder)


@pytest.fixture
def older_files(bpe_folder, tmp_path):
  """The golden tokenizer.json as vocab.json, merges.txt and tokenizer_config.json."""
  whole = json.loads((bpe_folder / "tokenizer.json").read_text())
  merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
  added = {str(token.pop("id")): token for token in whole["added_tokens"]}
  vocabulary = {k: v for k, v in whole["model"]["vocab"].items() if str(v) not in added}
  (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
  return tmp_path


def random_texts(number):
  generator = random.Random(0)
  ranges = ((0, 0x80), (0, 0x3000), (0x2580, 0x2583), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
  for _ in range(number):
    picked = [generator.choice(ranges) for _ in range(generator.randrange(30))]
    yield "".join(chr(generator.randrange(*one)) for one in picked)


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_the_tiny_vocabulary_gives_every_text_back(tiny, text):
  assert tiny.decode(tiny.encode(text)) == text


def test_the_tiny_vocabulary_gives_random_texts_back(tiny):
  for text in random_texts(300):
    assert tiny.decode(tiny.encode(text)) == text


def test_chat_tokens_in_a_text_become_single_ids(tokenizer):
  ids = tokenizer.encode("<|im_start|>user\na<|im_end|>\n<|endoftext|>")
  assert ids[0] == tokenizer.im_start_id
  assert ids[-3:] == [tokenizer.im_end_id, tokenizer.newline_id, tokenizer.pad_id]
  assert ids.count(tokenizer.newline_id) == 2


def test_decoding_skips_chat_tokens_and_ids_outside_the_vocabulary(tokenizer):
  ids = [tokenizer.im_start_id, -200, *tokenizer.encode("a b"), tokenizer.vocab_size + 7]
  assert tokenizer.decode([*ids, *tokenizer.stop_ids]) == "a b"


def test_an_answer_stops_at_the_end_of_a_turn_or_of_the_text(tokenizer):
  assert tokenizer.stop_ids == (tokenizer.im_end_id, tokenizer.pad_id)


def test_streamed_pieces_join_to_the_whole_text_whatever_the_ids(tokenizer):
  generator = random.Random(1)
  for _ in range(300):
    # The first ids of both vocabularies are mostly single bytes: broken characters abound.
    ids = [
      generator.randrange(-3, tokenizer.vocab_size + 3) for _ in range(generator.randrange(40))
    ]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_streamed_text_never_shows_half_a_character(tokenizer):
  text = "a 🐱 视频 café"
  pieces = list(stream_text(tokenizer, tokenizer.encode(text)))
  assert "".join(pieces) == text
  assert len(pieces) > 4
  assert all(pieces)
  assert not any("\ufffd" in piece for piece in pieces)


def test_streamed_text_is_not_held_back_longer_than_a_character(tokenizer):
  ids = iter(tokenizer.encode("ab cd"))
  assert next(stream_text(tokenizer, ids))
  assert list(ids)


def test_tokenizers_travel_to_other_processes(tokenizer):
  again = pickle.loads(pickle.dumps(tokenizer))
  assert again.encode("What colour?") == tokenizer.encode("What colour?")
  assert again.stop_ids == tokenizer.stop_ids


def test_older_files_give_the_ids_of_tokenizer_json(bpe_folder, older_files):
  old, new = load_tokenizer(older_files), load_tokenizer(bpe_folder)
  assert (old.vocab_size, old.stop_ids) == (new.vocab_size, new.stop_ids)
  for text in (*AWKWARD_TEXTS, *SENTENCES, *random_texts(100), "<|im_start|>It's 12:30<|im_end|>"):
    assert old.encode(text) == new.encode(text)
    assert old.decode(old.encode(text)) == new.decode(new.encode(text))


@pytest.mark.parametrize("name", ["a#b c%20d", "caf\udce9"])  # the second is no UTF-8
def test_a_folder_may_have_any_name(bpe_folder, older_files, name):
  folder = older_files / name
  folder.mkdir()
  text, ids = AWKWARD_TEXTS[4], load_tokenizer(bpe_folder).encode(AWKWARD_TEXTS[4])
  for path in list(older_files.glob("*.*")):
    path.rename(folder / path.name)
  assert load_tokenizer(folder).encode(text) == ids
  shutil.copy(bpe_folder / "tokenizer.json", folder)
  assert load_tokenizer(folder).encode(text) == ids


def test_the_highest_id_counts_and_not_how_many_there_are(tmp_path):
  folder = with_far_token(tmp_path / "far", 900)
  tokenizer = load_tokenizer(folder)
  assert tokenizer.vocab_size == 901 and tokenizer.token_id("far") == 900
  check_embedded(tokenizer, 901, folder)
  with pytest.raises(InputError, match=r"far: the highest id of the tokenizer is 900, .* only 900"):
    check_embedded(tokenizer, 900, folder)


def test_added_tokens_may_come_from_added_tokens_json(bpe_folder, older_files):
  new = load_tokenizer(bpe_folder)
  (older_files / "tokenizer_config.json").write_text("{}")
  added = {"<|im_end|>": new.im_end_id, "<|im_start|>": new.im_start_id}
  (older_files / "added_tokens.json").write_text(json.dumps({**added, "<|endoftext|>": new.pad_id}))
  assert load_tokenizer(older_files).stop_ids == new.stop_ids


def test_the_files_present_decide_the_kind(tiny, bpe_folder, tmp_path):
  train_sentencepiece(SENTENCES, tmp_path / "tokenizer.model")
  assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
  shutil.copy(bpe_folder / "tokenizer.json", tmp_path)
  assert isinstance(load_tokenizer(str(tmp_path)), BPETokenizer)


def test_training_a_vocabulary_twice_gives_the_same_file(tmp_path):
  for name in ("a", "b"):
    train_sentencepiece(SENTENCES, tmp_path / name, vocab_size=300)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_trained_vocabulary_knows_the_words_of_its_corpus_and_keeps_its_size(tmp_path):
  for size in (300, 320, 512):
    trained = train_sentencepiece(SENTENCES, tmp_path / "tokenizer.model", vocab_size=size)
    assert trained.vocab_size <= size
  assert [len(trained.encode(f" {word}")) for word in (*COLOURS, *SHAPES)] == [1] * 7


def test_line_breaks_in_sentences_do_not_disturb_training(tmp_path):
  joined = train_sentencepiece(["\n".join(SENTENCES)], tmp_path / "joined")
  apart = train_sentencepiece(SENTENCES, tmp_path / "apart")
  assert joined.encode(SENTENCES[0]) == apart.encode(SENTENCES[0])


@pytest.mark.parametrize("sentences", [[], ["", "\n"]])
def test_no_vocabulary_comes_from_no_text(tmp_path, sentences):
  with pytest.raises(InputError, match="give some text"):
    train_sentencepiece(sentences, tmp_path / "tokenizer.model")
  assert not list(tmp_path.iterdir())


def test_a_vocabulary_too_small_for_bytes_and_letters_names_the_least_size(tmp_path):
  with pytest.raises(InputError, match="no vocabulary of 200 entries") as caught:
    train_sentencepiece(SENTENCES, tmp_path / "tokenizer.model", vocab_size=200)
  least = int(str(caught.value).split("at least ")[1].split()[0])
  assert train_sentencepiece(SENTENCES, tmp_path / "t.model", vocab_size=least).vocab_size <= least


def test_a_folder_without_tokenizer_files_is_an_error_that_names_them(tmp_path):
  for folder in (tmp_path, tmp_path / "missing"):
    with pytest.raises(InputError, match=r"no tokenizer here; put tokenizer.json"):
      load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", [b"", b"{ not json", bytes(range(256))])
def test_a_broken_file_is_an_error_of_one_line_that_names_its_folder(older_files, name, content):
  if name == "tokenizer.model":
    (older_files / "vocab.json").unlink()
  (older_files / name).write_bytes(content)
  with pytest.raises(InputError) as caught:
    load_tokenizer(older_files)
  assert str(older_files) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "name, message",
  [("merges.txt", "merges.txt: missing"), ("tokenizer_config.json", "no added tokens beside")],
)
def test_a_missing_companion_of_vocab_json_is_named(older_files, name, message):
  (older_files / name).unlink()
  with pytest.raises(InputError, match=message):
    load_tokenizer(older_files)


def test_merges_cut_short_are_refused(older_files):
  lines = (older_files / "merges.txt").read_text().splitlines()
  (older_files / "merges.txt").write_text("\n".join(lines[:-1]))
  with pytest.raises(
    InputError, match=f"{len(lines) - 2} merges, vocab.json needs {len(lines) - 1}"
  ):
    load_tokenizer(older_files)


def test_added_tokens_of_another_checkpoint_are_refused(older_files):
  config = json.loads((older_files / "tokenizer_config.json").read_text())
  moved = {str(int(key) + 5): value for key, value in config["added_tokens_decoder"].items()}
  (older_files / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": moved}))
  with pytest.raises(InputError, match="take all tokenizer files from one checkpoint"):
    load_tokenizer(older_files)


def test_a_vocabulary_without_chat_tokens_is_refused(older_files):
  config = json.loads((older_files / "tokenizer_config.json").read_text())
  for entry in config["added_tokens_decoder"].values():
    entry["content"] = entry["content"].replace("<|im_end|>", "</s>")
  (older_files / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match=r"no single token for <\|im_end\|>"):
    load_tokenizer(older_files)
