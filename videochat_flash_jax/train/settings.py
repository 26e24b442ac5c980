"""Every field of a run's config, defined once: its default, which values it takes, what it means.

`train/config.py` makes all else from these classes: the ml_collections config, the checks, the
table of `vcflash train --help-config`, and what may change when a run resumes. To add a field, add
it here; `fields.py` says how. Four sections are classes of other rooms, which use them, too:
`ReadingConfig` of `data/batches/data_config.py`, `MeshConfig` of `parallel/mesh_config.py`, and
`LoraConfig` and `DropoutConfig` of `models/config.py`. Their fields are defined there. A field of
`data` that changes how a row is read belongs to `ReadingConfig`; all others to `DataSettings`.
"""

import dataclasses

from videochat_flash_jax.data.batches.data_config import ReadingConfig
from videochat_flash_jax.fields import (
  SEED,
  OnResume,
  Rule,
  choice,
  count,
  field,
  flag,
  is_integer,
  is_number,
  is_pair,
  is_pattern,
  is_sequence,
  number,
  optional,
  section,
  text,
  weights,
)
from videochat_flash_jax.models.config import (
  REMAT,
  DropoutConfig,
  LoraConfig,
  VideoChatFlashConfig,
)
from videochat_flash_jax.parallel.mesh_config import SEQUENCE_PARALLEL, MeshConfig
from videochat_flash_jax.synthetic.world import QUESTION_KINDS

MODELS = tuple(
  name for name, member in vars(VideoChatFlashConfig).items() if isinstance(member, classmethod)
)

_MAY_CHANGE = OnResume.MAY_CHANGE
_BY_WEIGHTS = OnResume.FIXED_BY_WEIGHTS
_SCALES = Rule(
  lambda value: is_sequence(value) and len(value) > 0 and all(map(_is_scale, value)),
  'pairs of a regular expression and a factor from 0, such as (("vision", 0.2), ("", 1.0))',
)
_STEPS = Rule(
  lambda value: (
    is_sequence(value)
    and all(is_integer(step) and step > 0 for step in value)
    and (not value or (len(value) == 2 and value[0] <= value[1]))
  ),
  "() or the first and the last step",
)


def _is_scale(pair):
  return is_pair(pair) and is_pattern(pair[0]) and is_number(pair[1]) and pair[1] >= 0


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """How weights follow their gradients."""

  name: str = field(
    "adamw",
    choice("adamw", "muon"),
    "The optimizer. Muon is used for matrices, and AdamW beside it for all else.",
    on_resume=_BY_WEIGHTS,
  )
  learning_rate: float = field(
    1e-5, number(above=0), "The highest learning rate.", on_resume=_MAY_CHANGE
  )
  scales: tuple[tuple[str, float], ...] = field(
    (("vision", 0.2), ("", 1.0)),
    _SCALES,
    "Pairs of a regular expression and a factor of the learning rate. The first expression that is "
    "found in the path of a weight counts; 0 freezes the weight. Paths are such as "
    "vision.blocks.stacked.fc1.kernel, connector.fc1.kernel, decoder.layers.stacked.q_proj.kernel; "
    "those of adapters end in q_proj.lora_a and q_proj.lora_b.",
    on_resume=_BY_WEIGHTS,
    convert=lambda pairs: tuple((pattern, float(factor)) for pattern, factor in pairs),
  )
  warm_up: float = field(
    0.03,
    number(most=1),
    "The share of the steps in which the learning rate rises. Then it falls along a cosine.",
  )
  final: float = field(
    0.0, number(most=1), "The learning rate of the last step, as a share of the highest one."
  )
  weight_decay: float = field(
    0.0,
    number(),
    "The share of a weight that a step with a learning rate of 1 takes away. Norms and biases do "
    "not decay.",
  )
  clip_norm: float = field(
    1.0,
    number(above=0),
    "Gradients whose norm, over all weights together, is larger are scaled down to it.",
    on_resume=_MAY_CHANGE,
  )
  max_skipped: int = field(
    3,
    count(0),
    "Steps in a row whose loss or gradient is not finite: they are logged, and change neither "
    "weights nor the optimizer. One more stops the run.",
    on_resume=_MAY_CHANGE,
  )


