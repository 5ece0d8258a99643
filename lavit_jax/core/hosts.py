"""Coordination of a run's processes, and placement of arrays across them.

With one process nothing here communicates.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_lead() -> bool:
  """Returns whether this process writes logs and small files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has called it with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast_from_lead(number: int) -> int:
  """Returns the number of the lead process, on every process."""
  if jax.process_count() == 1:
    return int(number)
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_agree(good: bool) -> bool:
  """Returns whether `good` is True on every process, the same on each."""
  if jax.process_count() == 1:
    return bool(good)
  return bool(np.all(multihost_utils.process_allgather(np.bool_(good))))


def put(tree: Any, layout: Any) -> Any:
  """Places a tree of arrays according to shardings.

  Args:
    tree: arrays that every process has in full, with equal values (NumPy, or
      on a device of the process), or global arrays.
    layout: a tree of `jax.sharding.Sharding`, or one for all arrays.

  Returns:
    The tree of `jax.Array`; each process keeps its shards.
  """
  if isinstance(layout, jax.sharding.Sharding):
    layout = jax.tree.map(lambda _: layout, tree)
  return jax.tree.map(_put, tree, layout)


def _put(x, target):
  is_global = isinstance(x, jax.Array) and not x.is_fully_addressable
  if target.is_fully_addressable or is_global:
    return jax.device_put(x, target)
  array = np.asarray(x)  # device_put would compare it over the network
  return jax.make_array_from_callback(
    array.shape, target, lambda index: array[index]
  )


def storable(tree: Any) -> Any:
  """Returns the tree in the form that Orbax saves from several processes.

  Orbax saves global arrays, of which each process writes its shards, and NumPy
  arrays, which the lead writes. It refuses arrays on a device of one process.
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
