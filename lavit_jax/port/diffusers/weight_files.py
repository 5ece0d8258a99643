"""Names of the weights in a network's folder of diffusers, and their order.

Weights are diffusion_pytorch_model.bin or .safetensors, in one file or in
shards with an index, or, where neither is there, those of the variant `fp16`.
Where a folder has several, the official classes' choice is made: the .bin of a
U-Net, the .safetensors of an autoencoder.
"""

import pathlib
from collections.abc import Collection

from lavit_jax.port.formats import tensors

STEM = "diffusion_pytorch_model"
VARIANT = "fp16"
_SUFFIXES = {"unet": (".bin", ".safetensors"), "vae": (".safetensors", ".bin")}


def candidates(kind: str) -> list[str]:
  """Returns names of weights or of their index, in order of preference.

  Args:
    kind: "unet" or "vae".
  """
  names = []
  for variant in ("", f".{VARIANT}"):
    for suffix in _SUFFIXES[kind]:
      names += [
        f"{STEM}{variant}{suffix}",
        f"{STEM}{suffix}.index{variant}.json",
      ]
  return names


def present(folder: pathlib.Path, kind: str) -> list[str]:
  """Returns those of `candidates` that are in a folder; the first is read."""
  return [file for file in candidates(kind) if (folder / file).is_file()]


def is_index(file: str) -> bool:
  """Returns whether a file name is that of an index of shards."""
  return ".index." in file and file.endswith(".json")


def not_read(files: Collection[str], folder: str, kind: str) -> list[str]:
  """Returns weights in a folder that are not read, as others are preferred.

  Args:
    files: paths of all files in the checkpoint.
    folder: path of a network's folder.
    kind: "unet" or "vae".
  """
  here = [f for f in files if f.rpartition("/")[0] == folder]
  chosen = [n for n in candidates(kind) if f"{folder}/{n}" in here][:1]
  if not chosen:
    return []
  sharded, half = is_index(chosen[0]), VARIANT in chosen[0]
  suffix = next(end for end in _SUFFIXES[kind] if end in chosen[0])

  def is_read(name):
    if not sharded:
      return name == chosen[0]
    same = (VARIANT in name) == half and name.endswith(suffix)
    return name.startswith(STEM) and "-of-" in name and same

  return [
    path
    for path in here
    if path.endswith(tensors.SUFFIXES) and not is_read(path.rpartition("/")[2])
  ]
