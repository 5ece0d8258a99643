"""Reads branches of stored parts straight to the devices they belong on.

A stage says where each of its frozen networks is stored (`Objective.
frozen_branches`) and which shapes it has (`Objective.frozen_shapes`). Only
these arrays are read, each in the shares of its sharding, so that no device
ever holds more of an array than its sharding gives it.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints


@dataclasses.dataclass(frozen=True)
class Branch:
  """A tree of arrays in a model directory.

  Attributes:
    directory: a model directory.
    part: one of its parts.
    top: path of the tree within the part, such as "params/merger"; "" for all.
  """

  directory: str
  part: str
  top: str = ""

  def path_in_part(self, path: str) -> str:
    """Returns the path within the part of a path within the branch."""
    return "/".join(name for name in (self.top, path) if name)


def is_there(branch: Branch) -> bool:
  """Returns whether the part has any array of a branch.

  Raises:
    errors.CheckpointError: the part itself is missing or damaged.
  """
  return bool(present({"": branch}))


def present(branches: Mapping[str, Branch]) -> dict[str, Branch]:
  """Returns those branches of which their part has any array.

  Args:
    branches: by any names. Each part is opened once.

  Raises:
    errors.CheckpointError: a part itself is missing or damaged.
  """
  parts = {(branch.directory, branch.part) for branch in branches.values()}
  stored = {part: checkpoints.StoredPart(*part).arrays for part in parts}

  def has_any(branch):
    start = f"{branch.top}/" if branch.top else ""
    paths = stored[branch.directory, branch.part]
    return any(f"{path}/".startswith(start) for path in paths)

  return {name: branch for name, branch in branches.items() if has_any(branch)}


def check(branches: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
  """Checks that stored branches have all arrays, in the right shapes.

  Args:
    branches: nested dicts whose leaves are `Branch`es.
    shapes: nested dicts of (abstract) arrays, rooted where those end.

  Raises:
    errors.CheckpointError: an array is missing or of another shape.
  """
  expected = _flat(shapes)
  for (directory, part), paths in _by_part(branches, expected).items():
    stored = checkpoints.StoredPart(directory, part).arrays
    shape = lambda path, stored=stored: (
      tuple(stored[path].shape) if path in stored else None
    )
    wrong = [p for p, name in paths.items() if shape(p) != expected[name].shape]
    if wrong:
      path = wrong[0]
      raise errors.CheckpointError(
        f"{len(wrong)} arrays of the part {part} in {directory} do not fit this"
        f" config, such as {path}: {shape(path)} there,"
        f" {tuple(expected[paths[path]].shape)} here. Use the config.model that"
        " they were trained with (see part.json), or train the stage again."
      )


def load(
  branches: Mapping[str, Any], shapes: Mapping[str, Any], layout: Any = None
) -> dict[str, Any]:
  """Reads stored branches.

  Args:
    branches: nested dicts whose leaves are `Branch`es.
    shapes: nested dicts of (abstract) arrays, rooted where those end: shapes as
      stored, floats in the dtype in which they are kept.
    layout: shardings of the arrays, a tree like `shapes`. Where the whole or a
      leaf is None, arrays go to the first device of this process.

  Returns:
    A tree like `shapes` of `jax.Array`.

  Raises:
    errors.CheckpointError: an array is missing, damaged or of another shape.
  """
  check(branches, shapes)
  expected, shardings = _flat(shapes), _flat(layout or {})
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  loaded: dict[str, jax.Array] = {}
  for (directory, part), paths in _by_part(branches, expected).items():
    target = {
      path: jax.ShapeDtypeStruct(
        expected[name].shape,
        expected[name].dtype,
        sharding=shardings.get(name) or device,
      )
      for path, name in paths.items()
    }
    tree = traverse_util.unflatten_dict(target, sep="/")
    arrays = _flat(checkpoints.load_arrays(directory, part, tree))
    loaded |= {name: arrays[path] for path, name in paths.items()}
  return traverse_util.unflatten_dict(loaded, sep="/")


def check_same(
  folder: str, expected: Any, stored: Any, description: str
) -> None:
  """Checks that two trees have the same paths and shapes.

  Args:
    folder: where `stored` comes from, for the message.
    expected: tree of (abstract) arrays of this run.
    stored: tree of (abstract) arrays that was read.
    description: of the tree, for the message.

  Raises:
    errors.CheckpointError: they differ.
  """
  here, there = _shapes(expected), _shapes(stored)
  wrong = [path for path in here | there if here.get(path) != there.get(path)]
  if wrong:
    path = wrong[0]
    raise errors.CheckpointError(
      f"{len(wrong)} arrays of the {description} in {folder} do not fit this"
      f" config, such as {path}: {there.get(path)} there, {here.get(path)}"
      " here. Use the config.model that they were trained with (see part.json),"
      " or train the stage again."
    )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _flat(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _by_part(branches, names) -> dict[tuple[str, str], dict[str, str]]:
  """Groups names by part: {(directory, part): {path in the part: name}}."""
  grouped: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
  for root, branch in _flat(branches).items():
    for name in names:
      if f"{name}/".startswith(f"{root}/"):
        path = branch.path_in_part(name[len(root) + 1 :])
        grouped[branch.directory, branch.part][path] = name
  return grouped
