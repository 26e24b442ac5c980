"""Pictures of many shapes, as the original resizes them with Pillow 10.1: family 12.

The file says how each picture is made, by a formula, and the digest of what it becomes.
"""

import hashlib
import json
import re

import numpy as np
import pytest

from tests.conftest import OUR_COPY, release_facts
from videochat_flash_jax.data.media.resize import resize

FACTS = release_facts("12_resize/resize.json")
SHAPES = {
  "portrait": lambda row: row["height"] > row["width"],
  "landscape": lambda row: row["height"] < row["width"],
  "square": lambda row: row["height"] == row["width"],
  "enlarged": lambda row: row["to"][0] > row["height"] and row["to"][1] > row["width"],
  "mixed": lambda row: (row["to"][0] > row["height"]) != (row["to"][1] > row["width"]),
}


def picture(height: int, width: int) -> np.ndarray:
  """The picture of the formula, such as `value (7x + 13y + (3xy mod 251)) mod 256`.

  The factor of `xy` is the file's multiplier.
  """
  formula = re.search(r"value (.*?) at row y, column x, channel c", FACTS["picture"])[1]
  formula = re.sub(r"\w*xy", f"{FACTS['multiplier']}xy", formula)
  formula = re.sub(r"(?<=[\dxyc)])(?=[xyc(])", "*", formula).replace("mod", "%")
  y, x, c = np.indices((height, width, 3))
  return eval(formula, {"x": x, "y": y, "c": c}).astype(np.uint8)


def test_our_rows_have_portrait_landscape_square_enlarged_and_mixed_shapes():
  rows = json.loads((OUR_COPY / "12_resize" / "resize.json").read_text())["rows"]
  for shape, is_of in SHAPES.items():
    assert any(map(is_of, rows)), shape


@pytest.mark.parametrize(
  "row", FACTS["rows"], ids=lambda row: f"{row['height']}x{row['width']} to {row['to']}"
)
def test_a_resized_picture_agrees_in_every_byte(row):
  resized = resize(picture(row["height"], row["width"]), tuple(row["to"]))
  assert resized[0, 0].tolist() == row["corner"]
  assert resized[row["to"][0] // 2, row["to"][1] // 2].tolist() == row["middle"]
  assert resized.mean() == pytest.approx(row["mean"], abs=1e-5)
  assert hashlib.sha256(resized.tobytes()).hexdigest() == row["sha256"]
