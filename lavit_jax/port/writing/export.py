"""Arrays of a model directory as tensors of files that are to be written."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.port.formats import tensor_files
from lavit_jax.port.tables import names


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
