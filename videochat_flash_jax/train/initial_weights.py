"""Where the first weights of a run come from: a checkpoint, a run, parts of several, or random.

config.init_from                  a directory in the released layout, or a name on the hub
                                  WORKDIR of a run, or WORKDIR/checkpoints/STEP
                                  "LANGUAGE_MODEL + ENCODER", or with " + PROJECTOR"
                                  "random"
"""

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from videochat_flash_jax.checkpoints.convert import open_checkpoint
from videochat_flash_jax.checkpoints.hub.checkpoint import Checkpoint
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.checkpoints.hub.hf_config import read_fields, write_config
from videochat_flash_jax.checkpoints.hub.hf_options import has_int8
from videochat_flash_jax.checkpoints.hub.other_files import copy_other_files
from videochat_flash_jax.checkpoints.hub.parts import (
  join_parts,
  missing_parts,
  with_head_of_embedding,
)
from videochat_flash_jax.checkpoints.hub.weights import load_weights
from videochat_flash_jax.checkpoints.runs.run_files import is_run, refuse_stages, whole_steps
from videochat_flash_jax.data.text.tokenizer import check_embedded, load_tokenizer
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig

RANDOM = "random"

_log = logging.getLogger("videochat_flash_jax")

_FORMS = "a checkpoint, a run's WORKDIR, or 'LANGUAGE_MODEL + ENCODER[ + PROJECTOR]'"
# Fields that may differ from config.model, since the shape of no weight depends on them.
_MAY_DIFFER = {
  "vision": ("image_size",),
  "connector": (),
  "decoder": ("max_positions", "yarn", "tied_embeddings"),
}


def initial_weights(
  init_from: str,
  config: VideoChatFlashConfig,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  seed: int = 0,
) -> dict[str, jax.Array]:
  """Reads the first weights of a run, each directly to its devices, in its dtype.

  At most one tensor is on the host at a time. All names and sizes are checked before any tensor is
  read.

  Args:
    init_from: see the module.
    config: of the model that is trained. Its picture size may differ from the checkpoint's.
    shapes: of its weights by their dotted paths, `decoder.norm.scale` and so on, with shardings.
    seed: of the random projector, where parts are given without one.

  Returns:
    Arrays by their dotted paths; an empty dictionary for "random".

  Raises:
    InputError: a part is missing, or belongs to another model; names the first field that differs.
  """
  if init_from == RANDOM:
    return {}
  checkpoint = _opened(init_from, config, seed)
  return load_weights(
    checkpoint.where,
    checkpoint.tensors,
    {path: shape.shape for path, shape in shapes.items()},
    {path: shape.dtype for path, shape in shapes.items()},
    lambda path, _: shapes[path].sharding,
  )


def check_init_from(init_from: str, config: VideoChatFlashConfig, needs_tokenizer: bool = True):
  """Checks whether `init_from` fits a model without reading weights; see `initial_weights`.

  Args:
    init_from: see the module.
    config: of the model that is trained.
    needs_tokenizer: whether the run reads texts.

  Raises:
    InputError: see `initial_weights`; or the tokenizer is missing, or has ids that the model does
      not embed.
  """
  if init_from == RANDOM:
    return
  directory = _opened(init_from, config).directory
  if needs_tokenizer:
    check_embedded(load_tokenizer(directory), config.decoder.vocab_size, directory)


def copy_hub_files(init_from: str, config: VideoChatFlashConfig, out: Path):
  """Writes what an export of the run needs beside weights: config.json, the tokenizer and so on.

  Only one process calls this. `init_from` is checked before anything is written. If it is a run
  that is not finished, a warning is logged.

  Args:
    init_from: see the module; not "random", which has no tokenizer.
    config: of the model that is trained.
    out: WORKDIR/hub, made if it is missing.

  Raises:
    InputError: see `initial_weights`.
  """
  source = _opened(init_from, config)
  _warn_if_unfinished(Path(_split(init_from)[0]))
  out.mkdir(parents=True, exist_ok=True)
  copy_other_files(source.directory, out)
  write_config(config, out, dtype="float32", base=source.fields)


