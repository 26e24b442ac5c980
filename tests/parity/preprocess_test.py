"""Pictures resized and normalised by the original, golden family 11.

The manifest says of every run which input went in, at which size, and which slice of the output
`[frame, channel, y, x]` (of one picture: `[channel, y, x]`) is stored under which key.
"""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import assert_close
from videochat_flash_jax.data.media.resize import resize
from videochat_flash_jax.models.videochat_flash import normalise_pixels


@pytest.fixture
def family(golden):
  return golden("11_preprocess")


@pytest.fixture
def pictures(family):
  return family.tensors("io")


def numbers(text) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", str(text))]


def channels_first(array) -> np.ndarray:
  return np.moveaxis(np.asarray(array), -1, -3)


def indexed(array: np.ndarray, brackets: str) -> np.ndarray:
  """Applies indices that are written out: `[0][:, ::4]`."""
  for bracket in re.findall(r"\[(.*?)\]", brackets):
    index = []
    for part in bracket.replace(" ", "").split(","):
      bounds = [int(bound) if bound else None for bound in part.split(":")]
      index.append(slice(*bounds) if len(bounds) > 1 else bounds[0])
    array = array[tuple(index)]
  return array


def stored_parts(run: dict, output: np.ndarray) -> dict[str, np.ndarray]:
  """The parts of one run's output under the keys the manifest gives them."""
  slices = re.findall(r"(\w+) = out(\[[^;]*)", run["out"])
  if slices:
    return {key: indexed(output, brackets) for key, brackets in slices}
  step = int((re.findall(r"_sub(\d+)$", run["out"]) or [1])[0])
  return {run["out"]: output[..., ::step, ::step]}


def test_resized_pictures_agree_exactly(family, pictures):
  target = numbers(family.json()["runs"][0]["target"])
  keys = [key for key in pictures if "resized_u8" in key]
  assert keys
  for key in keys:
    source, frame, row = re.fullmatch(
      r"(?:(\w+)_)?resized_u8(?:_frame(\d+))?(?:_row(\d+))?", key
    ).groups()
    picture = pictures[f"{source or 'frames'}_u8"]
    ours = channels_first(resize(picture if frame is None else picture[int(frame)], target))
    np.testing.assert_array_equal(ours if row is None else ours[:, int(row)], pictures[key])


def test_normalised_pictures_agree(family, pictures):
  runs = family.json()["runs"]
  compared = set()
  for run in runs:
    source, first_only = re.match(r"(\w+)(\[:1\])?", run["input"]).groups()
    picture = pictures[source][:1] if first_only else pictures[source]
    target = numbers(run.get("target") or run.get("target_size") or runs[0]["target"])[:2]
    output = channels_first(normalise_pixels(jnp.asarray(resize(picture, target))))
    for key, part in stored_parts(run, output).items():
      assert_close(part, pictures[key], absolute=1e-6)
      compared.add(key)
  assert compared == {key for key in pictures if "u8" not in key}
