"""Annotation rows mutated at random: in their bytes, types, keys and structure."""

import copy
import json

import numpy as np

from tests.data.mixture.mutations import turns

# Rows as people have them; the files are in the folder of the annotations.
HEALTHY = [
  {"id": "video", "video": "a.mp4", "conversations": turns("<image>\nWho?", "A cat.")},
  {
    "id": 2, "video": "a.mp4", "start": 1, "end": "2.5", "kind": "clip",
    "conversations": turns("What moves?<image>", "A dog.", "Where?", "To the left."),
  },
  {"id": "image", "image": "b.png", "conversations": turns("<image>Was für eine Farbe?", "Grün.")},
  {
    "image": ["b.png", "b.png"],
    "conversations": turns("Do <image> and <image> differ?", "No.", "<3?", "Yes."),
  },
  {"id": "text", "conversations": turns("How many are two?", "2")},
  {"id": "empty", "video": None, "conversations": [*turns("", "Hello.")[1:], *turns("Hi?", "Ho.")]},
]  # fmt: skip
TIMES = [None, True, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "1", "1 s", 3.99, 400, []]
PATHS = [
  "", " ", "a\0b", "a\u2028b", "caf\udce9.mp4", "../a.mp4", "gone.mp4", ".", "b.png", "a.mp4", [],
  [[]], ["a.mp4"], ["b.png"], ["a.mp4", 3], ["a.mp4", "a.mp4"],
]  # fmt: skip
TEXTS = ["text", "<image>", "half \ud83d", "word " * 50]
VALUES = [*TIMES, *PATHS, *TEXTS, False, {}, {"from": "gpt"}]
VALUES_OF = {"start": TIMES, "end": TIMES, "video": PATHS, "image": PATHS}
BYTES = [b"\xff", b"\xc3", b"\0", b"\n", b'"', b"{", b"]", b",", b"\xef\xbb\xbf", b"\\ud83d", b" "]


def mutated_row(rng: np.random.Generator) -> bytes:
  """A healthy row with one or two mutations, as JSON or as something like it."""
  row = copy.deepcopy(HEALTHY[rng.integers(len(HEALTHY))])
  text = None
  for _ in range(rng.integers(1, 3)):
    kind = rng.integers(4)
    if text is not None or kind == 0:
      text = _with_other_bytes(rng, _text(row) if text is None else text)
    elif kind == 3 and rng.integers(3) == 0:
      text = _with_a_key_twice(rng, _text(row))
    else:
      row = (_with_another_type, _with_other_keys, _with_another_structure)[kind - 1](rng, row)
  return _text(row) if text is None else text


def _text(row):
  return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace")


def _with_other_bytes(rng, text):
  start = int(rng.integers(len(text) + 1))
  end = start + int(rng.integers(1, 4)) * int(rng.integers(2))
  return text[:start] + BYTES[rng.integers(len(BYTES))] * int(rng.integers(2)) + text[end:]


def _with_a_key_twice(rng, text):
  pairs = [
    b'"id": 7, ',
    b'"video": "a.mp4", ',
    b'"conversations": [], ',
    b'"x": {"a": 1, "a": 1}, ',
  ]
  return text.replace(b"{", b"{" + pairs[rng.integers(len(pairs))], 1)


def _places(value, found=None):
  """Every (container, key) inside a row."""
  found = [] if found is None else found
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in items:
    found.append((value, key))
    if isinstance(inner, dict | list):
      _places(inner, found)
  return found


def _place(rng, row):
  """A place anywhere in a row, or, half of the time, one of its fields."""
  places = _places(row)
  places = places if rng.integers(2) else [place for place in places if place[0] is row]
  return places[rng.integers(len(places))] if places else (row, None)


def _with_another_type(rng, row):
  container, key = _place(rng, row)
  if key is not None:
    values = VALUES_OF.get(key, VALUES)
    container[key] = copy.deepcopy(values[rng.integers(len(values))])
  return row


def _with_other_keys(rng, row):
  container, key = _place(rng, row)
  if isinstance(key, str):
    value = container.pop(key)
    names = [key[:-1], key.upper(), "video", "image", "start", "end", "video_read_type", None]
    name = names[rng.integers(len(names))]
    if name is not None:
      container[name] = value
  return row


def _with_another_structure(rng, row):
  container, key = _place(rng, row)
  if key is None:
    return [row]
  change = rng.integers(4)
  if change == 0:
    container[key] = [container[key]]
  elif change == 1 and isinstance(container, list):
    container.insert(key, copy.deepcopy(container[key]))
  elif change == 2 and isinstance(container, list):
    del container[key]
  elif change == 3 and isinstance(container[key], list):
    container[key].reverse()
  elif isinstance(container[key], str):
    container[key] = container[key].replace("<image>", "") + "<image>" * int(rng.integers(3))
  return row
