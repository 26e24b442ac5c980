"""House rules that a reader would otherwise have to check by eye."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "videochat_flash_jax"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
SOURCES = [
  *MODULES,
  *sorted(p for room in ("configs", "tests") for p in ROOT.glob(f"{room}/**/*.py")),
]

# Folders of the machines this was written on, in pieces so that this file does not name them.
MACHINE_PATH = re.compile(
  rf"(?<![\w./-])/({'|'.join(['work', 'root', 'tmp/w', 'opt/pypi'])})(?!\w)"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def project_files() -> list[Path]:
  """What git tracks or would track; without git, all but what hidden folders hold."""
  if (ROOT / ".git").exists():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
  else:
    files = [path for path in ROOT.rglob("*") if path.relative_to(ROOT).parts[0][0] != "."]
  return [path for path in files if path.is_file()]


def public_definitions(tree: ast.Module) -> Iterator[Definition]:
  """Functions and classes whose name is public, and the public methods of such classes.

  A method without a docstring that overrides one of a base class in the same module is left out:
  its docstring is the one it overrides.
  """
  documented = {
    method.name
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
    for method in node.body
    if isinstance(method, Function) and ast.get_docstring(method)
  }
  for node in tree.body:
    if not isinstance(node, Definition) or node.name.startswith("_"):
      continue
    yield node
    for method in node.body if isinstance(node, ast.ClassDef) else []:
      overrides = node.bases and isinstance(method, Function) and method.name in documented
      is_public = isinstance(method, Function) and not method.name.startswith("_")
      if is_public and (ast.get_docstring(method) or not overrides):
        yield method


def undocumented(source: str) -> list[str]:
  """Names that a docstring is missing from: the module itself is called "module"."""
  tree = ast.parse(source)
  missing = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
  return missing if ast.get_docstring(tree) or not tree.body else ["module", *missing]


def test_half_of_the_modules_are_read_in_minutes():
  assert statistics.median(len(path.read_text().splitlines()) for path in MODULES) < 150


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_definition_is_documented(path):
  assert undocumented(path.read_text()) == []


def test_a_missing_docstring_is_found():
  source = '''
def f(): pass
def _g(): pass
class A:
  """Is documented."""
  def documented(self):
    """Is documented."""
  def bare(self): pass
  def __call__(self): pass
class B(A):
  """Is documented."""
  def documented(self): pass
  def bare(self): pass
'''
  assert undocumented(source) == ["module", "f", "bare", "bare"]


def documented_share(is_counted):
  """Share of the definitions, nested ones too, that have a docstring."""
  definitions = [
    node
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, Definition) and is_counted(node)
  ]
  return sum(ast.get_docstring(node) is not None for node in definitions) / len(definitions)


def test_nine_of_ten_public_definitions_and_half_of_all_are_documented():
  assert documented_share(lambda node: not node.name.startswith("_")) >= 0.9
  assert documented_share(lambda node: True) > 0.5


def test_no_file_imports_a_private_name_of_another():
  private = [
    f"{path.relative_to(ROOT)}: {alias.name} of {node.module}"
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("videochat", "tests"))
    for alias in node.names
    if alias.name.startswith("_") and not alias.name.endswith("__")
  ]
  assert private == []


def test_the_contents_of_every_folder_are_listed_in_its_init():
  missing = []
  for path in MODULES:
    contents = path.with_name("__init__.py").read_text()
    is_listed = f"`{path.stem}`" in contents or f".{path.stem}`" in contents
    if not is_listed and path.name != "__init__.py" and path.parent.name != PACKAGE:
      missing.append(str(path.relative_to(ROOT)))
  assert missing == []


def test_every_folder_of_modules_is_a_package():
  assert {p.parent for p in MODULES} == {p.parent for p in MODULES if p.name == "__init__.py"}


def test_no_module_is_called_by_what_it_is_not():
  vague = {"helper", "helpers", "misc", "util", "utils"}
  assert [path for path in SOURCES if vague & {path.stem, path.parent.name}] == []


def test_no_file_mentions_a_folder_of_the_machine_it_was_written_on():
  found = []
  files = project_files()
  assert Path(__file__) in files
  for path in files:
    content = path.read_bytes()
    if b"\0" not in content and MACHINE_PATH.search(content.decode(errors="replace")):
      found.append(str(path.relative_to(ROOT)))
  assert found == []


@pytest.mark.parametrize(
  "text, is_found",
  [
    ("see /" + "work/main/setup.py", True),
    ("PYTHONPATH=/" + "work", True),
    ("(/" + "tmp/w)", True),
    ("https://host/" + "work/paper.html", False),
    ("data/" + "work/a.mp4", False),
    ("/" + "workspace", False),
  ],
)
def test_a_machine_path_is_found(text, is_found):
  assert bool(MACHINE_PATH.search(text)) == is_found
