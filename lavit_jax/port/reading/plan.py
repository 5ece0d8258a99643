"""The plan of an import, complete and checked before anything is written.

An `Array` is one array of a part: the tensors that it is made of, and how.
`Problems` collects everything that is wrong with a source, over all its files,
for one error that lists all of it.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.port.formats import tensors
from lavit_jax.port.reading import unsupported
from lavit_jax.port.tables import names, rows


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a part.

  Attributes:
    path: in the tree of the part, with slashes.
    transform: a key of `rows.TRANSFORMS`, applied to each tensor.
    sources: one tensor, or one a layer.
    stacked: whether the layers are stacked on a first axis.
    shape: of the array, with padded rows of the vocabulary.
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
  """One part of the future model directory."""

  name: str
  arrays: tuple[Array, ...]
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ImportPlan:
  """Everything that an import will write.

  Attributes:
    source: the kind of source, as in `meta["port"]["source"]`.
    parts: in the order in which they are written.
    files: small files, by path in the model directory.
    kept: by part, tensors that nothing here needs, under the names by which
      an export will find them.
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

  def __init__(self, source: str):
    """Starts without problems.

    Args:
      source: how messages name the source.
    """
    self._source = source
    self._by_kind: dict[str, list[str]] = {}

  def add(self, kind: str, problem: str) -> None:
    """Records a problem, unless it is recorded already.

    Args:
      kind: such as "missing".
      problem: the file and the tensor, or a short sentence.
    """
    problems = self._by_kind.setdefault(kind, [])
    if problem not in problems:
      problems.append(problem)

  def check(self) -> None:
    """Raises CheckpointError if there is any problem, listing all of them."""
    if not self._by_kind:
      return
    text = "; ".join(
      f"{kind}: {', '.join(problems)}"
      for kind, problems in self._by_kind.items()
    )
    raise errors.CheckpointError(
      f"{self._source} cannot be imported. {text}. Nothing was written. Check"
      " that the files belong together and are complete; a bias or a norm that"
      " is missing on purpose can be named with --allow-missing."
    )


def neutral(row: rows.Row) -> float | None:
  """Returns the value of a missing tensor that changes nothing, if it has one.

  It is 0 for a bias, 1 for the scale of a norm, and 0 for EVA's `head`, which
  LaVIT does not use. Kernels, embeddings and codes have none.
  """
  last = row.path.rsplit("/", 1)[-1]
  if last == "scale":
    return 1.0
  if last.endswith("bias") or row.path == "head/kernel":
    return 0.0
  return None


def arrays_of(
  table: rows.Table,
  by_name: Mapping[str, tensors.Tensor],
  tree: Mapping[str, Any] | None,
  problems: Problems,
  *,
  label: str,
  vocab_size: int | None = None,
  allow: Collection[str] = (),
  root: str = "",
) -> list[Array]:
  """Plans the arrays of one table.

  Args:
    table: official names and paths.
    by_name: the tensors of the file, or of the files that make up the table.
    tree: abstract arrays at the table's paths; None where sizes are unknown,
      so that only names can be compared.
    problems: receives what is missing, not used or of a wrong shape.
    label: how messages name the file.
    vocab_size: rows of the vocabulary in the file.
    allow: official names that may be missing, see `neutral`.
    root: put before every path, such as "llm/".

  Raises:
    errors.CheckpointError: the names are of another kind of checkpoint.
  """
  flat = traverse_util.flatten_dict(tree or {}, sep="/")
  used = {n: t for n, t in by_name.items() if not names.is_unused(table, n)}
  depth = _depth(table, used, flat)
  expected = {n: row for row in table for n in rows.official_names(row, depth)}
  _check_names(by_name, used, expected, label, allow, problems)
  if tree is None:
    return []
  shapes = {
    name: value.shape
    for name, value in names.to_official(table, tree, vocab_size).items()
  }
  used |= _replacements(used, expected, shapes, label, allow)
  _check_shapes(used, shapes, label, problems)
  return [
    Array(
      path=root + row.path,
      transform=row.transform,
      sources=tuple(
        used[n] for n in rows.official_names(row, depth) if n in used
      ),
      stacked=rows.is_stacked(row),
      shape=tuple(flat[row.path].shape),
    )
    for row in table
  ]


def _depth(table, used, flat):
  """Returns the number of layers in the tree, or else in the names."""
  stacked = next((r.path for r in table if rows.is_stacked(r)), None)
  if stacked in flat:
    return flat[stacked].shape[0]
  return rows.depth_of(table, used)


def _check_names(by_name, used, expected, label, allow, problems):
  if description := unsupported.describe_names(by_name):
    raise errors.CheckpointError(f"{label} looks like {description}.")
  _require_overlap(used, expected, label)
  for name in used:
    if name not in expected:
      problems.add("not used", f"{label}: {name}")
  for name in expected:
    if name not in used and name not in allow:
      problems.add("missing", f"{label}: {name}")


def _require_overlap(used, expected, label):
  """Raises one sentence, instead of two lists, where no name is known."""
  if not used or any(name in expected for name in used):
    return
  first = {name.partition(".")[0] for name in used}
  shared = f", all under {first.pop()!r}," if len(first) == 1 else ""
  raise errors.CheckpointError(
    f"{label} has none of the tensors that belong there: its {len(used)}"
    f" names{shared} are such as {_examples(used)}; expected names such as"
    f" {_examples(expected)}. It is a file of another network, or its names"
    " have been changed."
  )


def _examples(listed):
  return ", ".join(list(listed)[:3])


def _replacements(used, expected, shapes, label, allow):
  """Returns constant tensors for the missing names that are allowed."""
  dtypes = collections.Counter(tensor.dtype for tensor in used.values())
  usual = dtypes.most_common(1)[0][0] if dtypes else np.dtype(np.float32)
  return {
    name: _constant(name, label, shapes[name], neutral(row), usual)
    for name, row in expected.items()
    if name not in used and name in allow
  }


def _constant(name, label, shape, value, dtype):
  read = lambda: np.broadcast_to(np.asarray(value, dtype), shape)
  return tensors.Tensor(name, f"{label} (missing)", shape, dtype, read)


def _check_shapes(used, shapes, label, problems):
  for name, tensor in used.items():
    expected = shapes.get(name)
    if expected is not None and tensor.shape != expected:
      problems.add(
        "wrong shape",
        f"{label}: {name} {list(tensor.shape)} instead of {list(expected)}",
      )


def check_allowed(
  allow: Collection[str], tables: Collection[rows.Table]
) -> None:
  """Checks the names that the user allows to be missing.

  Args:
    allow: official names.
    tables: of all files that are imported.

  Raises:
    errors.UsageError: a name is in no table or has no neutral value.
  """
  candidates = rows.joined(tables)
  for name in allow:
    row = next((r for r in candidates if _matches(r, name)), None)
    if row is None:
      raise errors.UsageError(
        f"--allow-missing {name}: no file that is imported has such a tensor."
        " Give names as the error lists them, without the file."
      )
    if neutral(row) is None:
      raise errors.UsageError(
        f"--allow-missing {name}: only biases (which become 0), scales of norms"
        " (which become 1) and EVA's unused head may be missing; nothing can"
        " replace this tensor. Get the complete file."
      )


def _matches(row, name):
  head, _, tail = row.official.partition("{i}")
  if not tail:
    return name == row.official
  middle = name.removeprefix(head).removesuffix(tail)
  return name == f"{head}{middle}{tail}" and middle.isdigit()
