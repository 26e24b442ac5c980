"""Training and batches without dropping tokens, golden family 06: losses and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.conftest import assert_close
from tests.parity.golden_flash import (
  FAMILY,
  GRADIENT_TOLERANCE,
  HIDDEN_TOLERANCE,
  IMAGES,
  LOGIT_TOLERANCE,
  LOSS_TOLERANCE,
  MANIFEST,
  TILE_TOKENS,
  VIDEOS,
  clips_of,
  cut,
  embeddings_and_logits,
  encoded,
  inputs_named,
  labels_in_sequence,
  load_flash,
  order_of,
  pad_rows,
  row_of,
  unpadded,
  visual_tokens_of,
)
from tests.parity.golden_models import hub_gradients
from videochat_flash_jax.data.text.conversation import IGNORE_LABEL, VISUAL_SLOT
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.train.losses import cross_entropy

TRAINING = [row for row in MANIFEST["train"] if row["key"].split(".")[2] == "none"]


# Most of the time here goes to compiling, so the compiler is told not to try hard.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def loss_and_gradients(state, inputs, token_ids, visual_index, labels):
  """Loss and logits of rows of one input each, given as clips, and gradients of all weights."""
  graph, weights = state

  def loss_of(weights):
    model = nnx.merge(graph, weights)
    tokens = [model.connector(model.vision(clips)) for clips in inputs]
    tokens = [row.reshape(-1, row.shape[-1]) for row in tokens]
    most = max(map(len, tokens))
    tokens = jnp.stack([jnp.pad(row, ((0, most - len(row)), (0, 0))) for row in tokens])
    logits = model.decoder.logits(model(token_ids, tokens, visual_index))
    return cross_entropy(logits[:, :-1], labels[:, 1:])[0], logits

  return jax.value_and_grad(loss_of, has_aux=True)(weights)


def assert_training(tensors, key, names, ids, labels, length=None):
  """Compares loss and stored gradients of a training batch; returns the rows and their logits."""
  rows = [row_of(row, name) for row, name in zip(ids, names, strict=True)]
  placed = [
    labels_in_sequence(*row, index)
    for *row, (_, index) in zip(ids, labels, rows, strict=True)
  ]  # fmt: skip
  (loss, logits), gradients = loss_and_gradients(
    nnx.split(load_flash()),
    [clips_of(name) for name in names],
    pad_rows([token_ids for token_ids, _ in rows], 0, length),
    pad_rows([index for _, index in rows], -1, length),
    pad_rows(placed, IGNORE_LABEL, length),
  )
  assert_close(loss[None], tensors[f"{key}.loss"], absolute=LOSS_TOLERANCE)
  named = hub_gradients(gradients)
  for name in [name for name in tensors if name.startswith(f"{key}.grad.")]:
    actual = named[name.removeprefix(f"{key}.grad.")]
    assert_close(actual, tensors[name], relative=GRADIENT_TOLERANCE)
  return rows, logits


@pytest.mark.parametrize("row", TRAINING, ids=lambda row: row["key"])
def test_training_loss_and_gradients_agree(row):
  tensors = FAMILY.tensors("c_train")
  sample, style, *_ = row["key"].split(".")
  ids, labels = tensors[f"{sample}.input_ids"], tensors[f"{sample}.labels.{style}"]
  num_visual = row["final_len"] - (ids.shape[1] - 1)
  name = next(name for name in [*VIDEOS, *IMAGES] if len(order_of(name)) == num_visual)
  longest = max(row["final_len"] for row in TRAINING)
  assert_training(tensors, row["key"], [name], ids, labels, longest)


def test_gradients_and_both_label_styles_are_among_the_training_rows():
  keys = tuple(f"{row['key']}.grad." for row in TRAINING)
  assert any(key.startswith(keys) for key in FAMILY.tensors("c_train"))
  assert {row["key"].split(".")[1] for row in TRAINING} == {"qwen", "clean"}


def test_a_padded_training_batch_of_image_and_video_agrees():
  tensors = FAMILY.tensors("e_compressed_batch")
  runs = FAMILY.json("manifest_compressed_batch.json")["runs"]
  (order,) = [row["order"] for row in runs if row["key"] == "train.none"]
  names = inputs_named(order)
  ids = unpadded(tensors["train.input_ids"], tensors["train.attention_mask"])
  labels = unpadded(tensors["train.labels"], tensors["train.attention_mask"])
  rows, logits = assert_training(tensors, "train.none", names, ids, labels)
  image = next(number for number, name in enumerate(names) if name in IMAGES)
  whole = logits[image : image + 1, : len(rows[image][0])]
  for key in [key for key in tensors if key.startswith("train.none.logits_image_")]:
    assert_close(cut(whole, key.rsplit("_", 1)[1])[0], tensors[key], absolute=LOGIT_TOLERANCE)


@functools.cache
def mixed_batch():
  """Lengths of the mixed batch's rows, labels, embedded sequences, logits, stored tensors."""
  tensors = FAMILY.tensors("e_mixed_batch")
  ids = unpadded(tensors["input_ids"], tensors["attention_mask_in"])
  labels = unpadded(tensors["labels_in"], tensors["attention_mask_in"])
  names = [[name] if name else [] for name in inputs_named(MANIFEST["mixed_batch"]["order"])]
  rows = [row_of(row, *name) for row, name in zip(ids, names, strict=True)]
  placed = [
    labels_in_sequence(*row, index)
    for *row, (_, index) in zip(ids, labels, rows, strict=True)
  ]  # fmt: skip
  sequences, logits = embeddings_and_logits(
    load_flash(),
    pad_rows([token_ids for token_ids, _ in rows], 0),
    pad_rows([visual_tokens_of(*name) for name in names], 0),
    pad_rows([index for _, index in rows], -1),
  )
  return [len(row[0]) for row in rows], pad_rows(placed, IGNORE_LABEL), sequences, logits, tensors


