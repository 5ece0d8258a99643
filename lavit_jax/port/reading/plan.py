"""What an import will do, known and checked before a byte is written.

An `Array` is one array of a part: which tensors make it, and how. `Problems`
gathers everything that is wrong with a source, over all its files, for one
error that lists all of it.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lavit_jax.core import errors
from lavit_jax.port.formats import tensors
from lavit_jax.port.reading import looks
from lavit_jax.port.tables import names


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a part.

  Attributes:
    path: in the tree of the part, with slashes.
    transform: a key of `names.TRANSFORMS`, done to each tensor.
    sources: one tensor, or one a layer.
    stacked: whether a first axis goes over the layers.
    shape: of the whole array, rows of the vocabulary padded.
    finish: called with the array once its tensors are in it, or None.
  """

  path: str
  transform: str
  sources: tuple[tensors.Tensor, ...]
  stacked: bool
  shape: tuple[int, ...]
  finish: Callable[[np.ndarray], None] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of the model directory that is to be made."""

  name: str
  arrays: tuple[Array, ...]
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ImportPlan:
  """A whole import.

  Attributes:
    source: what kind of source it is, as `meta["port"]["source"]` names it.
    files: small files to write, by path in the model directory.
    kept: by part, tensors that nothing here needs, by the names under which
      an export will find them again.
    notes: sentences for the user.
  """

  source: str
  parts: tuple[Part, ...]
  files: Mapping[str, bytes]
  kept: Mapping[str, Mapping[str, tensors.Tensor]] = dataclasses.field(
    default_factory=dict
  )
  notes: tuple[str, ...] = ()


class Problems:
  """Everything that is wrong with a source; `check` raises all of it."""

  def __init__(self, where: str):
    self._where = where
    self._found: dict[str, list[str]] = {}

  def add(self, kind: str, what: str) -> None:
    """Notes one problem, `kind` such as "missing"; the same one only once."""
    listed = self._found.setdefault(kind, [])
    if what not in listed:
      listed.append(what)

  def check(self) -> None:
    """Raises CheckpointError if there was any problem, naming every one."""
    if not self._found:
      return
    text = "; ".join(
      f"{kind}: {', '.join(listed)}" for kind, listed in self._found.items()
    )
    raise errors.CheckpointError(
      f"{self._where} does not fit. {text}. Nothing was written. Check that the"
      " files belong together and are complete; a bias or a norm that is"
      " missing on purpose can be named with --allow-missing."
    )


def neutral(row: names.Row) -> float | None:
  """The value with which a missing tensor changes nothing, if it has one.

  0 for a bias, 1 for the scale of a norm, 0 for EVA's `head`, which LaVIT
  does not use. Kernels, embeddings and codes have none.
  """
  last = row.ours.rsplit("/", 1)[-1]
  if last == "scale":
    return 1.0
  if last.endswith("bias") or row.ours == "head/kernel":
    return 0.0
  return None


def arrays_of(
  table: names.Table,
  found: Mapping[str, tensors.Tensor],
  tree: Mapping[str, Any] | None,
  problems: Problems,
  *,
  label: str,
  rows: int | None = None,
  allow: Collection[str] = (),
  ours: Callable[[str], str] = lambda path: path,
) -> list[Array]:
  """The arrays of one table; what does not fit goes to `problems`.

  Args:
    table: official names and paths.
    found: the tensors of the file, or of several that make up the table.
    tree: abstract arrays by the table's paths; None where the sizes could
      not be told, and only names are compared.
    problems: takes what is missing, not used or of a wrong shape.
    label: how messages name the file.
    rows: rows of the vocabulary in the file.
    allow: official names that may be missing, see `neutral`.
    ours: makes a table's path the path in the part.

  Raises:
    errors.CheckpointError: the names are of another kind of checkpoint.
  """
  if said := looks.of_names(found):
    raise errors.CheckpointError(f"{label} looks like {said}.")
  given = {n: t for n, t in found.items() if not names.is_unused(table, n)}
  flat = names.flatten(tree or {})
  depth = _depth(table, given, flat)
  wanted = {n: row for row in table for n in names.names_of(row, depth)}
  _require_some(given, wanted, label)
  for name in given:
    if name not in wanted:
      problems.add("not used", f"{label}: {name}")
  lacking = [name for name in wanted if name not in given]
  for name in lacking:
    if name not in allow:
      problems.add("missing", f"{label}: {name}")
  if tree is None:
    return []
  shapes = {
    name: value.shape
    for name, value in names.to_official(table, tree, rows=rows).items()
  }
  dtypes = collections.Counter(tensor.dtype for tensor in given.values())
  usual = dtypes.most_common(1)[0][0] if dtypes else np.dtype(np.float32)
  for name in lacking:
    if name in allow:
      value = neutral(wanted[name])
      given[name] = _constant(name, label, shapes[name], value, usual)
  _check_shapes(given, shapes, label, problems)
  return [
    Array(
      path=ours(row.ours),
      transform=row.transform,
      sources=tuple(given[n] for n in names.names_of(row, depth) if n in given),
      stacked=names.is_stacked(row),
      shape=tuple(flat[row.ours].shape),
    )
    for row in table
  ]


def _require_some(given, wanted, label):
  """One line instead of two lists where no name at all is known."""
  if not given or any(name in wanted for name in given):
    return
  first = {name.partition(".")[0] for name in given}
  shared = f", all under {first.pop()!r}," if len(first) == 1 else ""
  raise errors.CheckpointError(
    f"{label} has none of the tensors that belong there: its {len(given)}"
    f" names{shared} are such as {_some(given)}; expected names such as"
    f" {_some(wanted)}. It is a file of another network, or its names have been"
    " changed."
  )


def _some(listed):
  return ", ".join(list(listed)[:3])


def _depth(table, given, flat):
  """Layers: as many as the config says, else as the names show."""
  stacked = next((r.ours for r in table if names.is_stacked(r)), None)
  if stacked in flat:
    return flat[stacked].shape[0]
  return names.depth_of(table, given)


def _check_shapes(given, shapes, label, problems):
  for name, tensor in given.items():
    wanted = shapes.get(name)
    if wanted is not None and tensor.shape != wanted:
      problems.add(
        "wrong shape",
        f"{label}: {name} {list(tensor.shape)} instead of {list(wanted)}",
      )


def _constant(name, label, shape, value, dtype):
  read = lambda: np.broadcast_to(np.asarray(value, dtype), shape)
  return tensors.Tensor(name, f"{label} (missing)", shape, dtype, read)


def check_allowed(allow: Collection[str], tables: Collection[names.Table]):
  """Raises UsageError for names that are none or have no neutral value.

  Args:
    allow: names given to --allow-missing.
    tables: of all files that are imported.
  """
  patterns = [row for table in tables for row in table]
  for name in allow:
    row = next((r for r in patterns if _matches(r, name)), None)
    if row is None:
      raise errors.UsageError(
        f"--allow-missing {name}: no file that is imported has such a tensor."
        " Give names as the error lists them, without the file."
      )
    if neutral(row) is None:
      raise errors.UsageError(
        f"--allow-missing {name}: only biases (then 0), scales of norms (then"
        " 1) and EVA's unused head may be missing; nothing can stand in for"
        " this tensor. Get the complete file."
      )


def _matches(row, name):
  head, _, tail = row.official.partition("{i}")
  if not tail:
    return name == row.official
  middle = name.removeprefix(head).removesuffix(tail)
  return name == f"{head}{middle}{tail}" and middle.isdigit()
