r"""Converts text to token ids and back, for the Qwen2 vocabulary and for that of the tiny model.

Both tokenizers recognise the chat tokens inside a text, so one call encodes a rendered prompt:

  text  <|im_start|>user\nHi<|im_end|>\n
  ids   151644 872 198 13048 151645 198        (the Qwen2 vocabulary)
"""

import abc
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from videochat_flash_jax.errors import InputError
from videochat_flash_jax.plain_paths import plain_path

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

# How Qwen2 splits a text before it merges bytes: contractions, words with one sign before them,
# single digits, signs with the line breaks after them, line breaks, spaces.
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# SentencePiece writes a space as this character inside its pieces.
_SPACE = "\u2581"
_SPACE_BYTES = ["<0xE2>", "<0x96>", "<0x81>"]

# Bytes that do not form a complete UTF-8 character are decoded to this character.
_REPLACEMENT = "\ufffd"


class Tokenizer(abc.ABC):
  """What the rest of the package needs from a tokenizer and its vocabulary.

  Attributes:
    vocab_size: one more than the highest id, added tokens included. An embedding table needs as
      many rows; it may have more.
    im_start_id: id of `<|im_start|>`, which opens a turn.
    im_end_id: id of `<|im_end|>`, which closes a turn.
    pad_id: id of `<|endoftext|>`, which fills the short rows of a batch.
    newline_id: id of a single line break.
    stop_ids: ids that end an answer.
  """

  vocab_size: int

  def __init__(self, source: Path):
    """Finds the chat tokens; raises an `InputError` that names `source` if one is missing."""
    missing = [t for t in (IM_START, IM_END, END_OF_TEXT) if self.token_id(t) is None]
    newline = self.encode("\n")
    if missing or len(newline) != 1:
      raise InputError(
        f"{source}: the vocabulary has no single token for {', '.join(missing) or 'a line break'}; "
        "use the tokenizer files of a Qwen2 chat model"
      )
    self.im_start_id = self.token_id(IM_START)
    self.im_end_id = self.token_id(IM_END)
    self.pad_id = self.token_id(END_OF_TEXT)
    self.newline_id = newline[0]
    self.stop_ids = (self.im_end_id, self.pad_id)

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`. Each chat token in it becomes its single id; nothing is added."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids` without chat tokens; ids outside the vocabulary are skipped."""

  @abc.abstractmethod
  def token_id(self, token: str) -> int | None:
    """Returns the id of one entry of the vocabulary, or None."""


class BPETokenizer(Tokenizer):
  """Byte-level byte-pair encoding as in Qwen2: NFC, the split pattern of Qwen2, then merges.

  Reads `tokenizer.json` from a directory. If there is none, reads `vocab.json` and `merges.txt`,
  and the added tokens from `tokenizer_config.json` or `added_tokens.json`.

  Raises:
    InputError: a file is missing or broken, or the chat tokens are not in the vocabulary.
  """

  def __init__(self, directory: str | Path):
    directory = Path(directory)
    try:
      if (directory / "tokenizer.json").exists():
        backend = tokenizers.Tokenizer.from_file(str(plain_path(directory / "tokenizer.json")))
      else:
        backend = _qwen2_from_vocabulary(directory)
    except InputError:
      raise
    except Exception as error:  # The library raises a bare Exception for all that it cannot read.
      raise _broken(directory, error) from error
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    super().__init__(directory)

  def encode(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    known = [int(token) for token in ids if 0 <= token < self.vocab_size]
    return self._backend.decode(known, skip_special_tokens=True)

  def token_id(self, token: str) -> int | None:
    return self._backend.token_to_id(token)


class SentencePieceTokenizer(Tokenizer):
  """A vocabulary made by `train_sentencepiece`; decoding the ids of a text gives the same text.

  Characters that are not in the vocabulary become UTF-8 bytes; spaces and line breaks are kept.

  Raises:
    InputError: the file is missing or broken, or the chat tokens are not in the vocabulary.
  """

  def __init__(self, path: str | Path):
    path = Path(path)
    self._backend = sentencepiece.SentencePieceProcessor()
    try:
      self._backend.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
      raise _broken(path, error) from error
    self.vocab_size = self._backend.get_piece_size()
    super().__init__(path)
    self._without_text = {self.im_start_id, self.im_end_id, self.pad_id, self._backend.unk_id()}

  def encode(self, text: str) -> list[int]:
    # The library would decode U+2581 in the text to a space; encoded as bytes it is kept.
    ids: list[int] = []
    for index, part in enumerate(text.split(_SPACE)):
      if index:
        ids += self._backend.piece_to_id(_SPACE_BYTES)
      ids += self._backend.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    known = (int(token) for token in ids if 0 <= token < self.vocab_size)
    return self._backend.decode([token for token in known if token not in self._without_text])

  def token_id(self, token: str) -> int | None:
    found = self._backend.piece_to_id(token)
    return None if found == self._backend.unk_id() else found


def load_tokenizer(directory: str | Path) -> Tokenizer:
  """Opens the tokenizer whose files are in `directory`.

  Looks for `tokenizer.json`, then `vocab.json` with `merges.txt`, then `tokenizer.model`.

  Raises:
    InputError: none of these files is there, or a file cannot be read.
  """
  directory = Path(directory)
  if (directory / "tokenizer.json").exists() or (directory / "vocab.json").exists():
    return BPETokenizer(directory)
  if (directory / "tokenizer.model").exists():
    return SentencePieceTokenizer(directory / "tokenizer.model")
  raise InputError(
    f"{directory}: no tokenizer here; "
    "put tokenizer.json, vocab.json with merges.txt, or tokenizer.model into this directory"
  )


def check_embedded(tokenizer: Tokenizer, num_embedded: int, where: str | Path) -> None:
  """Checks that a model has an embedding for every id of a tokenizer.

  Args:
    tokenizer: the tokenizer.
    num_embedded: rows of the model's embedding table.
    where: the model, for the error message.

  Raises:
    InputError: it does not.
  """
  if tokenizer.vocab_size > num_embedded:
    raise InputError(
      f"{where}: the highest id of the tokenizer is {tokenizer.vocab_size - 1}, but the model "
      f"embeds only {num_embedded} ids, from 0; take both from one checkpoint"
    )


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
  """Yields the text of a growing answer in pieces that never end within a character.

  The joined pieces are `tokenizer.decode` of all ids. A piece is held back until it ends with a
  complete character; there a text can be cut without changing what the two parts decode to.

    ids     A   <0xF0> <0x9F> <0x90> <0xB1>   !
    yields  A                        🐱        !
  """
  pending: list[int] = []
  for token in ids:
    pending.append(token)
    text = tokenizer.decode(pending)
    if text and not text.endswith(_REPLACEMENT):
      yield text
      pending = []
  text = tokenizer.decode(pending)
  if text:
    yield text


def train_sentencepiece(
  sentences: Sequence[str], path: str | Path, vocab_size: int = 512
) -> SentencePieceTokenizer:
  """Makes a small vocabulary from `sentences`, writes it to `path`, and opens it.

  The same sentences give the same file. The ids are: 0 for unknown, then the chat tokens and the
  line break, 256 bytes, and byte-pair pieces of the sentences.

  Args:
    sentences: lines of text; a line break inside one ends a line.
    path: the file to write, usually `tokenizer.model`.
    vocab_size: the largest number of entries; few sentences give fewer.

  Raises:
    InputError: `vocab_size` is too small for the bytes and the characters of the sentences, or
      there is no text in `sentences`.
  """
  lines = [line for sentence in sentences for line in sentence.split("\n") if line]
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=1.0,
      byte_fallback=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      user_defined_symbols=[END_OF_TEXT, IM_START, IM_END, "\n"],
      unk_id=0,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      num_threads=1,
      minloglevel=3,
    )
  except RuntimeError as error:
    letters = len(set("".join(lines)))
    raise InputError(
      f"no vocabulary of {vocab_size} entries from {len(lines)} lines with {letters} letters; "
      f"give some text and at least {261 + letters} entries"
    ) from error
  Path(path).write_bytes(model.getvalue())
  return SentencePieceTokenizer(path)


def _qwen2_from_vocabulary(directory: Path) -> tokenizers.Tokenizer:
  """Builds from the older files what `tokenizer.json` would hold."""
  path = directory / "merges.txt"
  if not path.exists():
    raise InputError(f"{path}: missing; add the merges.txt that belongs to vocab.json")
  added = _added_tokens(directory)
  files = (str(plain_path(file)) for file in (directory / "vocab.json", path))
  vocabulary, merges = models.BPE.read_file(*files)
  # Every entry except the bytes comes from one merge. If the end of the file were missing, the ids
  # would be wrong without an error.
  num_merged = len(vocabulary.keys() - {token.content for _, token in added}) - 256
  if len(merges) != num_merged:
    raise InputError(
      f"{path}: {len(merges)} merges, vocab.json needs {num_merged}; "
      "take all tokenizer files from one checkpoint"
    )
  backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  backend.normalizer = normalizers.NFC()
  split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated")
  bytes_to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_to_letters])
  backend.decoder = decoders.ByteLevel()
  for token_id, token in added:
    backend.add_tokens([token])
    if backend.token_to_id(token.content) != token_id:
      raise InputError(
        f"{directory}: added token {token.content} should have id {token_id} but would get "
        f"{backend.token_to_id(token.content)}; take all tokenizer files from one checkpoint"
      )
  return backend


def _added_tokens(directory: Path) -> list[tuple[int, tokenizers.AddedToken]]:
  """Returns the added tokens in the order of their ids: the library numbers them in this order."""
  config, plain = directory / "tokenizer_config.json", directory / "added_tokens.json"
  listed = json.loads(config.read_text("utf-8")) if config.exists() else {}
  if entries := listed.get("added_tokens_decoder"):
    found = [(int(key), tokenizers.AddedToken(**entry)) for key, entry in entries.items()]
  elif plain.exists():
    entries = json.loads(plain.read_text("utf-8"))
    found = [
      (token_id, tokenizers.AddedToken(content, special=True, normalized=False))
      for content, token_id in entries.items()
    ]
  else:
    raise InputError(
      f"{directory}: no added tokens beside vocab.json; "
      "add the checkpoint's tokenizer_config.json or added_tokens.json"
    )
  return sorted(found, key=lambda entry: entry[0])


def _broken(path: Path, error: Exception) -> InputError:
  reason = str(error).strip().split("\n")[0]
  return InputError(f"{path}: not a readable tokenizer ({reason}); copy its files again")