def test_a_batch_of_image_video_and_text_is_laid_out_as_officially():
  lengths, labels, _, _, tensors = mixed_batch()
  assert lengths == MANIFEST["mixed_batch"]["lengths_after"]
  assert labels.shape[1] == MANIFEST["mixed_batch"]["padded_len"]
  np.testing.assert_array_equal(labels, tensors["labels_out"])
  counts = np.arange(labels.shape[1]) < np.array(lengths)[:, None]
  np.testing.assert_array_equal(counts, tensors["attention_mask_out"] == 1)


def test_rows_and_loss_of_a_batch_of_image_video_and_text_agree():
  lengths, labels, sequences, logits, tensors = mixed_batch()
  tolerances = {"embeds": {"relative": HIDDEN_TOLERANCE}, "logits": {"absolute": LOGIT_TOLERANCE}}
  compared = set()
  for key in tensors:
    if match := re.fullmatch(r"(embeds|logits)_sample(\d+)_(\w+)", key):
      kind, row, how = match[1], int(match[2]), match[3]
      whole = {"embeds": sequences, "logits": logits}[kind][row : row + 1, : lengths[row]]
      assert_close(cut(whole, how)[0], tensors[key], **tolerances[kind])
      compared.add((kind, row))
  assert compared == {(kind, row) for kind in tolerances for row in range(len(lengths))}
  loss, _ = cross_entropy(logits[:, :-1], labels[:, 1:])
  assert_close(loss[None], tensors["loss"], absolute=LOSS_TOLERANCE)


def test_two_images_in_one_row_agree():
  tensors = FAMILY.tensors("e_mixed_batch")
  multi = MANIFEST["mixed_batch"]["multi"]
  crops_written, _, rest = multi["images"].partition(" of ")  # "crops 1 and 2 of img_u8 as two"
  crops = [int(number) for number in re.findall(r"\d+", crops_written)]
  assert len(crops) == np.count_nonzero(tensors["multi_input_ids"][0] == VISUAL_SLOT), multi
  (name,) = set(re.findall(r"(\w+)_u8", rest))
  token_ids, index = open_slots(tensors["multi_input_ids"][0], [TILE_TOKENS] * len(crops))
  assert len(token_ids) == multi["len"]
  visual_tokens = encoded(name)[1][crops].reshape(1, len(crops) * TILE_TOKENS, -1)
  _, logits = embeddings_and_logits(load_flash(), token_ids[None], visual_tokens, index[None])
  keys = [key for key in tensors if key.startswith("multi_logits_")]
  assert keys
  for key in keys:
    assert_close(cut(logits, key.rsplit("_", 1)[1]), tensors[key], absolute=LOGIT_TOLERANCE)
