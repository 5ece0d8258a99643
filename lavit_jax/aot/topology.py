"""Describes TPU topologies, to compile for chips this machine does not have."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies

from lavit_jax.aot import libtpu
from lavit_jax.core import errors
from lavit_jax.cost import chips

# libtpu asks a TPU's metadata server for these, which no other machine has; the
# lock that it takes is of hardware that is not used here.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_RINGS = {2: 16, 3: 4}  # torus axes: chips along one that close to a ring


def devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
  """Returns the devices of a topology: they compile programs, but run none.

  It sets environment variables of libtpu that are not set.

  Args:
    name: chip and shape in chips, "v5e:16x16", "v5p:4x4x8", "tpu7x:4x4x4". A
      chip of TPU7x is two devices.
    slices: number of such slices, joined by the data-centre network.

  Raises:
    errors.UsageError: libtpu is not installed, or knows no such topology.
  """
  libtpu.library()
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  options = {"num_slices": slices} if slices > 1 else {}
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except Exception as e:  # libtpu raises errors of several kinds
    raise errors.UsageError(
      f"--topology {name}: libtpu knows no such topology"
      f" ({str(e).splitlines()[0][:200]}). Give chip and shape, such as"
      " v5e:4x4, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4."
    ) from e
  return topology.devices


def chip_of(device: jax.Device) -> chips.Chip:
  """Returns the chip of a topology's device.

  Raises:
    errors.UsageError: `chips.CHIPS` does not have it.
  """
  chip = chips.of_device(device)
  if chip is None:
    raise errors.UsageError(
      f"lavit_jax/cost/chips.py has no figures of {device.device_kind!r}; it"
      f" has {sorted(chips.CHIPS)}. Add them, or choose one of these."
    )
  return chip


@dataclasses.dataclass(frozen=True)
class Route:
  """How the devices of a group reach each other.

  Attributes:
    links: of ICI, over which each device sends; 1 if a switch joins them.
      Devices of one chip share its links.
    slices: over which the group is spread evenly, joined by the network.
  """

  links: float
  slices: int = 1


def routes(mesh: jax.sharding.Mesh, chip: chips.Chip) -> Mapping[int, Route]:
  """Returns how the devices of a group reach each other, by the group's size.

  A group is what some axes of the mesh span. A torus axis along which it has
  several chips gives two links if the group has the whole ring, one if it has a
  part. If two choices of axes make groups of one size, the slower counts: more
  slices, then fewer links.

  Args:
    mesh: of a topology's devices.
    chip: its chip.
  """
  coordinates = np.array([_coordinates(d) for d in mesh.devices.flat])
  coordinates = coordinates.reshape(*mesh.devices.shape, -1)
  found: dict[int, Route] = {}
  count = mesh.devices.ndim
  slowness = lambda route: (-route.slices, route.links)
  for chosen in range(1, 2**count):
    axes = [i for i in range(count) if chosen >> i & 1]
    index = tuple(slice(None) if i in axes else 0 for i in range(count))
    group = coordinates[index].reshape(-1, coordinates.shape[-1])
    route = Route(_links(group, chip), len(set(group[:, -1])))
    size = len(group)
    found[size] = min(found.get(size, route), route, key=slowness)
  return found


def _coordinates(device) -> tuple[int, ...]:
  """Returns (x, y, z) of a device's chip, and the number of its slice."""
  return (*device.coords, getattr(device, "slice_index", 0) or 0)


def _links(group: np.ndarray, chip: chips.Chip) -> float:
  """Returns the links of each device of a group; rows are `_coordinates`.

  If the group has both devices of each chip, what comes over the chip's links
  is for both, and goes on to the other between the dies: each counts all links.
  If it has one of them, the other device's group uses the links too.
  """
  num_chips = len(np.unique(group, axis=0))
  if num_chips == 1 and len(group) > 1:
    return chip.die_links
  spans = [len(set(group[:, i])) for i in range(group.shape[1] - 1)]
  ring = _RINGS.get(chip.torus_axes, math.inf)
  total = sum(2 if n >= ring else 1 for n in spans if n > 1)
  return max(total, 1) * len(group) / num_chips / chip.devices_per_chip
