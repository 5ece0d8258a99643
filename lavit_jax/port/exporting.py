"""A model directory becomes PyTorch files: `lavit port export`.

`official` writes the layout that `official.py` reads; `huggingface` writes

  llm/                        a LlamaForCausalLM folder
  visual_tokenizer.safetensors  see `hugging_face.py` for its names
  visual_tokenizer.json       its sizes
  lowres_pixels/, highres_pixels/   folders of diffusers: unet, vae, scheduler

Both go through the tables of `names.py`. Arrays are read one at a time into
mapped files, so memory holds about one of them.
"""

import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import files
from lavit_jax.infer import pipeline
from lavit_jax.port.formats import folder, tensor_files
from lavit_jax.port.tables import names
from lavit_jax.port.writing import export, hugging_face, official_files

_WRITERS = {"official": official_files.make, "huggingface": hugging_face.make}
FORMATS = tuple(_WRITERS)
_SCRATCH = ".scratch"


def run(
  model, destination, *, format: str, quiet: bool = False
) -> dict[str, Any]:
  """Writes a model directory as PyTorch files.

  Args:
    model: a directory, or "tiny".
    destination: a directory that is new or empty.
    format: one of FORMATS.
    quiet: show no progress.

  Returns:
    JSON-able: format, directory, files (tensors, bytes), notes.

  Raises:
    errors.UsageError: arguments that do not fit, `destination` is taken.
    errors.CheckpointError: the format cannot hold this model.
  """
  files.require_local(destination, "an export")
  if format not in _WRITERS:
    raise errors.UsageError(
      f"--format {format}: expected one of {', '.join(FORMATS)}."
    )
  source = pipeline.resolve(model)
  folder.require_new(destination)
  made = _WRITERS[format](source)
  total = sum(len(state.entries) for state in made.states)
  stream = io.StringIO() if quiet else None
  done = itertools.count(1)
  report = {}
  with folder.building(destination) as partial:
    with progress.Progress(total, label="export", stream=stream) as bar:
      for state in made.states:
        report |= _write_state(partial, state, lambda: bar.update(next(done)))
    for name, data in made.files.items():
      path = partial / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return {
    "format": format,
    "directory": str(destination),
    "files": report,
    "notes": list(made.notes),
  }


def _write_state(partial, state, tick) -> dict[str, Any]:
  """Writes one state, in shards if need be; (tensors, bytes) by file."""
  specs = [entry.spec for entry in state.entries]
  size = state.limit or sum(spec.nbytes for spec in specs) + 1
  stem = pathlib.PurePath(state.stem)
  target = partial / stem.parent
  target.mkdir(parents=True, exist_ok=True)
  files = tensor_files.shards(specs, size, stem.name, state.suffix)
  scratch = partial / _SCRATCH
  scratch.mkdir()
  views = {}
  for file, group in files.items():
    if state.suffix == ".safetensors":
      views |= tensor_files.map_safetensors(target / file, group)
    else:
      views |= tensor_files.map_scratch(scratch / file, group)
  _fill(state.entries, views, tick)
  if state.suffix != ".safetensors":
    for file, group in files.items():
      arrays = {spec.name: views.pop(spec.name) for spec in group}
      content = next(iter(arrays.values())) if state.bare else arrays
      tensor_files.save_torch(target / file, content)
      (scratch / file).unlink()
  tensor_files.remove_folder(scratch)
  if len(files) > 1:
    index = target / f"{stem.name}{state.suffix}.index.json"
    index.write_bytes(tensor_files.index_json(files))
  return {
    str(stem.parent / file): {
      "tensors": len(group),
      "bytes": sum(spec.nbytes for spec in group),
    }
    for file, group in files.items()
  }


def _fill(found: Sequence[export.Entry], views, tick):
  """Puts values into the views; every stored array is read once."""
  groups: dict[tuple, list[export.Entry]] = {}
  for entry in found:
    groups.setdefault((id(entry.part), entry.path), []).append(entry)
  for group in groups.values():
    part = group[0].part
    array = part.read(group[0].path) if part is not None else None
    for entry in group:
      values = array if entry.layer is None else array[entry.layer]
      if entry.value is not None:
        values = entry.value()
      elif entry.transform == "rows":
        values = values[: entry.spec.shape[0]]
      else:
        values = names.TRANSFORMS[entry.transform].backward(values)
      views[entry.spec.name][...] = values
      tick()
