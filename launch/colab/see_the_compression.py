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
# # See the compression
#
# VideoChat-Flash compresses twice. Within a clip of four frames, patches that look alike are
# merged: 784 patches become 64 tokens. And between layers of the language model, visual tokens
# are dropped. This notebook shows both with the tiny model, which has 64 patches and 24 tokens a
# clip. It runs on any device.
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
import colorsys

import jax.numpy as jnp
import numpy as np
from flax import nnx
from IPython.display import display
from PIL import Image

import videochat_flash_jax as vcf
from videochat_flash_jax.checkpoints.convert import load_model
from videochat_flash_jax.checkpoints.hub.directory import checkpoint_directory
from videochat_flash_jax.data.media.video_reader import open_video
from videochat_flash_jax.data.text.conversation import inference_prompt, video_opening
from videochat_flash_jax.data.text.tokenizer import load_tokenizer
from videochat_flash_jax.data.text.visual_slots import open_slots
from videochat_flash_jax.models.token_dropout import plan_dropout
from videochat_flash_jax.models.token_merging import merge_groups, similarity_features

# %% [markdown]
# ## A video, and the model as a Flax module

# %%
# !vcflash synth --out demo --videos 1 --frames 120:120 --seed 2026

# %%
directory = checkpoint_directory("tiny")
tokenizer = load_tokenizer(directory)


def make_model(config):
  """The module of a config; `load_model` fills in the weights."""
  return vcf.models.VideoChatFlash(config, rngs=nnx.Rngs(0))


model = load_model(make_model, directory)
vision, connector = model.config.vision, model.config.connector
with open_video("demo/videos/0000.mp4") as reader:
  frames = reader.read([int(second * reader.info.fps) for second in range(64)], vision.image_size)
clips = frames.reshape(-1, vision.clip_frames, *frames.shape[1:])
print(f"{clips.shape[0]} clips of {clips.shape[1]} frames, {vision.num_patches(4)} patches a clip")

# %% [markdown]
# ## What merges
#
# The encoder makes a feature of each patch. In each round the most similar pairs of patches are
# averaged, until `clip_tokens` are left. Below, each row is a clip: its four frames, and the same
# frames with one colour for each token. A still background becomes few large tokens, and what
# moves keeps its own.

# %%
features = model.encode_patches(jnp.asarray(clips))
similar = similarity_features(features, connector.merge_heads)
groups = np.asarray(merge_groups(similar, target=connector.clip_tokens))

SCALE = 4
side = vision.image_size // vision.patch_size
shades = [
  colorsys.hsv_to_rgb(7 * token / connector.clip_tokens % 1, 0.65, 0.6 + 0.2 * (token % 3))
  for token in range(connector.clip_tokens)
]
colours = np.array(shades) * 255


def enlarged(pixels, scale):
  """Repeats pixels [H, W, 3] in both directions."""
  return pixels.repeat(scale, 0).repeat(scale, 1)


def merged_row(clip, group):
  """The frames of a clip, then the tokens that their patches became part of."""
  maps = colours[group].reshape(-1, side, side, 3)
  pictures = [enlarged(frame, SCALE) for frame in clip]
  pictures += [enlarged(tokens.astype(np.uint8), SCALE * vision.patch_size) for tokens in maps]
  return np.concatenate([np.pad(picture, ((2, 2), (2, 2), (0, 0))) for picture in pictures], axis=1)


display(Image.fromarray(np.concatenate([merged_row(clips[i], groups[i]) for i in (2, 6, 10)])))
sizes = np.sort(np.bincount(groups[2], minlength=connector.clip_tokens))[::-1]
print(f"patches in each token of the first of these clips: {sizes.tolist()}")

# %% [markdown]
# ## What is dropped
#
# With video-level dropout the first layers read all visual tokens, and later layers fewer of
# them: evenly spaced ones, or those that the question attends to most. `layers` and `ratios` are
# yours to change.

# %%
DROPOUT = vcf.DropoutConfig("attention", layers=(2,), ratios=(1.0, 0.125))
QUESTIONS = ("What colour is the star?", "Which color is the hourglass?")

visual_tokens = model.encode(jnp.asarray(clips)).reshape(1, -1, model.config.decoder.width)


def kept_share(question):
  """The share of each clip's tokens that the last layers still see."""
  ids = inference_prompt(question, tokenizer, video_opening(len(frames), float(len(frames))))
  token_ids, visual_index = open_slots(ids, [visual_tokens.shape[1]])
  plan = plan_dropout(DROPOUT, visual_index[None] >= 0, np.ones((1, len(token_ids)), np.int32))
  inputs = jnp.asarray(token_ids)[None], visual_tokens, jnp.asarray(visual_index)[None]
  _, indices = model.read_and_drop(*inputs, plan)
  kept = visual_index[np.asarray(indices[0])]
  clip_of_token = kept[kept >= 0] // connector.clip_tokens
  return np.bincount(clip_of_token, minlength=len(clips)) / connector.clip_tokens


# %% [markdown]
# Each picture is the first frame of a clip, the brighter the more of its tokens are kept for the
# question.

# %%
for question in QUESTIONS:
  share = kept_share(question)
  print(
    f"{question} {share.mean():.1%} of the tokens are kept, most of them in clip {share.argmax()}"
  )
  light = 0.15 + 0.85 * share / share.max()
  dimmed = (clips[:, 0] * light[:, None, None, None]).astype(np.uint8)
  display(Image.fromarray(np.concatenate([enlarged(frame, 2) for frame in dimmed], axis=1)))
