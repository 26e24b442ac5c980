"""The letters that every shape, einsum and docstring of this package uses.

| letter | axis                                 | letter | axis                                  |
|--------|--------------------------------------|--------|---------------------------------------|
| B      | batch                                | T      | query length (tokens of a sequence)   |
| C      | clips (groups of `clip_frames`)      | S      | key length (slots of a cache)         |
| F      | frames of one clip                   | N      | query heads                           |
| P      | patches, or tokens before merging    | K      | key/value heads                       |
| V      | visual tokens after merging          | H      | head size                             |
| E      | encoder width                        | D      | decoder width                         |
| L      | layers                               | M      | MLP width                             |

Einsum strings have them in lower case (`btnh,bsnh->bnts`). Annotations are checked in tests only.
"""

from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "Shaped", "UInt8"]