def _warn_if_unfinished(workdir):
  """Logs a warning if this is the WORKDIR of a run with steps left.

  There is no warning for WORKDIR/checkpoints/STEP: who names a step chose it.
  """
  try:
    num_steps = json.loads((workdir / "config.json").read_text())["config"]["num_steps"]
  except (OSError, ValueError, KeyError, TypeError):
    return
  newest = max(whole_steps(workdir / "checkpoints"), default=num_steps)
  if newest < num_steps:
    message = "config.init_from: %s is at step %d of %d only; this run starts from that step"
    _log.warning(message, workdir, newest, num_steps)


def _opened(init_from, config, seed=0) -> Checkpoint:
  """Opens what `init_from` names, and checks whether it fits the model that is trained."""
  first, *others = _split(init_from)
  directory = _directory(first)
  if others:
    encoder, *projector = map(Path, others)
    projector = projector[0] if projector else None
    checkpoint = join_parts(directory, encoder, config.vision, projector, seed)
    # No part states the options of the connector.
    joined = dataclasses.replace(checkpoint.config, connector=config.connector)
    checkpoint = checkpoint._replace(config=joined)
  else:
    if not is_run(directory) and read_fields(directory).get("model_type") == "qwen2":
      raise InputError(
        f"config.init_from: {first} is only a language model, without encoder and projector; "
        f"give '{first} + ENCODER', where ENCODER is a file such as UMT-L_f4_vision.pt"
      )
    checkpoint = open_checkpoint(directory)
  if has_int8(checkpoint.fields):
    raise InputError(
      f"config.init_from: {checkpoint.where} has int8 weights, which cannot be trained; give the "
      "checkpoint of which it was made"
    )
  _check_parts(checkpoint)
  _check_sizes(checkpoint, config)
  return _with_tied_head(checkpoint, config)


def _split(init_from):
  """The names that `init_from` joins with " + "; the path of a directory is one name."""
  if os.path.isdir(init_from):
    return [init_from]
  parts = re.split(r"\s+\+\s+", init_from.strip())
  if not all(parts) or len(parts) > 3:
    raise InputError(f"config.init_from is {init_from!r:.80}; give {_FORMS}; or random")
  return parts


def _directory(name):
  """The directory of a checkpoint or a run; what is on the hub is downloaded."""
  if Path(name).is_file():
    raise InputError(
      f"config.init_from: {name} is a file, perhaps only an encoder; give 'LANGUAGE_MODEL + "
      "ENCODER', or a directory"
    )
  try:
    directory = checkpoint_directory(name)
    refuse_stages(directory)
    return directory
  except InputError as error:
    raise InputError(f"config.init_from: {error}") from error


def _with_tied_head(checkpoint, config):
  """Uses the embedding as the head, too, if config.model has a head and the checkpoint has none."""
  if config.decoder.tied_embeddings or not checkpoint.config.decoder.tied_embeddings:
    return checkpoint
  return with_head_of_embedding(checkpoint)


def _check_parts(checkpoint):
  """Refuses a checkpoint without an encoder, a projector or a language model."""
  for part in missing_parts(checkpoint):
    raise InputError(
      f"config.init_from: {checkpoint.where} lacks the {part}; give {_FORMS} that has it"
    )


def _check_sizes(checkpoint, config):
  """Refuses a checkpoint whose config differs from that of the model that is trained."""
  for part, may_differ in _MAY_DIFFER.items():
    has, asked = (dataclasses.asdict(getattr(one, part)) for one in (checkpoint.config, config))
    if config.vision.kind == "internvideo2":  # its learnt positions fit one picture size
      may_differ = tuple(field for field in may_differ if field != "image_size")
    for field, value in asked.items():
      if field not in may_differ and has[field] != value:
        raise InputError(
          f"config.init_from: {checkpoint.where} has {part}.{field} {has[field]!r:.80}, but "
          f"config.model, {config.name}, has {value!r:.80}; give another config.model, or the "
          "checkpoint that it names"
        )
  if config.decoder.tied_embeddings and not checkpoint.config.decoder.tied_embeddings:
    raise InputError(
      f"config.init_from: {checkpoint.where} has a head of its own (decoder.tied_embeddings), but "
      f"config.model, {config.name}, has none; give another config.model"
    )
