# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Teach it your own videos
#
# Adapters of low rank (LoRA) are trained on your annotations, tried on others, and written as a
# checkpoint for the hub. As it stands, the notebook teaches the tiny model other names for three
# colours, in about two minutes on a CPU. For a released model, change the fields of the config that
# have a comment: the 2B needs four v5e chips (`configs/finetune.py` says what it takes).
#
# Install as in `quickstart`.

# %%
import importlib.util
import subprocess
import sys

SOURCE = "."

if importlib.util.find_spec("videochat_flash_jax") is None:
  install = [sys.executable, "-m", "pip", "install", "--quiet", SOURCE]
  subprocess.run([*install, "--constraint", f"{SOURCE}/launch/colab/constraints.txt"], check=True)

# %%
import json
from pathlib import Path

# %% [markdown]
# ## 1. Annotations
#
# One row for each question about a video, in the format of LLaVA (`docs/data_format.md`). Here the
# videos are of the synthetic world: 24 to learn from, and 8 others to try it on. What is new are
# the names of the colours.

# %%
# !vcflash synth --out lessons --videos 24 --frames 8:16 --seed 11
# !vcflash synth --out exam --videos 8 --frames 8:16 --seed 12

# %%
OUR_NAMES = {"cyan": "blue", "pink": "red", "orange": "yellow"}

for folder in ("lessons", "exam"):
  rows = json.loads(Path(folder, "annotations.json").read_text())
  for row in rows:
    question, answer = row["conversations"]
    answer["value"] = OUR_NAMES.get(answer["value"], answer["value"])
  Path(folder, "mine.json").write_text(json.dumps(rows))
  print(f"{folder}: {len(rows)} rows, the last is {json.dumps(rows[-1], indent=1)}")

# %% [markdown]
# The checker reads every row and opens every video, before a run does.

# %%
# !vcflash data check lessons/mine.json --all

# %% [markdown]
# ## 2. A config
#
# Fields that are not named keep their defaults; `vcflash train --help-config` lists them all.
# `scales` says what learns: the adapters, the connector at a tenth of the rate, and nothing else.

# %%
# %%writefile lessons/config.py
from videochat_flash_jax.train.config import default_config


def get_config():
  config = default_config()
  config.model = "tiny"  # such as "qwen2_5_2b_res448"
  config.init_from = "tiny"  # such as "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448"
  config.image_size = 32  # 224 or 448
  config.compute_dtype = "float32"  # "bfloat16" on a TPU or GPU
  config.data.label_style = "clean"  # leave it out: the released models learnt the other one
  config.data.mixture = "lessons/mine.json"
  config.data.frames = (8, 16)  # (64, 512)
  config.rows, config.tokens_per_row = 1, 512  # 32768 tokens
  config.clips_per_shard, config.tiles_per_shard = 16, 0  # see configs/finetune.py
  config.mesh.sequence, config.sequence_parallel = 1, "none"  # leave both out on four chips
  config.num_steps = 60
  config.optimizer.learning_rate = 3e-3  # 1e-4
  config.optimizer.scales = (("lora_", 1.0), ("connector", 0.1), ("", 0.0))
  config.lora.rank = 8
  config.log_every = 20
  return config


# %% [markdown]
# ## 3. Train
#
# If the notebook stops, the same command goes on from the last checkpoint.

# %%
# !vcflash train --config lessons/config.py --workdir lessons/run

# %% [markdown]
# ## 4. Try it
#
# Answers about the videos that it did not learn from, before and after:

# %%
# !vcflash evaluate --model tiny --annotations exam/mine.json
# !vcflash evaluate --model lessons/run --annotations exam/mine.json

# %% [markdown]
# ## 5. Export
#
# The adapters are merged, and the checkpoint has the layout of the hub. It loads in
# `VideoChat.from_pretrained`, in `vcflash chat --model`, and in the original's code.
# `hf upload NAME lessons/mine-hf` uploads it.

# %%
# !vcflash convert --model lessons/run --to hf --out lessons/mine-hf
