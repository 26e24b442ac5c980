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
# # Ask questions about a video
#
# VideoChat-Flash watches a video once, and then answers any number of questions about it.
#
# In Colab choose *Runtime > Change runtime type > v5e-1 TPU* (a GPU or a CPU works, too), then
# *Run all*. Where no released model can be loaded, the tiny model of the package answers about a
# synthetic video.
#
# ## 1. Install
#
# `SOURCE` is what pip installs: a folder with this repository, or a wheel of it.

# %%
import importlib.util
import os
import subprocess
import sys

SOURCE = "."

if importlib.util.find_spec("videochat_flash_jax") is None:
  has_tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
  has_gpu = os.path.exists("/dev/nvidia0")
  extra = "[tpu]" if has_tpu else "[cuda]" if has_gpu else ""
  install = [sys.executable, "-m", "pip", "install", "--quiet", SOURCE + extra]
  subprocess.run([*install, "--constraint", f"{SOURCE}/launch/colab/constraints.txt"], check=True)

# %% [markdown]
# ## 2. Which device is it?

# %%
import time

import jax
from IPython.display import display
from PIL import Image, ImageDraw

import videochat_flash_jax as vcf

device = jax.devices()[0]
gib = (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30
print(f"{jax.device_count()} x {device.device_kind}", f"with {gib:.1f} GiB" if gib else "")

# %% [markdown]
# ## 3. A model for this device
#
# `docs/models.md` lists the models and what they need. On an accelerator a 7B is loaded, in int8
# if the memory is small. The first time it is downloaded: 16 GB. To choose another one, write its
# name here.

# %%
MODEL = ""

name = MODEL or ("tiny" if device.platform == "cpu" else "VideoChat-Flash-Qwen2-7B_res224")
weights = "int8" if name != "tiny" and gib < 24 else None
try:
  chat = vcf.VideoChat.from_pretrained(name, weights=weights)
except vcf.InputError as error:
  print(f"{error}\nThe tiny model answers instead.")
  chat = vcf.VideoChat.from_pretrained("tiny")
chat

# %% [markdown]
# ## 4. A video
#
# Write the path or the address of your own video here. (In Colab, drop the file into the *Files*
# panel on the left.) Without one, two minutes of the synthetic world are made, which is all that
# the tiny model knows.

# %%
VIDEO = ""

if not VIDEO:
  # !vcflash synth --out demo --videos 1 --frames 120:120 --seed 2026
  VIDEO = "demo/videos/0000.mp4"

# %% [markdown]
# ## 5. Watch it
#
# This is the expensive part, and it is done once. `start`, `end`, `fps` and `max_frames` choose
# frames.

# %%
began = time.perf_counter()
video = chat.watch(VIDEO, max_frames=128)
print(video.seen[0])
print(f"watched in {time.perf_counter() - began:.1f} s")

# %% [markdown]
# These are twelve of the frames that it has seen, and their seconds:

# %%
SIZE, COLUMNS = 128, 6

frames = video.frames(12, SIZE)
sheet = Image.new("RGB", (COLUMNS * SIZE, -(-len(frames) // COLUMNS) * SIZE))
for number, (seconds, pixels) in enumerate(frames):
  picture = Image.fromarray(pixels)
  ImageDraw.Draw(picture).text((4, 4), f"{seconds:.1f} s", stroke_width=2, stroke_fill="black")
  sheet.paste(picture, (number % COLUMNS * SIZE, number // COLUMNS * SIZE))
display(sheet)

# %% [markdown]
# ## 6. Ask
#
# A question costs its own words only: the video is not read again. The first one takes longer, as
# programs are compiled for it.

# %%
QUESTION = "What colour is the star?"

print(QUESTION)
for piece in video.ask(QUESTION, stream=True):
  print(piece, end="", flush=True)
reading, answering = video.prefill_seconds, video.decode_seconds
print(f"\n({reading:.2f} s to read the question, {answering:.2f} s to answer)")

# %% [markdown]
# Several questions at once are answered in one batch. Each is asked as if it were the next one.

# %%
questions = ["Which color is the hourglass?", "Is there a key in the video?"]
for question, answer in zip(questions, video.ask(questions), strict=True):
  print(question, answer)

# %% [markdown]
# `see_the_compression` shows what the model keeps of each clip, and `finetune` teaches it your
# own videos.