@dataclasses.dataclass(frozen=True)
class DataSettings(ReadingConfig):
  """Where examples come from, and how they are read."""

  mixture: str | None = field(
    None,
    optional(text()),
    "The file of annotations, or of a mixture of them; see docs/data_format.md.",
    on_resume=_MAY_CHANGE,
  )
  synthetic: tuple[tuple[str, float], ...] = field(
    {},
    weights(*QUESTION_KINDS),
    "Instead of a mixture: weights of the kinds of questions about the synthetic world, such as "
    '{"attribute": 0.8, "absence": 0.2}. Without weights, data.mixture is read.',
    convert=lambda section: tuple(section.items()),
  )
  workers: int = field(
    2, count(0), "Processes that read examples, for each stream.", on_resume=_MAY_CHANGE
  )
  streams: int = field(
    0,
    count(0),
    "Streams of examples that are packed independently. 0: one for each group of hosts.",
  )
  max_broken_share: float = field(
    0.01,
    number(most=1),
    "The run stops when a larger share of the examples could not be read.",
    on_resume=_MAY_CHANGE,
  )
  features: str = field(
    "",
    text(),
    "A directory of `vcflash data encode`, whose features are read instead of pixels; or ''.",
    on_resume=_MAY_CHANGE,
  )


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """What is measured on held-out examples. Without a mixture and a synthetic world: nothing."""

  mixture: str = field(
    "", text(), "The file of held-out examples. With data.synthetic: '', another seed is used."
  )
  every: int = field(1000, count(), "Steps between two evaluations.")
  batches: int = field(8, count(), "Batches of an evaluation.")


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """Which checkpoints are written and kept."""

  every: int = field(500, count(), "Steps between two checkpoints.")
  keep: int = field(3, count(), "How many of the newest whole checkpoints are kept.")
  keep_every: int = field(
    0, count(0), "Checkpoints of steps that are a multiple of this are kept, too. 0: no others."
  )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """All that a run is made of.

  `TrainSettings()` holds the defaults as a config has them; `train.config.train_settings` gives the
  checked and converted object, in which `model` is a `VideoChatFlashConfig`.
  """

  seed: int = field(
    0, SEED, "The seed of the order of examples, and of weights that are drawn at random."
  )
  objective: str = field(
    "answers",
    choice("answers", "patches"),
    "What is learnt: the answers, or what each patch of synthetic videos shows, which trains the "
    "encoder alone.",
    on_resume=_BY_WEIGHTS,
  )
  model: VideoChatFlashConfig = field(
    "qwen2_7b_res448",
    Rule(lambda name: name in MODELS, f"one of {', '.join(MODELS)}"),
    "A constructor of VideoChatFlashConfig.",
    on_resume=_BY_WEIGHTS,
    convert=lambda name: getattr(VideoChatFlashConfig, name)(),
  )
  image_size: int = field(
    224,
    count(),
    "The side of a picture in pixels, a multiple of the encoder's patch size. The weights of UMT "
    "fit any size.",
  )
  init_from: str | None = field(
    None,
    optional(text()),
    "The weights to begin with: a checkpoint (an id on the hub, or a directory), the --workdir of "
    'another run or one of its checkpoints/STEP, "LANGUAGE_MODEL + ENCODER", "LANGUAGE_MODEL + '
    'ENCODER + PROJECTOR", or "random"; see docs/checkpoints.md.',
    on_resume=_MAY_CHANGE,
  )
  num_steps: int = field(10_000, count(), "Steps of the run.")
  rows: int = field(16, count(), "Packed rows of a step, on all devices together.")
  tokens_per_row: int = field(32_768, count(), "Conversations are packed into rows of this length.")
  clips_per_shard: int = field(
    128,
    count(),
    "Room for clips of 4 frames, in each part of a row that a device has.",
    on_resume=_MAY_CHANGE,
  )
  tiles_per_shard: int = field(
    40,
    count(0),
    "Room for image tiles in each part of a row. An image has up to 6 x 6 tiles and a base view. "
    "With 0, images are refused.",
    on_resume=_MAY_CHANGE,
  )
  accumulate: int = field(
    1,
    count(),
    "Parts into which the rows of a step are cut. They are computed one after another, which takes "
    "less memory and gives the same result.",
    on_resume=_MAY_CHANGE,
  )
  compute_dtype: str = field(
    "bfloat16",
    choice("bfloat16", "float32"),
    "The type of products, and of what devices send to each other. float32 is exact, and slow, on "
    "TPUs and GPUs, too. Trained weights and the optimizer's state are float32 in any case.",
  )
  gradient_dtype: str = field(
    "bfloat16",
    choice("bfloat16", "float32"),
    "The type in which devices add up their gradients, unless compute_dtype is float32. float32 is "
    "more exact on many devices, and twice as much to send. Those of norms and biases, and sums on "
    "one device, are float32 in any case.",
    on_resume=_MAY_CHANGE,
  )
  remat: str = field(
    "full",
    choice(*REMAT),
    'What the backward pass computes again, layer by layer. "full": all but the input of a layer, '
    'which takes the least memory; "dots": all but products of matrices; "none": nothing.',
    on_resume=_MAY_CHANGE,
  )
  mesh: MeshConfig = section(
    MeshConfig(sequence=4),
    "How many devices stand along each axis of the mesh; see docs/sharding.md.",
    on_resume=_MAY_CHANGE,
  )
  sequence_parallel: str = field(
    "ring",
    choice(*SEQUENCE_PARALLEL),
    "How attention reaches the tokens of other devices. A row of 8,192 tokens fits one chip: "
    '"none", with mesh.sequence = 1. Longer ones are split: with "ring" no device holds a whole '
    'row, whatever its length; or "all_gather". See docs/sharding.md.',
    on_resume=_MAY_CHANGE,
  )
  zigzag: bool = field(
    True,
    flag(),
    "Whether tokens are dealt to the devices of a split row so that all have equal work.",
    on_resume=_MAY_CHANGE,
  )
  optimizer: OptimizerSettings = section(OptimizerSettings(), "How weights follow their gradients.")
  lora: LoraConfig = section(
    LoraConfig(), "Adapters of low rank; a rank of 0 means none.", on_resume=_BY_WEIGHTS
  )
  dropout: DropoutConfig | None = section(
    dataclasses.replace(DropoutConfig.model_card(), kind=""),
    "Which visual tokens are dropped between layers in training. The kind '' means none, as in the "
    "released models; layers and ratios are those of the released model cards.",
    on_resume=OnResume.FIXED,
    convert=lambda dropout: dropout if dropout.kind else None,
  )
  data: DataSettings = section(DataSettings(), "Where examples come from, and how they are read.")
  eval: EvalSettings = section(
    EvalSettings(), "What is measured on held-out examples.", on_resume=_MAY_CHANGE
  )
  checkpoint: CheckpointSettings = section(
    CheckpointSettings(), "Which checkpoints are written and kept.", on_resume=_MAY_CHANGE
  )
  log_every: int = field(10, count(), "Steps between two lines of metrics.", on_resume=_MAY_CHANGE)
  profile: tuple[int, ...] = field(
    (),
    _STEPS,
    "The first and the last step to profile; () for none.",
    on_resume=_MAY_CHANGE,
    convert=tuple,
  )
  heartbeat_seconds: int = field(
    100,
    count(),
    "A host that is silent for so many seconds counts as lost.",
    on_resume=_MAY_CHANGE,
  )
