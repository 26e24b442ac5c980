"""Packaging of videochat_flash_jax.

Lower bounds are the oldest versions with which the tests pass (`make test-lowest`). Upper bounds
stop before the next release that may break an interface.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = ROOT / "videochat_flash_jax"
VERSION = re.search(r'^__version__ = "(.+)"$', (PACKAGE / "__init__.py").read_text(), re.M).group(1)
JAX = ">=0.9.2,<0.13"
TORCH = "torch>=2.6,<3"  # 2.6: the first that refuses to unpickle code by default

setup(
  name="videochat_flash_jax",
  version=VERSION,
  description="VideoChat-Flash in JAX: hours of video at 16 tokens a frame, on TPU, GPU and CPU.",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  project_urls={
    "Paper": "https://arxiv.org/abs/2501.00574",
    "Original code": "https://github.com/OpenGVLab/VideoChat-Flash",
    "Released weights": "https://huggingface.co/OpenGVLab",
  },
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["videochat_flash_jax", "videochat_flash_jax.*"]),
  package_data={"videochat_flash_jax": ["assets/**/*", "py.typed"]},
  install_requires=[
    f"jax{JAX}",
    "aiohttp>=3.9,<4",  # with which fsspec reads http
    "av>=17.1,<20",
    "flax>=0.12.6,<0.13",
    "fsspec>=2025.3,<2027",
    "grain>=0.2.16,<0.3",
    "huggingface_hub>=1.0,<3",
    "jaxtyping>=0.3.7,<0.4",
    "ml-collections>=1.1,<2",
    "numpy>=2.1,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.11.38,<0.13",
    "pillow>=10.1,<14",
    "prompt_toolkit>=3.0.40,<4",
    "pyyaml>=6.0.2,<7",
    "qwix>=0.1.5,<0.2",
    "safetensors>=0.6.1,<0.9",
    "sentencepiece>=0.2.0,!=0.2.1,<0.3",  # 0.2.1 crashes beside protobuf
    "tokenizers>=0.22,<0.24",
    "tensorboardX>=2.6.2.2,<3",
    "tensorstore>=0.1.84,<0.2",
    "tqdm>=4.67,<5",
  ],
  extras_require={
    "test": [
      "beartype>=0.23,<0.24",
      "build>=1.2,<2",
      "pexpect>=4.9,<5",
      "pytest>=9.2,<10",
      "pytest-xdist>=3.8,<4",
      "ipykernel>=7,<8",
      "jupytext>=1.19,<2",
      "nbclient>=0.11,<0.12",
      "ruff==0.17.6",
    ],
    # Annotations and media at gs:// and s3://.
    "gcs": ["gcsfs>=2026.8.2,<2027"],
    "s3": ["s3fs>=2026.8,<2027"],
    # Never bare libtpu or CUDA: only jax knows which of them fit it.
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda12]{JAX}"],
    "convert": [TORCH],
    "bench": [
      TORCH,
      "transformers>=5.23,<6",
      "decord==0.6.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
    ],
  },
  entry_points={"console_scripts": ["vcflash = videochat_flash_jax.cli.main:main"]},
)
