"""What a conversation has seen."""

import numpy as np
import pytest

from videochat_flash_jax.inference.prefix import Prefix


@pytest.fixture
def visual_tokens(monkeypatch):
  """A function: the visual tokens that a conversation's prefix was given in this test."""
  given, add_visual = {}, Prefix.add_visual

  def add(prefix, tokens):
    given.setdefault(prefix, []).append(tokens)
    add_visual(prefix, tokens)

  monkeypatch.setattr(Prefix, "add_visual", add)
  return lambda conversation: np.concatenate(given[conversation._prefix])


@pytest.fixture
def reads(monkeypatch):
  """What was read in this test: the part of the layers, and how many tokens."""
  from videochat_flash_jax.inference.engine import Engine

  reads, read_part = [], Engine.read_part

  def record(engine, layers, rows, *rest, **options):
    sizes = [len(getattr(row, "token_ids", row)) for row in rows]
    reads.append((layers, max(sizes)))
    return read_part(engine, layers, rows, *rest, **options)

  monkeypatch.setattr(Engine, "read_part", record)
  return reads
