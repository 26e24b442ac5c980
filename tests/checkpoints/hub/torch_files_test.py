"""Files of torch: tensors come out as they went in, and nothing else is unpickled."""

import sys

import numpy as np
import pytest

from tests.checkpoints.small_checkpoints import assert_refused
from videochat_flash_jax.checkpoints.hub import torch_files
from videochat_flash_jax.checkpoints.hub.safetensors_files import FLOATING
from videochat_flash_jax.checkpoints.hub.torch_files import read_torch_file


def test_without_torch_its_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  assert_refused(
    tmp_path / "encoder.pt",
    "encoder.pt: a PyTorch file",
    "pip install 'videochat_flash_jax[convert]'",
    load=read_torch_file,
  )


@pytest.fixture
def torch():
  import torch

  return torch


@pytest.fixture
def tensors(torch):
  """One tensor of each type, not all of them contiguous."""
  values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
  return {
    "F64": values.double(),
    "F32": values.T,
    "F16": values.half()[1:],
    "BF16": values.bfloat16().T,
  }


@pytest.mark.torch
@pytest.mark.parametrize("newer_format", [True, False])
@pytest.mark.parametrize("block_values", [1, 12, 2**23])
def test_every_type_is_read_bit_for_bit(
  torch, tensors, tmp_path, monkeypatch, newer_format, block_values
):
  monkeypatch.setattr(torch_files, "_BLOCK_VALUES", block_values)
  path = tmp_path / "model.bin"
  torch.save(tensors, path, _use_new_zipfile_serialization=newer_format)
  for name, stored in read_torch_file(path).items():
    blocks = list(stored.blocks())
    assert max(map(len, blocks)) <= max(1, block_values // stored.shape[1])
    array = np.concatenate(blocks)
    assert (stored.dtype, stored.shape) == (name, array.shape) == (name, tensors[name].shape)
    assert array.dtype == FLOATING[name]
    expected = tensors[name].double().numpy().astype(FLOATING[name])
    np.testing.assert_array_equal(array, expected)


@pytest.mark.torch
def test_a_tensor_of_integers_tells_its_type(torch, tmp_path):
  torch.save({"count": torch.arange(3)}, tmp_path / "a.pt")
  assert read_torch_file(tmp_path / "a.pt")["count"].dtype == "torch.int64"


class Trap:
  """Unpickling it fails the test."""

  def __reduce__(self):
    return pytest.fail, ("unpickled",)


@pytest.mark.torch
@pytest.mark.parametrize("newer_format", [True, False])
def test_what_could_run_code_is_not_unpickled(torch, tmp_path, newer_format):
  path = tmp_path / "trap.pt"
  content = {"weight": torch.ones(2), "trap": Trap()}
  torch.save(content, path, _use_new_zipfile_serialization=newer_format)
  assert_refused(path, "trap.pt: holds more than tensors", load=read_torch_file)


@pytest.mark.torch
@pytest.mark.parametrize("bytes_kept", [0, 10, 0.5, 0.9])
@pytest.mark.parametrize("newer_format", [True, False])
def test_a_part_of_a_file_is_refused(torch, tensors, tmp_path, newer_format, bytes_kept):
  path = tmp_path / "part.pt"
  torch.save(tensors, path, _use_new_zipfile_serialization=newer_format)
  content = path.read_bytes()
  path.write_bytes(content[: bytes_kept if bytes_kept >= 1 else int(bytes_kept * len(content))])
  assert_refused(path, "part.pt: ", "download it again", load=read_torch_file)


@pytest.mark.torch
@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {3: 4}, "text"])
def test_what_is_no_state_dict_is_refused(torch, tmp_path, content):
  torch.save(content, tmp_path / "odd.pt")
  assert_refused(tmp_path / "odd.pt", "not a plain dict of tensors by name", load=read_torch_file)
