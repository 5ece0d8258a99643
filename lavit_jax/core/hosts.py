"""What a run of several processes needs: to agree, and to lay arrays out.

With one process everything here is what it would be without this file.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_lead() -> bool:
  """Whether this process is the one that writes logs and small files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast_from_lead(number: int) -> int:
  """The number that the first process gives, on all of them."""
  if jax.process_count() == 1:
    return int(number)
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_agree(good: bool) -> bool:
  """Whether it holds on every process; all get the same answer."""
  if jax.process_count() == 1:
    return bool(good)
  return bool(np.all(multihost_utils.process_allgather(np.bool_(good))))


def put(tree, layout):
  """Global arrays of a tree, laid out as a tree of shardings says.

  Args:
    tree: arrays that are whole on every process (numpy, or of one device of
      its own), equal ones, or global already.
    layout: `jax.sharding.Sharding`s, a tree like it or one for all.

  Returns:
    The tree of `jax.Array`; each process keeps its own share of it.
  """
  if isinstance(layout, jax.sharding.Sharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(_put, tree, layout)


def _put(x, target):
  spread = isinstance(x, jax.Array) and not x.is_fully_addressable
  if target.is_fully_addressable or spread:
    return jax.device_put(x, target)
  whole = np.asarray(x)  # device_put would compare it over the network
  return jax.make_array_from_callback(
    whole.shape, target, lambda index: whole[index]
  )


def storable(tree):
  """The same tree as Orbax saves it from several processes at once.

  It takes global arrays, each process writing its share, and numpy arrays,
  which the first writes; not arrays of one device among several processes'.
  """
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(
    lambda x: (
      np.asarray(x)
      if isinstance(x, jax.Array) and x.is_fully_addressable
      else x
    ),
    tree,
  )
