"""Texts of users in messages and in the log: one line that can be printed anywhere."""

import logging
import os

import pytest

from videochat_flash_jax.errors import InputError, is_unicode, one_line


@pytest.mark.parametrize(
  "text, shown",
  [
    ("a b.mp4", "a b.mp4"),
    ("Später 猫", "Später 猫"),
    ("one\ntwo\r\n", r"one\ntwo\r\n"),
    ("\x1b[31mred\t\0\x85", r"\x1b[31mred\t\x00\x85"),
    ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    ("half \ud83d", r"half \ud83d"),
    (os.fsdecode(b"caf\xe9.mp4"), r"caf\udce9.mp4"),
    ("to the left\u202e", r"to the left\u202e"),
    (7, "7"),
    ("a" * 200, "a" * 200),
    (f"no {'a' * 100}{'b' * 2000}: cut", f"no {'a' * 80}...{'b' * 39}: cut"),
  ],
)
def test_what_cannot_be_printed_is_escaped(text, shown):
  assert one_line(text) == str(InputError(text)) == shown
  assert shown.isprintable() and shown.encode()


def test_every_record_of_the_log_is_one_line(caplog):
  with caplog.at_level(logging.WARNING, "videochat_flash_jax"):
    logging.getLogger("videochat_flash_jax").warning("%s has %d", "a\n\udce9", 3)
  assert [record.getMessage() for record in caplog.records] == [r"a\n\udce9 has 3"]


def test_a_text_is_valid_or_holds_half_of_a_pair():
  assert is_unicode("") and is_unicode("ü 🐱 \0")
  assert not is_unicode("\ud83d") and not is_unicode(os.fsdecode(b"\xff"))
