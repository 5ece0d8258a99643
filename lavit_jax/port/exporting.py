"""A model directory becomes PyTorch files: `lavit port export`.

`official` writes the layout that `official.py` reads; `huggingface` writes

  llm/                        a LlamaForCausalLM folder
  visual_tokenizer.safetensors  see `hugging_face.py` for its names
  visual_tokenizer.json       its sizes
  lowres_pixels/, highres_pixels/   folders of diffusers: unet, vae, scheduler

Both go through the tables of `names.py`. Arrays are read one at a time into
mapped files, so memory holds about one of them.
"""

import dataclasses
import io
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.core import errors, progress
from lavit_jax.core.storage import checkpoints, files
from lavit_jax.infer import pipeline
from lavit_jax.port.formats import folder, tensor_files
from lavit_jax.port.tables import names

FORMATS = ("official", "huggingface")
_SCRATCH = ".scratch"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of an exported file.

  Attributes:
    spec: its name, shape and dtype in the file.
    part: where its values are: a part and a path in it, or None.
    layer: which layer of a stacked array, or None.
    transform: of `names.TRANSFORMS`, done backward.
    value: gives the values where no part has them.
  """

  spec: tensor_files.Spec
  part: checkpoints.StoredPart | None = None
  path: str = ""
  layer: int | None = None
  transform: str = "same"
  value: Callable[[], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class StateFile:
  """A file of tensors, or several shards of it.

  Attributes:
    stem: path under the export without suffix.
    suffix: ".bin" or ".safetensors".
    limit: bytes a shard, 0 for one file whatever its size.
    bare: a .bin of its one tensor alone, not of a dict.
  """

  stem: str
  suffix: str
  entries: tuple[Entry, ...]
  limit: int = 0
  bare: bool = False


@dataclasses.dataclass(frozen=True)
class Export:
  """All that is to be written."""

  states: tuple[StateFile, ...]
  files: Mapping[str, bytes]
  notes: tuple[str, ...] = ()


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
  from lavit_jax.port.writing import hugging_face, official_files

  writers = {
    "official": official_files.make,
    "huggingface": hugging_face.make,
  }
  if format not in writers:
    raise errors.UsageError(
      f"--format {format}: expected one of {', '.join(FORMATS)}."
    )
  source = pipeline.resolve(model)
  folder.require_new(destination)
  export = writers[format](source)
  total = sum(len(state.entries) for state in export.states)
  stream = io.StringIO() if quiet else None
  done = itertools.count(1)
  report = {}
  with folder.building(destination) as partial:
    with progress.Progress(total, label="export", stream=stream) as bar:
      for state in export.states:
        report |= _write_state(partial, state, lambda: bar.update(next(done)))
    for name, data in export.files.items():
      path = partial / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return {
    "format": format,
    "directory": str(destination),
    "files": report,
    "notes": list(export.notes),
  }


def entries(
  table: names.Table,
  part: checkpoints.StoredPart,
  *,
  root: str = "",
  prefix: str = "",
  rows: int | None = None,
) -> list[Entry]:
  """The tensors of a table, as a part has them.

  Args:
    table: official names and paths.
    part: holds arrays at `root` + the table's paths.
    root: such as "llm/".
    prefix: put before every official name.
    rows: of the vocabulary, to which padded rows are cut.

  Raises:
    errors.CheckpointError: an array that the table names is not in the part.
  """
  flat = {row.ours: part.arrays.get(root + row.ours) for row in table}
  if missing := [path for path, leaf in flat.items() if leaf is None]:
    raise errors.CheckpointError(
      f"The part {part.meta.get('part')} has no {', '.join(missing)} under"
      f" {root or 'its root'!r}; this export needs all of it."
    )
  shapes = names.to_official(table, names.unflatten(flat), rows=rows)
  dtypes = part.meta.get("port", {}).get("dtypes", {})
  found = []
  for row in table:
    stored = flat[row.ours]
    depth = stored.shape[0] if names.is_stacked(row) else 1
    for i, name in enumerate(names.names_of(row, depth)):
      dtype = np.dtype(dtypes.get(name, stored.dtype))
      spec = tensor_files.Spec(prefix + name, shapes[name].shape, dtype)
      layer = i if names.is_stacked(row) else None
      found.append(Entry(spec, part, root + row.ours, layer, row.transform))
  return in_order(found)


def in_order(found: Iterable[Entry]) -> list[Entry]:
  """Entries layer by layer, as a state_dict has them.

  The table goes row by row; what stands before its stacked rows stays first,
  and what follows them last.
  """
  found = list(found)
  places = [i for i, e in enumerate(found) if e.layer is not None]
  if not places:
    return found
  first, last = places[0], places[-1]
  middle = sorted(found[first : last + 1], key=lambda e: e.layer or 0)
  return found[:first] + middle + found[last + 1 :]


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


def _fill(found: Sequence[Entry], views, tick):
  """Puts values into the views; every stored array is read once."""
  groups: dict[tuple, list[Entry]] = {}
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
