"""Runs a program of images on several devices of this process at once.

Each device runs the program that a single one does, on a group of as many
images, so that what is made of an image does not depend on how many devices
there are.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lavit_jax.infer.loading import visual

_P = jax.sharding.PartitionSpec
_AXIS = "data"


def mesh_of(devices: Sequence[Any]) -> jax.sharding.Mesh:
  """Returns a mesh of one axis."""
  return jax.sharding.Mesh(np.array(devices), (_AXIS,))


def everywhere(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of what each device has whole."""
  return jax.sharding.NamedSharding(mesh, _P())


def a_group_each(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays [devices * group, ...]."""
  return jax.sharding.NamedSharding(mesh, _P(_AXIS))


def over_groups(
  function: Callable[..., Any], mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
  """Jits a function of (parameters, arrays ...) for a group on each device.

  Args:
    function: of the parameters and of arrays [group, ...], to such arrays.
    mesh: see `mesh_of`.

  Returns:
    The function of the parameters, on every device, and of arrays
    [devices * group, ...].
  """

  def spread(params, *arrays):
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(_P(), *(_P(_AXIS) for _ in arrays)),
      out_specs=_P(_AXIS),
      check_vma=False,
    )(params, *arrays)

  return jax.jit(spread)


class Spread:
  """A visual tokenizer whose batches are spread over devices."""

  def __init__(
    self, tokenizer: visual.VisualTokenizer, devices: Sequence[Any]
  ) -> None:
    """Copies the parameters to each device.

    Args:
      tokenizer: to be spread.
      devices: of this process.
    """
    self._tokenizer = tokenizer
    self._mesh = mesh_of(devices)
    self.count = len(devices)
    self._compiled: dict[int, Any] = {}  # by capacity
    if self.count > 1:
      self._encoder, self._variables = jax.device_put(
        tokenizer.variables, everywhere(self._mesh)
      )

  @functools.cached_property
  def _features(self):
    return over_groups(self._tokenizer.encode_images, self._mesh)

  @functools.cached_property
  def _keep(self):
    return over_groups(self._tokenizer.expected_mask, self._mesh)

  def _codes(self, capacity):
    if capacity in self._compiled:
      return self._compiled[capacity]

    def code(variables, features, keep):
      _, *found = self._tokenizer.coded(variables, features, keep, capacity)
      return tuple(found)

    self._compiled[capacity] = over_groups(code, self._mesh)
    return self._compiled[capacity]

  def tokenize(
    self, batch: np.ndarray, count: int
  ) -> list[dict[str, np.ndarray]]:
    """Returns a dict for each image: `keep` bool[N], `codes` int32[k].

    Args:
      batch: uint8[devices * group, H, W, 3].
      count: return only the first so many images.
    """
    if self.count == 1:
      return self._tokenizer.tokenize(batch, count=count)
    placed = jax.device_put(batch, a_group_each(self._mesh))
    features = self._features(self._encoder, placed)
    keep = self._keep(self._variables, features)
    kept = np.asarray(keep)
    codes = self._of_groups(features, keep, kept)
    return [
      {"keep": kept[i], "codes": codes[i].astype(np.int32)}
      for i in range(count)
    ]

  def _of_groups(self, features, keep, kept) -> list[np.ndarray]:
    """Returns the codes of each image, each group at its own capacity."""
    size = len(kept) // self.count
    groups = [slice(k * size, (k + 1) * size) for k in range(self.count)]
    out: list[Any] = [None] * len(kept)

    def put(group, ids, valid):
      for i in range(group.start, group.stop):
        j = i - group.start
        out[i] = ids[j][valid[j]]

    if self._tokenizer.is_one_by_one:
      for group in groups:
        put(group, *self._tokenizer.encode(features[group], keep[group]))
      return out
    capacities = [self._tokenizer.capacity_for(kept[g]) for g in groups]
    for capacity in sorted(set(capacities)):
      found = self._codes(capacity)(self._variables, features, keep)
      ids, valid = map(np.asarray, found)
      for group, mine in zip(groups, capacities, strict=True):
        if mine == capacity:
          put(group, ids[group], valid[group])
    return out
