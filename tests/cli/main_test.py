import io
import os
import subprocess
import sys
import types

import pytest

import videochat_flash_jax
from videochat_flash_jax.cli import main
from videochat_flash_jax.errors import InputError


@pytest.fixture
def fake_verb(monkeypatch):
  """A verb `fake` with one option; returns its module, for a test to change."""
  module = types.ModuleType("videochat_flash_jax.cli.fake")
  module.EXAMPLE = "vcflash fake --count 3"
  module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=1)
  module.run = lambda args: print(f"count {args.count}")
  module.MEANT = {"--number": "--count"}
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setitem(main.VERBS, "fake", "Do nothing much.")
  return module


def _raise(error):
  raise error


def test_a_verb_gets_its_options_and_success_is_zero(fake_verb, capsys):
  assert main.main(["fake", "--count", "3"]) == 0
  assert capsys.readouterr().out == "count 3\n"


def test_a_verb_chooses_its_exit_code(fake_verb):
  fake_verb.run = lambda args: 1
  assert main.main(["fake"]) == 1


def test_a_verbs_help_shows_what_it_does_and_an_example(fake_verb, capsys):
  with pytest.raises(SystemExit, match="0"):
    main.main(["fake", "--help"])
  out = capsys.readouterr().out
  assert "Do nothing much." in out and "--count" in out and fake_verb.EXAMPLE in out


def test_bad_input_is_one_line_and_code_2(fake_verb, capsys):
  fake_verb.run = lambda args: _raise(InputError("no file 'a.mp4': check the path"))
  assert main.main(["fake"]) == 2
  assert capsys.readouterr().err == "vcflash: no file 'a.mp4': check the path\n"


def test_what_the_encoding_of_the_terminal_lacks_is_escaped(fake_verb, monkeypatch):
  shown = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
  fake_verb.run = lambda args: print("caf\xe9 caf\udce9 \ud83d", flush=True)
  assert main.main(["fake"]) == 0
  assert shown.getvalue() == b"caf\\xe9 caf\\udce9 \\ud83d\n"


def test_what_is_typed_in_another_encoding_is_read(fake_verb, monkeypatch):
  typed = []
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
  fake_verb.run = lambda args: typed.append(input())
  assert main.main(["fake"]) == 0
  assert typed == ["caf\udce9"]


def test_an_error_about_an_odd_name_is_one_line_that_can_be_printed(fake_verb, capsys):
  fake_verb.run = lambda args: _raise(InputError("a\u2028b\x85\x1b[2J\udce9.mp4: check the path"))
  assert main.main(["fake"]) == 2
  assert capsys.readouterr().err == r"vcflash: a\u2028b\x85\x1b[2J\udce9.mp4: check the path" "\n"


def test_an_interrupt_is_code_130(fake_verb):
  fake_verb.run = lambda args: _raise(KeyboardInterrupt())
  assert main.main(["fake"]) == 130


def test_a_fault_of_the_package_keeps_its_traceback(fake_verb):
  fake_verb.run = lambda args: _raise(ValueError("a bug"))
  with pytest.raises(ValueError, match="a bug"):
    main.main(["fake"])


@pytest.mark.parametrize(
  "argv, message",
  [
    ([], "required: <verb>"),
    (["--count", "3"], "; see `vcflash --help`"),
    (["--verbose", "fake"], "unrecognized arguments: --verbose; see `vcflash --help`"),
    (["--", "fake"], "; see `vcflash --help`"),
    (["fkae"], "unknown verb 'fkae': did you mean fake?"),
    (["xyz"], "unknown verb 'xyz': the verbs are chat, "),
    (["fake", "--count", "three"], "argument --count: invalid int value: 'three'"),
    (["fake", "--coun", "3"], "unknown argument --coun; did you mean --count?; see `vcflash fake "),
    (["fake", "--number=3"], "unknown argument --number; did you mean --count?"),
    (["fake", "--xyz"], "unknown argument --xyz; see"),
    (["fake", "three " * 100], "unknown argument three three"),
  ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(fake_verb, capsys, argv, message):
  assert main.main(argv) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("vcflash: ") and message in lines[0]
  assert len(lines[0]) < 400


def test_the_module_is_the_command():
  command = [sys.executable, "-m", "videochat_flash_jax", "--version"]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  assert result.stdout == f"vcflash {videochat_flash_jax.__version__}\n"


def test_output_that_cannot_be_written_is_one_line_and_code_2():
  command = [sys.executable, "-m", "videochat_flash_jax", "fit", "--model", "tiny", "--chip", "v5e"]
  with open("/dev/full", "w") as full:
    result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
  assert result.returncode == 2
  assert result.stderr == "vcflash: no space is left for the output; make room for it\n"


def test_all_caches_can_be_moved(fake_verb, monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("VCF_CACHE_DIR", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")  # is put back after the test
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  fake_verb.run = lambda args: print(os.environ["JAX_COMPILATION_CACHE_DIR"])
  assert main.main(["fake"]) == 0
  assert capsys.readouterr().out == f"{tmp_path / 'programs'}\n"


def test_overrides_reach_only_the_verb_that_takes_them(fake_verb, capsys):
  fake_verb.TAKES_OVERRIDES = True
  fake_verb.run = lambda args: print(args.count, args.overrides)
  assert main.main(["fake", "--config.a.b=1", "--count", "2", "--config.c", "x"]) == 0
  assert capsys.readouterr().out == "2 ['--config.a.b=1', '--config.c', 'x']\n"


def test_version_is_the_packages(capsys):
  with pytest.raises(SystemExit, match="0"):
    main.main(["--version"])
  assert capsys.readouterr().out == f"vcflash {videochat_flash_jax.__version__}\n"


def test_help_lists_the_verbs_and_imports_none_of_them():
  probe = (
    "import sys; from videochat_flash_jax.cli import main\n"
    "try: main.main(['--help'])\n"
    "finally: print(sorted(m for m in sys.modules if 'flash_jax.cli.' in m), 'jax' in sys.modules)"
  )
  result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
  assert all(verb in result.stdout for verb in main.VERBS)
  assert result.stdout.splitlines()[-1] == "['videochat_flash_jax.cli.main'] False"


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_shows_an_example_of_itself(verb, capsys):
  with pytest.raises(SystemExit, match="0"):
    main.main([verb, "--help"])
  assert f"example:\n  vcflash {verb}" in capsys.readouterr().out
