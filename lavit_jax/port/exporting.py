"""Exports a model directory as PyTorch files: `lavit port export`.

The format `official` is the layout that `official.py` reads; `huggingface` is

  llm/                          a LlamaForCausalLM folder
  visual_tokenizer.safetensors  see `hugging_face.py` for its names
  visual_tokenizer.json         its sizes
  lowres_pixels/, highres_pixels/   folders of diffusers: unet, vae, scheduler

Both use the tables of `names.py`. Arrays are read one at a time and written to
mapped files, so memory holds about one of them.
"""

import io
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files
from lavit_jax.infer import pipeline
from lavit_jax.port.formats import folder, tensor_files
from lavit_jax.port.tables import rows
from lavit_jax.port.writing import export, hugging_face, official_files

_PLANNERS = {
  "official": official_files.make_plan,
  "huggingface": hugging_face.make_plan,
}
FORMATS = tuple(_PLANNERS)
_SCRATCH = ".scratch"


def run(
  model: str | os.PathLike,
  destination: str | os.PathLike,
  *,
  format: str,
  quiet: bool = False,
) -> dict[str, Any]:
  """Writes a model directory as PyTorch files.

  Args:
    model: a directory, or "tiny".
    destination: a new or empty directory.
    format: one of FORMATS.
    quiet: whether to hide the progress.

  Returns:
    A JSON object: format, directory, files (tensors, bytes), notes.

  Raises:
    errors.UsageError: arguments are invalid, or `destination` is not empty.
    errors.CheckpointError: the format cannot hold this model.
  """
  files.require_local(destination, "an export")
  if format not in _PLANNERS:
    raise errors.UsageError(
      f"--format {format}: expected one of {', '.join(FORMATS)}."
    )
  source = pipeline.resolve(model)
  folder.require_new(destination)
  plan = _PLANNERS[format](source)
  total = sum(len(state.entries) for state in plan.states)
  stream = io.StringIO() if quiet else None
  done = itertools.count(1)
  report: dict[str, Any] = {}
  with folder.building(destination) as partial:
    with progress.Progress(total, label="export", stream=stream) as bar:
      for state in plan.states:
        report |= _write_state(partial, state, lambda: bar.update(next(done)))
    folder.write_files(partial, plan.files)
  return {
    "format": format,
    "directory": str(destination),
    "files": report,
    "notes": list(plan.notes),
  }


def _write_state(
  partial: pathlib.Path, state: export.StateFile, tick: Callable[[], None]
) -> dict[str, Any]:
  """Writes one state, in shards if it is larger than its limit.

  Args:
    partial: the root of the export.
    state: to write.
    tick: called after each tensor.

  Returns:
    Tensors and bytes, by file.
  """
  specs = [entry.spec for entry in state.entries]
  size = state.limit or sum(spec.nbytes for spec in specs) + 1
  stem = pathlib.PurePath(state.stem)
  target = partial / stem.parent
  target.mkdir(parents=True, exist_ok=True)
  shards = tensor_files.shards(specs, size, stem.name, state.suffix)
  scratch = partial / _SCRATCH
  scratch.mkdir()
  views: dict[str, np.ndarray] = {}
  for file, group in shards.items():
    if state.suffix == ".safetensors":
      views |= tensor_files.map_safetensors(target / file, group)
    else:
      views |= tensor_files.map_scratch(scratch / file, group)
  _fill(state.entries, views, tick)
  if state.suffix != ".safetensors":
    for file, group in shards.items():
      arrays = {spec.name: views.pop(spec.name) for spec in group}
      content = next(iter(arrays.values())) if state.bare else arrays
      tensor_files.save_torch(target / file, content)
      (scratch / file).unlink()
  tensor_files.remove_folder(scratch)
  if len(shards) > 1:
    index = target / f"{stem.name}{state.suffix}.index.json"
    index.write_bytes(tensor_files.index_json(shards))
  return {
    str(stem.parent / file): {
      "tensors": len(group),
      "bytes": sum(spec.nbytes for spec in group),
    }
    for file, group in shards.items()
  }


def _fill(entries: Sequence[export.Entry], views, tick):
  """Writes values to the views; every stored array is read once."""
  groups: dict[tuple, list[export.Entry]] = {}
  for entry in entries:
    groups.setdefault((id(entry.part), entry.path), []).append(entry)
  for group in groups.values():
    part = group[0].part
    array = part.read(group[0].path) if part is not None else None
    for entry in group:
      views[entry.spec.name][...] = _values(entry, array)
      tick()


def _values(entry: export.Entry, array: np.ndarray | None) -> np.ndarray:
  """Returns the values of a tensor.

  Args:
    entry: the tensor.
    array: the stored array at its path; None if no part holds the tensor.
  """
  if entry.value is not None:
    return entry.value()
  assert array is not None
  values = array if entry.layer is None else array[entry.layer]
  if entry.transform == "rows":
    return values[: entry.spec.shape[0]]
  return rows.TRANSFORMS[entry.transform].backward(values)
