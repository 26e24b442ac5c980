"""Goes on from saved states of batches, in a process of its own; prints what each batch holds.

python saved_batches.py MIXTURE '[[workers, state], ...]' NUM_BATCHES
"""

import hashlib
import json
import sys
from pathlib import Path

from tests.data.batches.small_mixture import config, make_tokenizer, read_rows
from videochat_flash_jax.data.batches.train_batches import mixture_batches


def digest(batch: dict) -> str:
  """Tells batches apart by names, shapes, types and bytes."""
  hashed = hashlib.sha256()
  for name, array in sorted(batch.items()):
    hashed.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
  return hashed.hexdigest()


def following(rows, workers: int, state: dict, num_batches: int) -> list[str]:
  """Digests of the batches behind a state."""
  batches = iter(mixture_batches(config(rows=1, workers=workers), rows, make_tokenizer))
  batches.set_state(state)
  digests = [digest(next(batches)) for _ in range(num_batches)]
  batches.close()
  return digests


if __name__ == "__main__":
  rows = read_rows(Path(sys.argv[1]))
  states, num_batches = json.loads(sys.argv[2]), int(sys.argv[3])
  print(json.dumps([following(rows, *state, num_batches) for state in states]))
