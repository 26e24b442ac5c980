"""How a cache keeps keys and values: wide, in 8 bits, or in 4 bits.

| format | bytes a token and head | error                                                   |
|--------|------------------------|---------------------------------------------------------|
| `Wide` | 2 H a dtype's bytes    | none                                                    |
| `Int8` | 2 H + 8                | at most 1/254 of the largest channel of the token       |
| `Int4` | H + 8                  | at most 1/14 of the largest channel, once it is rotated |

Each token and head has a scale of its own, so nothing that was written ever changes. Four bits are
too few for keys, of which a few channels are much larger than the others. So keys and values are
rotated first, by a Hadamard matrix, which spreads every channel over all (QuaRot, Ashkboos et al.
2024). Products of rotated queries and rotated keys are those of the original ones, since a rotation
keeps angles; and what rotated values are mixed to is rotated back once.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from videochat_flash_jax.shapes import Array, Float, Int, UInt8


class Wide(NamedTuple):
  """Keys and values as they are."""

  k: Float[Array, "*axes S H"]
  v: Float[Array, "*axes S H"]

  @classmethod
  def encode(cls, k: Float[Array, "*axes S H"], v: Float[Array, "*axes S H"]) -> "Wide":
    """Keeps keys and values."""
    return cls(k, v)

  def decode(self, dtype) -> tuple[Float[Array, "*axes S H"], Float[Array, "*axes S H"]]:
    """Returns keys and values."""
    return self.k.astype(dtype), self.v.astype(dtype)


class Int8(NamedTuple):
  """Keys and values in 8 bits."""

  k: Int[Array, "*axes S H"]
  v: Int[Array, "*axes S H"]
  k_scale: Float[Array, "*axes S"]
  v_scale: Float[Array, "*axes S"]

  @classmethod
  def encode(cls, k: Float[Array, "*axes S H"], v: Float[Array, "*axes S H"]) -> "Int8":
    """Rounds keys and values."""
    (k, k_scale), (v, v_scale) = _rounded(k, 127), _rounded(v, 127)
    return cls(k, v, k_scale, v_scale)

  def decode(self, dtype) -> tuple[Float[Array, "*axes S H"], Float[Array, "*axes S H"]]:
    """Returns keys and values, as far as they are known."""
    return _scaled(self.k, self.k_scale, dtype), _scaled(self.v, self.v_scale, dtype)


class Int4(NamedTuple):
  """Rotated keys and values in 4 bits: of a byte, the lower half is the key's."""

  kv: UInt8[Array, "*axes S H"]
  k_scale: Float[Array, "*axes S"]
  v_scale: Float[Array, "*axes S"]

  @classmethod
  def encode(cls, k: Float[Array, "*axes S H"], v: Float[Array, "*axes S H"]) -> "Int4":
    """Rotates and rounds keys and values."""
    (k, k_scale), (v, v_scale) = _rounded(rotate(k), 7), _rounded(rotate(v), 7)
    k, v = ((x + 8).astype(jnp.uint8) for x in (k, v))
    return cls(k | (v << 4), k_scale, v_scale)

  def decode(self, dtype) -> tuple[Float[Array, "*axes S H"], Float[Array, "*axes S H"]]:
    """Returns rotated keys and values, as far as they are known."""
    k, v = (x.astype(jnp.int8) - 8 for x in (self.kv & 15, self.kv >> 4))
    return _scaled(k, self.k_scale, dtype), _scaled(v, self.v_scale, dtype)


KVFormat = Wide | Int8 | Int4
FORMATS: dict[str | None, type[KVFormat]] = {None: Wide, "int8": Int8, "int4": Int4}


def rotate(x: Float[Array, "*axes H"]) -> Float[Array, "*axes H"]:
  """Returns x R in the dtype of x, with a Hadamard matrix R that is its own inverse.

  If H is no power of two, the largest power of two that divides it is the size of its blocks.
  """
  size = x.shape[-1] & -x.shape[-1]
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  blocks = x.reshape(*x.shape[:-1], -1, size).astype(jnp.float32)
  matrix = jnp.asarray(matrix / size**0.5, jnp.float32)
  return jnp.matmul(blocks, matrix, precision="highest").reshape(x.shape).astype(x.dtype)


def _rounded(x, highest):
  """Integers of at most `highest`, and the scale that takes the last axis back."""
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(axis=-1) / highest
  divisor = jnp.where(scale > 0, scale, 1)[..., None]
  return jnp.round(x / divisor).astype(jnp.int8), scale


def _scaled(x, scale, dtype):
  return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)
