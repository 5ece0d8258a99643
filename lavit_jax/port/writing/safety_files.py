"""Stable Diffusion's safety checker, exported to the folder it came from."""

import pathlib

from lavit_jax.core.storage import checkpoints
from lavit_jax.port.formats import official_layout
from lavit_jax.port.tables import safety_names
from lavit_jax.port.writing import export


def make_plan(
  model: pathlib.Path, part: checkpoints.StoredPart
) -> export.ExportPlan:
  """Plans the folder as it was, with the weights in one file.

  Args:
    model: the directory that the part belongs to.
    part: `safety`.
  """
  port = part.meta["port"]
  folder = port["place"]
  stem = "model" if port["suffix"] == ".safetensors" else "pytorch_model"
  table = safety_names.table(port["names"])
  state = export.StateFile(
    f"{folder}/{stem}",
    port["suffix"],
    tuple(export.entries(table, part)),
  )
  kept = model / official_layout.KEPT_FOLDER / folder
  files = {
    f"{folder}/{path.name}": path.read_bytes()
    for path in sorted(kept.iterdir())
  }
  return export.ExportPlan((state,), files)
