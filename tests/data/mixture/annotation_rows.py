"""Healthy rows, and files of them, for tests."""

import json

from tests.data.mixture.mutations import turns
from videochat_flash_jax.data.mixture.mixture import read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows


def row(number, kind="video", **fields):
  medium = {} if kind == "text" else {kind: f"{number}.x"}
  question = f"Wähle\x85 {number}" if kind == "text" else f"<image>\nWähle\x85 {number}"
  return {"id": number, **medium, "conversations": turns(question, "A b c."), **fields}


def write_jsonl(path, rows):
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  path.write_text(text, "utf-8", "backslashreplace")  # half of a surrogate pair becomes "\ud83d"
  return path


def open_all(path, **options):
  return open_rows(read_mixture(path), path.parent / "cache", **options)
