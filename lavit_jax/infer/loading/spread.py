"""Tokenizes images on several devices of this process at once.

Each device runs the program that a single one does, on a group of as many
images, so that the tokens of an image do not depend on how many devices there
are.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lavit_jax.infer.loading import visual

_P = jax.sharding.PartitionSpec
_AXIS = "data"


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
    self._mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,))
    self.count = len(devices)
    self._compiled: dict[int, Any] = {}  # by capacity
    if self.count > 1:
      everywhere = jax.sharding.NamedSharding(self._mesh, _P())
      self._encoder, self._variables = jax.device_put(
        tokenizer.variables, everywhere
      )

  def _over_groups(self, function):
    """Compiles a function of (parameters, arrays …) for a group a device."""

    def spread(params, *arrays):
      return jax.shard_map(
        function,
        mesh=self._mesh,
        in_specs=(_P(), *(_P(_AXIS) for _ in arrays)),
        out_specs=_P(_AXIS),
        check_vma=False,
      )(params, *arrays)

    return jax.jit(spread)

  @functools.cached_property
  def _features(self):
    return self._over_groups(self._tokenizer.encode_images)

  @functools.cached_property
  def _keep(self):
    return self._over_groups(self._tokenizer.expected_mask)

  def _codes(self, capacity):
    if capacity in self._compiled:
      return self._compiled[capacity]

    def code(variables, features, keep):
      _, *found = self._tokenizer.coded(variables, features, keep, capacity)
      return tuple(found)

    self._compiled[capacity] = self._over_groups(code)
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
    placed = jax.sharding.NamedSharding(self._mesh, _P(_AXIS))
    features = self._features(self._encoder, jax.device_put(batch, placed))
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
