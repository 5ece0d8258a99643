"""Stable Diffusion's safety checker as the folder that it came from."""

import pathlib

from lavit_jax.core.storage import checkpoints
from lavit_jax.port.tables import safety_names
from lavit_jax.port.writing import export


def make(
  model: pathlib.Path, part: checkpoints.StoredPart, kept: str
) -> export.Export:
  """The folder as it was, one file of weights.

  Args:
    model: the directory that the part is of.
    part: `safety`.
    kept: folder of the model in which an import kept small files.
  """
  port = part.meta["port"]
  place = port["place"]
  stem = "model" if port["suffix"] == ".safetensors" else "pytorch_model"
  table = safety_names.table(port["names"])
  state = export.StateFile(
    f"{place}/{stem}",
    port["suffix"],
    tuple(export.entries(table, part)),
  )
  files = {
    f"{place}/{path.name}": path.read_bytes()
    for path in sorted((model / kept / place).iterdir())
  }
  return export.Export((state,), files)
