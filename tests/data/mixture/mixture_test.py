"""Mixtures of annotation files, as the official training code writes them."""

import pytest

from videochat_flash_jax.data.mixture.mixture import Source, read_mixture
from videochat_flash_jax.data.mixture.rows import open_rows
from videochat_flash_jax.errors import InputError


def write(path, text):
  path.write_text(text)
  return path


def test_a_published_mixture_reads_as_it_is(tmp_path):
  path = write(
    tmp_path / "stage4.yaml",
    """datasets:
  # image sft datasets
  - json_path: annotations/image/textocr(gpt4v).json # 25104
    sampling_strategy: "first:25%"
    data_root: https://huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data/image/textocr(gpt4v)
  - json_path: annotations/video/classification_k710-k710-train_40k.jsonl
    sampling_strategy: all
  - json_path: /data/longvid_subset.jsonl
    video_read_type: img
    data_root: videos/longvid
""",
  )
  folder = str(tmp_path)
  address = "https://huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data/image/textocr(gpt4v)"
  assert read_mixture(path).sources == (
    Source(
      f"{folder}/annotations/image/textocr(gpt4v).json", "first:25%", address, folder=folder
    ),
    Source(
      f"{folder}/annotations/video/classification_k710-k710-train_40k.jsonl", folder=folder
    ),
    Source(
      "/data/longvid_subset.jsonl", data_root=f"{folder}/videos/longvid", video_read_type="img",
      folder=folder,
    ),
  )  # fmt: skip


def test_our_own_fields_and_addresses_are_understood(tmp_path):
  text = "datasets: [{json_path: 'gs://b/a.jsonl', weight: 2, seed: 3, media_type: mix}]"
  (source,) = read_mixture(write(tmp_path / "m.yml", text)).sources
  assert (source.json_path, source.weight, source.seed) == ("gs://b/a.jsonl", 2, 3)
  assert source.media_type == "mix"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_annotations_are_a_mixture_of_one(tmp_path, name):
  path = str(tmp_path / name)
  assert read_mixture(path).sources == (Source(path, folder=str(tmp_path)),)


