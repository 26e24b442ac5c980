"""Watches functions of the package while programs are traced: which arrays they give.

Also reads from a traced program what it computes, and how it says that arrays are split.
"""

import contextlib
import importlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

PACKAGE = "videochat_flash_jax"

Kind = tuple[str, tuple[int, ...]]  # dtype and shape of an array


def kind(array) -> Kind:
  """Dtype and shape of an array."""
  return str(array.dtype), tuple(array.shape)


class Watched:
  """What watched functions give, by their names, and what gradients come back to them."""

  def __init__(self):
    self.results: dict[str, set[Kind]] = defaultdict(set)
    self.gradients: dict[str, set[Kind]] = defaultdict(set)

  def note(self, name: str, result):
    """Takes in the arrays of a result; gives it on, with gradients watched."""
    if isinstance(result, nnx.Module):
      graph, state = nnx.split(result)
      return nnx.merge(graph, self.note(name, state))
    return jax.tree.map(lambda leaf: self._note_array(name, leaf), result)

  def note_shapes(self, name: str, function, *arguments):
    """Takes in what a jitted function would give; traces it."""
    self.results[name] |= {kind(leaf) for leaf in jax.tree.leaves(function.eval_shape(*arguments))}

  def _note_array(self, name, array):
    self.results[name].add(kind(array))

    @jax.custom_vjp
    def same(x):
      """The array as it is."""
      return x

    def note_gradient(_, gradient):
      """The gradient as it is, taken note of."""
      self.gradients[name].add(kind(gradient))
      return (gradient,)

    same.defvjp(lambda x: (x, None), note_gradient)
    return same(array) if jnp.issubdtype(array.dtype, jnp.floating) else array


@contextlib.contextmanager
def watching(names: Iterable[str]) -> Iterator[Watched]:
  """Watches functions wherever the package uses them.

  Args:
    names: such as `models/umt.py UMT.__call__`. Jitted ones are left alone: see `note_shapes`.
  """
  watched = Watched()
  with pytest.MonkeyPatch.context() as patch:
    for name in sorted(set(names)):
      for holder, attribute, function in _uses(name):
        if not hasattr(function, "lower"):
          patch.setattr(holder, attribute, _wrapped(watched, name, function))
    yield watched


def _uses(name: str):
  """Where a function is found: in its class, or in all modules that have it by its name."""
  file, _, dotted = name.partition(" ")
  holder = importlib.import_module(f"{PACKAGE}.{file.removesuffix('.py').replace('/', '.')}")
  *parents, attribute = dotted.split(".")
  for parent in parents:
    holder = getattr(holder, parent)
  function = getattr(holder, attribute)
  if parents:
    return [(holder, attribute, function)]
  modules = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
  return [(m, attribute, function) for m in modules if vars(m).get(attribute) is function]


def _wrapped(watched: Watched, name: str, function):
  """The function, which notes what it gives."""

  def noting(*args, **kwargs):
    """Calls the function."""
    return watched.note(name, function(*args, **kwargs))

  return noting


def arrays_of(jaxpr) -> tuple[set[Kind], set[tuple[Kind, PartitionSpec]]]:
  """The arrays that a traced program computes, and those of which it says how they are split.

  Where the program is written for one chip, within `jax.shard_map`, the former are of one chip.
  """
  computed, splits = set(), set()
  for equation in _equations(jaxpr):
    computed |= {kind(x.aval) for x in equation.outvars if hasattr(x.aval, "dtype")}
    splits |= {(kind(x.aval), normal(spec)) for x, spec in _splits_of(equation)}
  return computed, splits


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
      if _is_program(inner):
        yield from _equations(getattr(inner, "jaxpr", inner))


def _is_program(value):
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _splits_of(equation):
  params = equation.params
  if equation.primitive.name == "sharding_constraint":
    yield equation.outvars[0], params["sharding"].spec
  if equation.primitive.name == "shard_map":
    yield from zip(equation.invars, params["in_specs"], strict=True)
    yield from zip(equation.outvars, params["out_specs"], strict=True)


def normal(spec) -> PartitionSpec:
  """A spec without what says nothing: an axis in a tuple of its own, None at the end."""
  parts = [part[0] if isinstance(part, tuple) and len(part) == 1 else part for part in spec]
  while parts and parts[-1] is None:
    parts.pop()
  return PartitionSpec(*parts)
