"""The plan of an export: arrays of a model directory as tensors of files."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.port.formats import tensor_files
from lavit_jax.port.tables import names, rows


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of an exported file.

  Attributes:
    spec: its name, shape and dtype in the file.
    part: the part that holds its values, or None.
    path: of the array in the part.
    layer: its number in a stacked array, or None.
    transform: of `rows.TRANSFORMS`, applied backward.
    value: returns the values of a tensor that no part holds.
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
    stem: path under the export, without suffix.
    suffix: ".bin" or ".safetensors".
    entries: its tensors.
    limit: bytes a shard; 0 for one file of any size.
    bare: whether a .bin holds its single tensor and not a dict.
  """

  stem: str
  suffix: str
  entries: tuple[Entry, ...]
  limit: int = 0
  bare: bool = False


@dataclasses.dataclass(frozen=True)
class ExportPlan:
  """Everything that an export will write.

  Attributes:
    states: files of tensors.
    files: small files, by path under the export.
    notes: sentences for the user.
  """

  states: tuple[StateFile, ...] = ()
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()


def joined(plans: Iterable[ExportPlan]) -> ExportPlan:
  """Returns several plans as one."""
  states: list[StateFile] = []
  files: dict[str, bytes] = {}
  notes: list[str] = []
  for plan in plans:
    states += plan.states
    files |= plan.files
    notes += plan.notes
  return ExportPlan(tuple(states), files, tuple(notes))


def entries(
  table: rows.Table,
  part: checkpoints.StoredPart,
  *,
  root: str = "",
  prefix: str = "",
  vocab_size: int | None = None,
) -> list[Entry]:
  """Returns the tensors of a table in the order of a state_dict.

  Args:
    table: official names and paths.
    part: holds arrays at `root` + the table's paths.
    root: such as "llm/".
    prefix: put before every official name.
    vocab_size: number to which padded rows of the vocabulary are cut.

  Raises:
    errors.CheckpointError: the part lacks an array of the table.
  """
  paths = [row.path for row in table]
  if missing := [p for p in paths if part.arrays.get(root + p) is None]:
    raise errors.CheckpointError(
      f"The part {part.meta.get('part')} has no {', '.join(missing)} under"
      f" {root or 'its root'!r}, which this export needs."
    )
  flat = {path: part.arrays[root + path] for path in paths}
  tree = traverse_util.unflatten_dict(flat, sep="/")
  shapes = names.to_official(table, tree, vocab_size)
  dtypes = part.meta.get("port", {}).get("dtypes", {})
  result = []
  for row in table:
    stored = flat[row.path]
    depth = stored.shape[0] if rows.is_stacked(row) else 1
    for i, name in enumerate(rows.official_names(row, depth)):
      dtype = np.dtype(dtypes.get(name, stored.dtype))
      spec = tensor_files.Spec(prefix + name, shapes[name].shape, dtype)
      layer = i if rows.is_stacked(row) else None
      result.append(Entry(spec, part, root + row.path, layer, row.transform))
  return _by_layer(result)


def present_entries(
  table: rows.Table,
  part: checkpoints.StoredPart,
  *,
  root: str = "",
  prefix: str = "",
) -> list[Entry]:
  """Returns the tensors of those rows of a table that the part has.

  Arguments are those of `entries`.
  """
  present = tuple(row for row in table if root + row.path in part.arrays)
  return entries(present, part, root=root, prefix=prefix)


def _by_layer(unsorted: list[Entry]) -> list[Entry]:
  """Sorts entries of stacked rows by layer, as a state_dict has them.

  Entries before the first stacked row stay first, those after the last one
  stay last.
  """
  stacked = [i for i, entry in enumerate(unsorted) if entry.layer is not None]
  if not stacked:
    return unsorted
  first, end = stacked[0], stacked[-1] + 1
  middle = sorted(unsorted[first:end], key=lambda entry: entry.layer or 0)
  return unsorted[:first] + middle + unsorted[end:]
