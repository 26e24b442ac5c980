"""Public names of a package that are imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
  package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
  """Makes `__getattr__`, `__dir__` and `__all__` for a package's `__init__.py`.

  Args:
    package: the package's `__name__`.
    homes: public name -> the module that defines it, relative to the package. If both are the same,
      the name is a submodule: with `{"Fruit": "garden.tree", "garden": "garden"}`, `package.Fruit`
      is a class of `package/garden/tree.py` and `package.garden` is the folder.
  """

  def fetch(name: str) -> Any:
    """Imports a public name: the package's `__getattr__`."""
    if name not in homes:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(f"{package}.{homes[name]}")
    return module if homes[name] == name else getattr(module, name)

  return fetch, lambda: sorted(homes), list(homes)
