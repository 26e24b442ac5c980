"""`vcflash fit`: a verdict, numbers and remedies; and refusals that name the flag."""

import json

import pytest

from videochat_flash_jax.cli.main import main

SEVEN = "VideoChat-Flash-Qwen2-7B_res224"


def fit(capsys, *options):
  code = main(["fit", "--model", SEVEN, *options])
  return code, capsys.readouterr()


def test_what_fits_is_told_with_its_parts(capsys):
  options = ["--chip", "v5e", "--frames", "10000", "--weights", "int8", "--cache", "int8"]
  code, output = fit(capsys, *options, "--context", "170000", "--json")
  report = json.loads(output.out)
  assert code == 0 and report["fits"] and report["most_frames_of_context"] == 10_592
  parts = report["weights_gib"] + report["cache_gib"] + report["working_gib"]
  assert report["needs_gib"] == pytest.approx(parts, abs=0.002)
  assert report["most_frames"] >= 10_000 and report["remedies"] == []


def test_what_does_not_fit_names_what_would_make_it(capsys):
  code, output = fit(capsys, "--chip", "v5e", "--frames", "10000", "--json")
  report = json.loads(output.out)
  assert code == 1 and not report["fits"]
  assert not report["memory_suffices"] and not report["context_suffices"]
  flags = [remedy["flags"] for remedy in report["remedies"]]
  context = "--context 160512"
  assert f"--weights int8 --cache int8 {context}" in flags and f"--tensor 2 {context}" in flags
  code, output = fit(capsys, "--chip", "v5e", "--frames", "10000")
  assert "does not fit" in output.out and f"with --tensor 2 {context} it fits" in output.out


def test_a_context_that_is_too_short_is_told_like_memory(capsys):
  options = ["--chip", "V5P", "--frames", "10000"]
  code, output = fit(capsys, *options, "--json")
  report = json.loads(output.out)
  assert code == 1 and report["memory_suffices"] and not report["fits"]
  assert [remedy["flags"] for remedy in report["remedies"]] == ["--context 160512"]
  assert report["most_frames_of_context"] == (32_768 - 512) // 64 * 4
  assert fit(capsys, *options, "--context", "160512")[0] == 0
  assert fit(capsys, *options, "--yarn", "5")[0] == 0
  assert "2,016 into the context of 32,768" in fit(capsys, *options)[1].out


def test_other_devices_are_given_by_their_memory(capsys):
  assert fit(capsys, "--memory", "80", "--frames", "512")[0] == 0
  code, output = fit(capsys, "--memory", "1", "--frames", "512")
  assert code == 1 and "no setting makes it fit" in output.out


@pytest.mark.parametrize(
  "options, said",
  [
    (["--chip", "v9"], "--chip is 'v9'; known are v4, v5e, v5p, v6e; or give --memory"),
    (["--chip", "v5e", "--frames", "0"], "--frames is 0; give at least 1"),
    (["--chip", "v5e", "--tensor", "3"], "num_kv_heads 4"),
    (["--chip", "v5e", "--yarn", "0.5"], "--yarn is 0.5; give a factor of 1 or more"),
    (
      ["--chip", "v5e", "--model", "tiny", "--dropout"],
      "--dropout drops tokens at layers 4 and 18",
    ),
    (["--memory", "nan"], "--memory is nan"),
    (["--chip", "v5e", "--cache", "int2"], "--cache"),
    ([], "one of the arguments --chip --memory is required"),
  ],
)
def test_what_cannot_be_asked_is_refused(capsys, options, said):
  code, output = fit(capsys, *options)
  assert code == 2 and said in output.err
  assert len(output.err.strip().splitlines()) == 1