@pytest.mark.parametrize(
  "text, said",
  [
    ("", "field 'datasets' is missing or empty"),
    ("datasets: []", "field 'datasets' is missing or empty"),
    ("datasets: 3", "field 'datasets' is missing or empty"),
    ("- json_path: a.json", "field 'datasets' is missing or empty"),
    ("dataset: [{json_path: a.json}]", "field 'datasets' is missing or empty"),
    ("datasets: [{json_path: a.json}]\nseed: 3", "unknown field 'seed'"),
    ("datasets: [a.json]", r"datasets\[0\] is 'a.json'"),
    ("datasets: [{}]", r"datasets\[0\]: field 'json_path' is missing"),
    ("datasets: [{json_path: a.txt}]", r"field 'json_path' is 'a.txt'; name a \.json"),
    ("datasets: [{json_path: 3}]", "field 'json_path' is 3; give a text"),
    ("datasets: [{json_path: a.json}, {json_paht: a.json}]",
     r"datasets\[1\]: unknown field 'json_paht'; did you mean json_path"),
    ("datasets: [{json_path: a.json, media_type: vidoe}]", "did you mean video"),
    ("datasets: [{json_path: a.json, video_read_type: imgs}]", "did you mean img"),
    ("datasets: [{json_path: a.json, sampling_strategy: 'frist:3'}]",
     r"datasets\[0\]: field 'sampling_strategy': .* did you mean first"),
    ("datasets: [{json_path: a.json, sampling_strategy: 'first:2.5%'}]", "not a whole number"),
    ("datasets: [{json_path: a.json, weight: 0}]", "field 'weight' is 0; give a number above 0"),
    ("datasets: [{json_path: a.json, weight: .inf}]", "field 'weight' is inf"),
    ("datasets: [{json_path: a.json, seed: -1}]", "field 'seed' is -1"),
    ("datasets: [{json_path: a.json, folder: b}]", "unknown field 'folder'"),
    ("datasets:\n  - a: b\n c: [", "not valid YAML .line"),
    ("datasets:\n  - json_path: a.json\n    json_path: b.json",
     "line 3: key 'json_path' stands twice, first in line 2"),
    ("datasets: [{json_path: a.json}]\n'datasets': [{json_path: b.json}]",
     "line 2: key 'datasets' stands twice, first in line 1"),
    ('{"datasets": [{"json_path": "a.json", "weight": 1,\n "weight": 2}]}',
     "line 2: key 'weight' stands twice, first in line 1"),
    ("x: &x {a: {b: 1, b: 2}}\ndatasets: [{json_path: a.json}]", "line 1: key 'b' stands twice"),
    ("datasets: [{json_path: a.json, weight: 1e19}]", "a number above 0, 1,000,000 at most"),
    (f"datasets: [{{json_path: a.json, weight: {10**400}}}]", "give a number above 0"),
    ("datasets: [{json_path: a.json, weight: 1e999}]", "field 'weight' is inf"),
    ("datasets: [{json_path: a.json, weight: 1e}]", "field 'weight' is '1e'; give a number"),
    ("datasets: [{json_path: a.json, weight: !!int ''}]", "not valid YAML"),
    ("datasets: [{json_path: a.json, weight: !!bool maybe}]", "not valid YAML"),
    ("datasets: [{json_path: !!timestamp now}]", "not valid YAML"),
    ("datasets: [{json_path: a.json}]\n---\ndatasets: [{json_path: b.json}]", "not valid YAML"),
    ("datasets: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ("a\0b", "not valid YAML"),
  ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line_with_its_place(tmp_path, text, said):
  path = write(tmp_path / "mixture.yaml", text)
  with pytest.raises(InputError, match=said) as error:
    read_mixture(path)
  assert str(error.value).startswith(str(path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "text, weight",
  [("1e0", 1), ("1E3", 1000), ("2.5e-1", 0.25), ("1.e+1", 10), (".5", 0.5), ("+.5e1", 5), ("2", 2)],
)
def test_numbers_may_have_an_exponent_without_a_point_or_sign(tmp_path, text, weight):
  mixture = write(tmp_path / "m.yaml", f"datasets: [{{json_path: a.json, weight: {text}}}]")
  assert read_mixture(mixture).sources[0].weight == weight


def test_texts_that_resemble_numbers_stay_texts(tmp_path):
  text = "datasets: [{json_path: 1e3.json, data_root: 3e4f, sampling_strategy: first:1}]"
  (source,) = read_mixture(write(tmp_path / "m.yaml", text)).sources
  assert source.data_root == str(tmp_path / "3e4f")


def test_fields_may_be_merged_in_and_changed(tmp_path):
  text = """datasets:
  - &first {json_path: a.json, weight: 2}
  - &second {<<: *first, json_path: b.json}
  - {<<: *second, weight: 3}
"""
  sources = read_mixture(write(tmp_path / "m.yaml", text)).sources
  named = [(source.json_path.removeprefix(f"{tmp_path}/"), source.weight) for source in sources]
  assert named == [("a.json", 2), ("b.json", 2), ("b.json", 3)]


def test_a_file_that_is_no_mixture_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"cannot be read .No such file"):
    read_mixture(tmp_path / "none.yaml")
  with pytest.raises(InputError, match=r"not a mixture; give a \.yaml"):
    read_mixture(write(tmp_path / "notes.txt", ""))
  (tmp_path / "folder.yaml").mkdir()
  with pytest.raises(InputError, match="cannot be read"):
    read_mixture(tmp_path / "folder.yaml")


@pytest.mark.parametrize("name", [r"a\0b", r"a\ud83db"])
@pytest.mark.parametrize("suffix", [".jsonl", ".yaml"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name, suffix):
  path = write(tmp_path / "a.yaml", f'datasets:\n  - json_path: "{name}.jsonl"\n')
  if suffix == ".yaml":
    path = name.encode().decode("unicode_escape") + suffix
  with pytest.raises(InputError, match="no file can have this name"):
    open_rows(read_mixture(path), cache_dir=tmp_path)
