"""Messages as transformers and the OpenAI API have them, as a conversation of ours.

  [{"role": "user", "content": [
    {"type": "video", "video": "match.mp4", "max_frames": 512},
    {"type": "text", "text": "Who scores first?"}]}]

A part of a message is one of these:

| type        | fields                                                                         |
|-------------|--------------------------------------------------------------------------------|
| `text`      | `text`                                                                         |
| `video`     | `video`, `path` or `url`: what `VideoChat.watch` takes; with any of its options |
| `image`     | `image`, `path` or `url`: what `VideoChat.look` takes                          |
| `video_url` | `video_url`: {"url": an address, or `data:video/mp4;base64,...`}               |
| `image_url` | `image_url`: {"url": an address, or `data:image/png;base64,...`}               |
"""

import base64
import binascii
import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from videochat_flash_jax.data.media.image_reader import read_image
from videochat_flash_jax.data.media.open_source import Watchable
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.inference.conversation import Conversation

_ROLES = ("user", "assistant")
_OPTIONS = ("max_frames", "fps", "start", "end", "times", "window", "stall_seconds")
_SOURCES = {"video": ("video", "path", "url"), "image": ("image", "path", "url")}
_MEDIA = {"video": "video", "video_url": "video", "image": "image", "image_url": "image"}


class Media(NamedTuple):
  """A video, or an image.

  Attributes:
    kind: "video" or "image".
    source: what `VideoChat.watch` or `VideoChat.look` takes, or a data URL.
    options: of `VideoChat.watch`.
    where: the place in the messages, for errors.
  """

  kind: str
  source: Watchable
  options: dict[str, Any]
  where: str


class Dialogue(NamedTuple):
  """What messages say.

  Attributes:
    media: the videos and images of all messages, in their order.
    history: the (question, answer) pairs before the question.
    question: the text of the last message.
  """

  media: list[Media]
  history: list[tuple[str, str]]
  question: str


def are_messages(value: object) -> bool:
  """Whether a value is a list of messages, and no list of questions."""
  return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Dialogue:
  """Reads messages; no file is opened.

  Raises:
    InputError: a message is none, its role or a part of it is not known, or questions and answers
      do not take turns.
  """
  media, texts = [], []
  for index, message in enumerate(messages):
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
      raise InputError(f"{where} is no message; give one with role and content")
    role = _ROLES[index % 2]
    if message["role"] not in _ROLES:
      raise InputError(
        f"{where}: the role is {message['role']!r:.80}; give user or assistant (the model knows no "
        "instructions beside the question: put them into it)"
      )
    if message["role"] != role:
      raise InputError(
        f"{where}: the role is {message['role']}; give {role} (the first message is the user's, "
        "and then they take turns)"
      )
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
      raise InputError(f"{where}: content is no text and no list of parts; give one of them")
    pieces = []
    for number, part in enumerate(parts):
      place = f"{where}: content[{number}]"
      kind = part.get("type") if isinstance(part, Mapping) else None
      if kind == "text":
        pieces.append(_field(part, ("text",), place))
        if not isinstance(pieces[-1], str):
          raise InputError(f"{place}: text is no text; give one")
      elif isinstance(kind, str) and kind in _MEDIA and role == "user":
        media.append(_media(part, place))
      else:
        known = ("text", *_MEDIA) if role == "user" else ("text",)
        raise InputError(f"{place}: the type is {kind!r:.80}; give {' or '.join(known)}")
    texts.append("\n".join(pieces))
  if not texts or role != "user":
    raise InputError("the last message is no question; end with a message of the role user")
  if not texts[-1].strip():  # before a video is watched
    raise InputError("the last message has no text; write a question")
  return Dialogue(media, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1])


def show(conversation: Conversation, media: Sequence[Media]) -> None:
  """Shows videos and images to a conversation; images that follow each other are shown together.

  Raises:
    InputError: one of them cannot be read; the error says where it is.
  """
  for kind, items in itertools.groupby(media, lambda item: item.kind):
    images = []
    for item in items:
      with _named(item.where), _file(item.source) as source:
        if kind == "video":
          conversation.watch(source, **item.options)
        else:
          images.append(read_image(source))
    if images:
      with _named(item.where):
        conversation.look(images)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """A block whose errors say where in the messages they arise."""
  try:
    yield
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


def _media(part: Mapping[str, Any], where: str) -> Media:
  """Reads a part that is a video or an image."""
  kind = _MEDIA[part["type"]]
  if part["type"] == kind:
    source = _field(part, _SOURCES[kind], where)
    known = {"type", *_SOURCES[kind], *(_OPTIONS if kind == "video" else ())}
  else:
    name = part["type"]
    source = _field(part, (name,), where)
    source = _field(source, ("url",), f"{where}: {name}") if isinstance(source, Mapping) else source
    known = {"type", name}
  if unknown := set(part) - known:
    raise InputError(f"{where}: unknown field {min(map(str, unknown))[:60]!r}; leave it out")
  options = {name: part[name] for name in _OPTIONS if name in part}
  return Media(kind, source, options, where)


def _field(part: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
  """The value of the one field that is there."""
  there = [name for name in names if part.get(name) is not None]
  if len(there) != 1:
    raise InputError(f"{where}: give {' or '.join(names)}{', one of them' * (len(names) > 1)}")
  return part[there[0]]


@contextlib.contextmanager
def _file(source: Any) -> Iterator[Any]:
  """The path of a file with what a data URL holds; any other source as it is."""
  if not _is_data(source):
    yield source
    return
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "data_url"
    path.write_bytes(_decoded(source))
    yield path


def _is_data(source: Any) -> bool:
  return isinstance(source, str) and source.startswith("data:")


def _decoded(url: str) -> bytes:
  """The bytes of a data URL."""
  header, comma, text = url.partition(",")
  try:
    if comma and header.endswith(";base64"):
      return base64.b64decode(text, validate=True)
  except binascii.Error:
    pass
  raise InputError("the data URL is not in base64; give data:TYPE;base64,...")
