"""Branches of the parts on disk, read straight to where they belong.

A stage says where each of its frozen networks lies (`Objective.
frozen_branches`) and what it looks like (`Objective.frozen_shapes`). Only what
is asked for is read, each array in the shares of its sharding, and no device
ever holds a whole that its sharding does not give it.
"""

import collections
import dataclasses
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
    top: path of the tree within the part, such as "params/merger"; "": all.
  """

  directory: str
  part: str
  top: str = ""

  def inside(self, path: str) -> str:
    """The path within the part of a path within the branch."""
    return "/".join(name for name in (self.top, path) if name)


def is_there(branch: Branch) -> bool:
  """Whether the part has any array of a branch.

  Raises:
    errors.CheckpointError: the part itself is missing or damaged.
  """
  arrays = checkpoints.StoredPart(branch.directory, branch.part).arrays
  start = f"{branch.top}/" if branch.top else ""
  return any(f"{path}/".startswith(start) for path in arrays)


def check(branches, wanted) -> None:
  """Raises CheckpointError unless all is there, in the shapes that are wanted.

  Args:
    branches: nested dicts whose leaves are `Branch`es.
    wanted: nested dicts of (abstract) arrays that go on where those end.
  """
  wanted = _flat(wanted)
  for (directory, part), paths in _by_part(branches, wanted).items():
    found = checkpoints.StoredPart(directory, part).arrays
    shape = lambda path, found=found: (
      tuple(found[path].shape) if path in found else None
    )
    wrong = [p for p, ours in paths.items() if shape(p) != wanted[ours].shape]
    if wrong:
      path = wrong[0]
      raise errors.CheckpointError(
        f"{len(wrong)} arrays of the part {part} in {directory} do not fit this"
        f" config, such as {path}: {shape(path)} there,"
        f" {tuple(wanted[paths[path]].shape)} here. Use the config.model that"
        " they were trained with (see part.json), or train the stage again."
      )


def load(branches, wanted, layout=None) -> dict[str, Any]:
  """Reads what is wanted of some branches.

  Args:
    branches: nested dicts whose leaves are `Branch`es.
    wanted: nested dicts of (abstract) arrays that go on where those end:
      shapes as stored, floats in the dtype in which they are kept.
    layout: shardings of the arrays, a tree as `wanted`; None, the whole or a
      leaf: on the first device of this process.

  Returns:
    A tree as `wanted`, of `jax.Array`.

  Raises:
    errors.CheckpointError: something is missing, damaged or of another shape.
  """
  check(branches, wanted)
  wanted, layout = _flat(wanted), _flat(layout or {})
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  found = {}
  for (directory, part), paths in _by_part(branches, wanted).items():
    target = {
      path: jax.ShapeDtypeStruct(
        wanted[ours].shape,
        wanted[ours].dtype,
        sharding=layout.get(ours) or device,
      )
      for path, ours in paths.items()
    }
    tree = traverse_util.unflatten_dict(target, sep="/")
    read = _flat(checkpoints.load_arrays(directory, part, tree))
    found |= {ours: read[path] for path, ours in paths.items()}
  return traverse_util.unflatten_dict(found, sep="/")


def _flat(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _by_part(branches, wanted):
  """{(directory, part): {path in the part: path in `wanted`}}."""
  made = collections.defaultdict(dict)
  for place, branch in _flat(branches).items():
    for ours in wanted:
      if f"{ours}/".startswith(f"{place}/"):
        path = branch.inside(ours[len(place) + 1 :])
        made[branch.directory, branch.part][path] = ours
  return made
