"""The objective "patches": the encoder alone learns to name what each patch of a clip shows.

It stands in for the pretraining of a released encoder: only stage 0 of the tiny model uses it. Its
clips are drawn from the synthetic world, in one process. A batch holds `rows` videos of
`clips_per_shard` clips each; there is no text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from videochat_flash_jax.data.text.conversation import IGNORE_LABEL
from videochat_flash_jax.errors import InputError
from videochat_flash_jax.models.config import VideoChatFlashConfig
from videochat_flash_jax.models.token_merging import merge_groups, similarity_features, sum_groups
from videochat_flash_jax.models.videochat_flash import VideoChatFlash
from videochat_flash_jax.ops.linear import Linear
from videochat_flash_jax.parallel.layout import ONE_DEVICE, Layout
from videochat_flash_jax.shapes import Array
from videochat_flash_jax.synthetic.render import COLOURS
from videochat_flash_jax.synthetic.shapes import KINDS
from videochat_flash_jax.synthetic.training import draw_clips
from videochat_flash_jax.train.batches import RunBatches, held_out_seed
from videochat_flash_jax.train.flops import encoder_flops
from videochat_flash_jax.train.losses import Sums, cross_entropy
from videochat_flash_jax.train.settings import TrainSettings
from videochat_flash_jax.train.step import TrainProgram

# By the field of a batch that holds the labels. The last class is "nothing".
_NUM_CLASSES = {"kinds": len(KINDS) + 1, "colours": len(COLOURS) + 1}
_NUM_VIDEOS = 1 << 40  # so many that no run reaches the last one
_VIDEOS_AHEAD = 16


def add_heads(model: VideoChatFlash, rngs: nnx.Rngs, num_classes: Mapping[str, int] = _NUM_CLASSES):
  """Adds linear heads to a model that classify its patch features.

  Args:
    model: gets `heads`: from the name of a field of labels to a head over its classes.
    rngs: what the weights of the heads are drawn from.
    num_classes: of each field of labels.
  """
  width = model.config.vision.width
  model.heads = nnx.Dict(
    {name: Linear(width, classes, rngs=rngs) for name, classes in num_classes.items()}
  )


def patch_loss(model: VideoChatFlash, batch: dict[str, Array], layout: Layout = ONE_DEVICE) -> Sums:
  """The cross-entropy of the classes of patches, before and after they are merged.

  Each patch is classified twice: from its own feature, and from the merged token that it becomes a
  part of. A token may hold both patches that show a thing and patches that show nothing. Then only
  the former count: the token should name the thing, however few of its patches show it.

  Args:
    model: with heads, see `add_heads`.
    batch: `frames [C, F, S, S, 3]`, and labels `[C, P]` for every head; the last class is
      "nothing", and IGNORE_LABEL does not count.
    layout: gives the dtype of products. Clips do not depend on each other, so XLA splits them by
      itself.

  Returns:
    Sums whose means are the loss and, for each head, the share of right answers about patches that
    show something, after merging; each patch is a target.
  """
  connector, num_tokens = model.connector, model.config.clip_tokens
  features = model.encode_patches(batch["frames"], layout)
  metric = jax.lax.stop_gradient(similarity_features(features, connector.config.merge_heads))
  group = merge_groups(metric, target=num_tokens)
  merged = jnp.take_along_axis(connector.merge(features), group[..., None], axis=1)
  total, right = jnp.zeros(()), {}
  for name, head in model.heads.items():
    labels, nothing = batch[name], head.out_features - 1
    things = jnp.where(labels == nothing, IGNORE_LABEL, labels)
    num_things = sum_groups(1.0 * (things >= 0)[..., None], group, num_tokens)
    is_beside_thing = jnp.take_along_axis(num_things[..., 0], group, axis=1) > 0
    bare = jnp.where(labels == nothing, labels, IGNORE_LABEL)
    bare_tokens = jnp.where(is_beside_thing, IGNORE_LABEL, bare)
    for x, without_things in ((features, bare), (merged, bare_tokens)):
      logits = head(x)
      loss, right[name] = cross_entropy(logits, things)
      # Most patches of a picture show nothing; all of them together have half the weight.
      total += 0.5 * loss + 0.25 * cross_entropy(logits, without_things)[0]
  count = jnp.asarray(group.size, jnp.float32)
  return Sums(total * count, count, {name: share * count for name, share in right.items()})


def batch_shapes(settings: TrainSettings, layout: Layout) -> dict[str, Any]:
  """Shapes and shardings of a batch: `frames [C, F, S, S, 3]`, `kinds` and `colours` `[C, P]`."""
  vision, clips = settings.model.vision, settings.rows * settings.clips_per_shard
  size, num_patches = vision.image_size, vision.num_patches(vision.clip_frames)
  sharding = NamedSharding(layout.mesh, layout.spec("batch"))
  labels = jax.ShapeDtypeStruct((clips, num_patches), jnp.int32, sharding=sharding)
  frames = (clips, vision.clip_frames, size, size, 3)
  return {
    "frames": jax.ShapeDtypeStruct(frames, jnp.uint8, sharding=sharding),
    **dict.fromkeys(_NUM_CLASSES, labels),
  }


def check(settings: TrainSettings, program: TrainProgram):
  """Refuses what this objective cannot use; arguments are those of `batches.check_features`.

  Raises:
    InputError: there are stored features, or several processes.
  """
  del program
  if settings.data.features:
    raise InputError(
      f'config.data.features is {settings.data.features!r:.80}, but the objective "patches" trains '
      "the encoder; give no data.features"
    )
  if jax.process_count() > 1:
    raise InputError('config.objective "patches" is for one process; start only one')


def run_batches(settings: TrainSettings, program: TrainProgram, *_) -> RunBatches:
  """The batches of a run; see `batches.run_batches`. Neither text nor stored features are read."""
  shardings = jax.tree.map(lambda shape: shape.sharding, program.batch)
  clips = settings.clips_per_shard
  dataset = clip_batches(settings.model, settings.rows, clips, settings.seed)
  return RunBatches(dataset, shardings, settings.rows * clips)


def held_out_batches(settings: TrainSettings, program: TrainProgram, *_) -> RunBatches:
  """The batches of a run's evaluations: other clips than those that it is trained on."""
  return run_batches(dataclasses.replace(settings, seed=held_out_seed(settings.seed)), program)


def clip_batches(
  model: VideoChatFlashConfig, num_videos: int, clips_per_video: int, seed: int
) -> grain.IterDataset:
  """Endless batches of clips with labels of their patches.

  Args:
    model: gives the sizes of pictures and patches.
    num_videos: of a batch.
    clips_per_video: C is `num_videos * clips_per_video`.
    seed: of what is drawn.

  Returns:
    A data set of `frames [C, F, S, S, 3]`, `kinds` and `colours` `[C, P]`; see `draw_clips`. The
    state of its iterators is a number.
  """

  def draw(number: int) -> dict[str, np.ndarray]:
    """The clips of one video."""
    return draw_clips(np.random.default_rng([seed, number]), model, clips_per_video)

  def join(videos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays [videos, clips, ...] as [C, ...]."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in videos.items()}

  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_VIDEOS_AHEAD)
  videos = grain.MapDataset.range(_NUM_VIDEOS).map(draw).to_iter_dataset(options)
  return videos.batch(num_videos).map(join)


def step_flops(settings: TrainSettings, sequence_shards: int) -> float:
  """Operations of a step on all chips; the small heads are not counted. See `flops.step_flops`."""
  del sequence_shards
  clips = settings.rows * settings.clips_per_shard
  return clips * encoder_flops(settings, settings.model.vision.clip_frames)
