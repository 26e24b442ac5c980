"""What all runs share, and every field that a config may have.

A step computes `rows` rows of `tokens_per_row` tokens, into which examples are packed one behind
another. The published batches count examples: 512 a step in stage 1, 256 later. `rows` was chosen
to hold about as many, by these estimates of an example's tokens, nothing that was measured:

  stage 1   240 tokens   16 rows of  8,192 hold 540   (4 frames are 64 tokens; images have tiles)
  stage 2   450 tokens    4 rows of 32,768 hold 290
  stage 3 2,100 tokens   16 rows of 32,768 hold 250   (64 to 512 frames are 1,024 to 8,192 tokens)
  stage 4 2,100 tokens   16 rows of 32,768 hold 250

A run logs how many examples its steps hold. `num_steps` is one epoch of the published data by the
published batch. A row's tokens are spread over `mesh.sequence` chips; each part of a row has room
for `clips_per_shard` clips of 4 frames and for `tiles_per_shard` tiles of images, 64 tokens each.
Mesh and rows are sized for the slice in a config's header; docs/memory.md has others.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """Returns what every stage begins with, locked: a mistyped field is an error."""
  config = ConfigDict()
  config.seed = 0  # of the order of examples, and of weights drawn at random
  config.objective = "answers"  # "patches" trains the encoder alone, on synthetic videos
  config.model = "qwen2_7b_res448"  # a constructor of VideoChatFlashConfig
  config.image_size = 224  # pixels; the encoder's weights fit any size
  # A hub checkpoint (id or directory), the --workdir of another run or one of its checkpoints/STEP,
  # or "LANGUAGE_MODEL + ENCODER", or these + PROJECTOR: see docs/checkpoints.md.
  config.init_from = placeholder(str)
  config.num_steps = 10_000

  config.rows = 16
  config.tokens_per_row = 32_768
  config.clips_per_shard = 128
  config.tiles_per_shard = 40  # an image has up to 6 x 6 tiles and a base view
  config.accumulate = 1  # parts of the rows, computed one after another; the result is the same
  config.compute_dtype = "bfloat16"  # or "float32"; trained weights and moments always are
  # What the backward pass computes again, layer by layer: "full" all but what enters a layer, which
  # takes the least memory; "dots" all but products of matrices; "none" nothing.
  config.remat = "full"
  mesh = config.mesh = ConfigDict()
  mesh.data = 1
  mesh.fsdp = -1  # what is left
  mesh.sequence = 4
  mesh.tensor = 1
  mesh.num_slices = 1
  # A row of 8,192 tokens fits one chip: "none", with mesh.sequence = 1, and nothing of it travels.
  # Longer ones are split: "ring" holds no whole row, whatever the length; or "all_gather". See
  # docs/sharding.md.
  config.sequence_parallel = "ring"
  config.zigzag = True

  config.optimizer = _optimizer()
  config.lora = ConfigDict({"rank": 0, "alpha": 16.0, "targets": r"decoder\..*\.(q|k|v|o)_proj"})
  # Of visual tokens between layers, in training: kind is one of models.config.DROPOUT_KINDS, "" for
  # none, as released; layers and ratios are those of the released model cards.
  config.dropout = ConfigDict({"kind": "", "layers": (4, 18), "ratios": (1.0, 0.75, 0.25)})
  config.data = _data()
  # Of `mixture`, or, where data.synthetic is given, of that world with another seed.
  config.eval = ConfigDict({"mixture": "", "every": 1000, "batches": 8})
  config.checkpoint = ConfigDict({"every": 500, "keep": 3, "keep_every": 0})
  config.log_every = 10  # steps
  config.profile = ()  # or the first and the last step to profile
  config.heartbeat_seconds = 100  # then a host that says nothing is taken for dead
  return config.lock()


def _optimizer() -> ConfigDict:
  optimizer = ConfigDict()
  optimizer.name = "adamw"  # or "muon"
  optimizer.learning_rate = 1e-5  # the highest
  # (regular expression, factor of the rate): the first that is found in a weight's path counts, and
  # 0 freezes. Paths are such as vision.blocks.stacked.fc1.kernel, connector.fc1.kernel,
  # decoder.layers.stacked.q_proj.kernel; of adapters they end in q_proj.lora_a and lora_b.
  optimizer.scales = (("vision", 0.2), ("", 1.0))
  optimizer.warm_up = 0.03  # of the steps; then a cosine
  optimizer.final = 0.0  # of the highest rate, at the end
  optimizer.weight_decay = 0.0
  optimizer.clip_norm = 1.0
  return optimizer


def _data() -> ConfigDict:
  data = ConfigDict()
  data.mixture = placeholder(str)  # a file: see docs/data_format.md
  # In its place, weights of kinds of questions, such as {"attribute": 0.8, "absence": 0.2}.
  data.synthetic = ConfigDict()
  data.frames = (64, 512)  # of a video: the least and the most
  data.sampling = "dynamic_fps1"  # one a second within `frames`; or "middle"
  data.template = "qwen_2"
  data.time_message = "short"  # of a video's length; or "long", or "" for none
  data.label_style = "qwen"  # or "clean": see `data.text.conversation.encode_dialog`
  data.position_skip = 0  # positions that are left out at most, twice an example
  data.workers = 2  # processes that read, for each stream
  data.streams = 0  # that are packed by themselves; 0: as many as there are groups of hosts
  data.max_broken_share = 0.01
  data.features = ""  # a directory of `vcflash data encode`
  return data
