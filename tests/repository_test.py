"""House rules that a reader would otherwise have to check by eye."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "videochat_flash_jax").rglob("*.py"))
SOURCES = [
  *MODULES,
  *sorted(p for room in ("configs", "tests") for p in ROOT.glob(f"{room}/**/*.py")),
]

MOST_LINES = 300
MOST_LINES_WITH_A_REASON = 500
REASON = re.compile(rf"^# Over {MOST_LINES} lines: \w+")
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


def wrong_length(lines: list[str]) -> str | None:
  """What is wrong with a module of these lines, if anything."""
  if len(lines) > MOST_LINES_WITH_A_REASON:
    return f"{len(lines)} lines, at most {MOST_LINES_WITH_A_REASON}"
  if len(lines) > MOST_LINES and not (lines and REASON.match(lines[0])):
    return f"{len(lines)} lines, and the first is not `# Over {MOST_LINES} lines: <why>`"
  return None


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_long_without_a_reason(path):
  assert wrong_length(path.read_text().splitlines()) is None


@pytest.mark.parametrize(
  "num_lines, first, is_wrong",
  [
    (300, "import jax", False),
    (301, "import jax", True),
    (301, "# Over 300 lines: one table that reads better whole.", False),
    (301, "# Over 300 lines: ", True),
    (501, "# Over 300 lines: one table that reads better whole.", True),
  ],
)
def test_a_long_module_is_found(num_lines, first, is_wrong):
  assert (wrong_length([first] + ["x = 1"] * (num_lines - 1)) is not None) == is_wrong


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


def test_more_than_half_of_all_definitions_are_documented():
  definitions = [
    node
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, Definition)
  ]
  assert sum(ast.get_docstring(node) is not None for node in definitions) > len(definitions) / 2


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
