"""What a checked training config is: frozen dataclasses, one for each part of it."""

import dataclasses

from videochat_flash_jax.models.config import DropoutConfig, LoraConfig, VideoChatFlashConfig
from videochat_flash_jax.parallel.mesh_config import MeshConfig


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """How weights follow their gradients.

  Attributes:
    name: "adamw" or "muon".
    learning_rate: the highest.
    scales: pairs of a regular expression and a factor of the rate. The first expression that is
      found in a weight's dotted path counts; 0 freezes the weight.
    warm_up: share of the steps in which the rate rises.
    final: share of the highest rate that is left at the end.
    weight_decay: share of a weight that a step of rate 1 takes off.
    clip_norm: gradients that are longer, all weights together, are shortened to it.
  """

  name: str
  learning_rate: float
  scales: tuple[tuple[str, float], ...]
  warm_up: float
  final: float
  weight_decay: float
  clip_norm: float


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """Where examples come from, and how they are read; see `data.batches.data_config`.

  Attributes:
    mixture: file of annotations or of a mixture of them; None if it is not given.
    synthetic: weights of kinds of questions about the synthetic world, which then takes the place
      of a mixture; () for none.
    frames: the least and the most of a video.
    sampling: see `ExampleConfig`, as the next four.
    template: of conversations.
    time_message: "short", "long", or None.
    label_style: which tokens of an answer are learnt.
    position_skip: most positions that are left out.
    workers: processes that read, for each stream.
    streams: independent packers; 0: as many as there are groups of hosts.
    max_broken_share: the run stops when more of the examples could not be read.
    features: directory of stored features to read in place of pixels, or "".
  """

  mixture: str | None
  synthetic: tuple[tuple[str, float], ...]
  frames: tuple[int, int]
  sampling: str
  template: str
  time_message: str | None
  label_style: str
  position_skip: int
  workers: int
  streams: int
  max_broken_share: float
  features: str


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """What is measured on held-out examples: `batches` batches of `mixture`, every so many steps.

  With a synthetic world there is no mixture to give; without either, nothing is evaluated.
  """

  mixture: str
  every: int
  batches: int


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """A checkpoint `every` so many steps; the last `keep` stay, and those of every `keep_every`th.

  `keep_every` is 0 where only the last ones stay.
  """

  every: int
  keep: int
  keep_every: int


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """All that a run is made of.

  Attributes:
    seed: of the order of examples, and of what is drawn at random.
    objective: "answers", or "patches": what each patch of synthetic videos shows.
    model: sizes of the model, and of the pictures that it is trained on.
    init_from: what to begin with, see `train.initial_weights`; None if it is not given.
    num_steps: of the run.
    rows: of a step, on all devices together.
    tokens_per_row: conversations are packed into rows of so many tokens.
    clips_per_shard: room for clips on each part of a row's tokens.
    tiles_per_shard: room for image tiles on each; 0 where nothing but videos is read.
    accumulate: parts of a step's rows that are computed one after another.
    compute_dtype: of a step's products, and of what travels; trained weights stay float32.
    remat: what the backward pass computes again, out of `models.layer_stack.REMAT`.
    mesh: how many devices stand along each axis.
    sequence_parallel: see `parallel.layout.Layout`.
    zigzag: see `parallel.layout.Layout`.
    optimizer: see there, as of the next ones.
    lora: adapters; of rank 0 for none.
    dropout: of visual tokens between layers; None for none.
    data: examples.
    eval: held-out ones.
    checkpoint: what is saved when.
    log_every: so many steps a line of metrics.
    profile: the first and the last step to profile, or ().
    heartbeat_seconds: after which a host that says nothing is taken for dead.
  """

  seed: int
  objective: str
  model: VideoChatFlashConfig
  init_from: str | None
  num_steps: int
  rows: int
  tokens_per_row: int
  clips_per_shard: int
  tiles_per_shard: int
  accumulate: int
  compute_dtype: str
  remat: str
  mesh: MeshConfig
  sequence_parallel: str
  zigzag: bool
  optimizer: OptimizerSettings
  lora: LoraConfig
  dropout: DropoutConfig | None
  data: DataSettings
  eval: EvalSettings
  checkpoint: CheckpointSettings
  log_every: int
  profile: tuple[int, ...]
  heartbeat_seconds: int
