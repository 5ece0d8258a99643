"""Every parameter of the full-size runs lies where the golden files say."""

import jax
import pytest

from tests import specs


@pytest.mark.parametrize("name", specs.NAMES)
def test_parameters_are_split_as_recorded(name):
  made = specs.trees(name)
  recorded = (specs.FOLDER / f"{name}.txt").read_text().splitlines()
  assert specs.lines(name, made) == recorded
  _moments_lie_with_their_parameters(made[2])
  _nothing_large_is_whole(made)


def _moments_lie_with_their_parameters(trees):
  """Moments and exponential means are split as what they are of."""

  def by_path(tree):
    return {
      jax.tree_util.keystr(path): (leaf.shape, leaf.sharding.spec)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  params = by_path(trees["params"])
  others = by_path(trees["optimizer"]) | by_path(trees["extra"])
  found = 0
  for path, (shape, spec) in others.items():
    of = next((p for p in params if path.endswith(p)), None)
    if of is not None:
      assert (shape, spec) == params[of], path
      found += 1
  assert found >= 2  # both moments, at least of one parameter


def _nothing_large_is_whole(made):
  _, mesh, trees = made
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    axes = [a for entry in leaf.sharding.spec if entry for a in _names(entry)]
    split = any(mesh.shape[axis] > 1 for axis in axes)
    size = leaf.size * leaf.dtype.itemsize
    assert split or size <= 64e6, jax.tree_util.keystr(path)


def _names(entry):
  return (entry,) if isinstance(entry, str) else entry
