"""TPU topologies that are not there, for compiling ahead of time."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lavit_jax.aot import libtpu
from lavit_jax.core import errors
from lavit_jax.cost import chips

# What libtpu asks of a TPU's metadata server, which no other machine has; and
# its lock, which is of the hardware that nobody touches here.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
}
_RINGS = {2: 16, 3: 4}  # a torus axis of so many chips closes to a ring


def devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
  """Devices of a topology: programs can be compiled for them, not run.

  Args:
    name: chip and shape in chips, "v5e:16x16", "v5p:4x4x8", "tpu7x:4x4x4". A
      chip of TPU7x is two devices.
    slices: how many of them, joined by the data-centre network.

  Raises:
    errors.UsageError: libtpu is not installed, or knows no such topology.
  """
  libtpu.library()
  from jax.experimental import topologies

  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  options = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except Exception as e:  # libtpu raises errors of several kinds
    raise errors.UsageError(
      f"--topology {name}: libtpu knows no such topology"
      f" ({str(e).splitlines()[0][:200]}). Give chip and shape, such as"
      " v5e:4x4, v5p:4x4x8, v6e:16x16 or tpu7x:4x4x4."
    ) from e
  return found.devices


def chip_of(device: jax.Device) -> chips.Chip:
  """The chip of a topology's device.

  Raises:
    errors.UsageError: `chips.CHIPS` has no figures of it.
  """
  chip = chips.of_device(device)
  if chip is None:
    raise errors.UsageError(
      f"There are no figures of {device.device_kind!r} in train/chips.py; it"
      f" has {sorted(chips.CHIPS)}. Add them, or choose one of these."
    )
  return chip


@dataclasses.dataclass(frozen=True)
class Route:
  """How the devices of a group reach each other.

  Attributes:
    links: of ICI, over which each sends; 1 if a switch joins them. Devices of
      one chip share its links.
    slices: over which the group is spread evenly, joined by the network.
  """

  links: float
  slices: int = 1


def routes(mesh: jax.sharding.Mesh, chip: chips.Chip) -> Mapping[int, Route]:
  """By the size of a group, how its devices reach each other.

  A group is what some axes of the mesh span. A torus axis along which it has
  several chips gives two links if it is a whole ring, one if it is a part.
  Where two choices of axes make groups of one size, the slower counts: more
  slices, then fewer links.
  """
  places = np.array([_place(device) for device in mesh.devices.flat])
  places = places.reshape(*mesh.devices.shape, -1)
  made: dict[int, Route] = {}
  count = mesh.devices.ndim
  for chosen in range(1, 2**count):
    axes = [i for i in range(count) if chosen >> i & 1]
    index = tuple(slice(None) if i in axes else 0 for i in range(count))
    group = places[index].reshape(-1, places.shape[-1])
    route = Route(_links(group, chip), len(set(group[:, -1])))
    slower = lambda route: (-route.slices, route.links)
    size = len(group)
    made[size] = min(made.get(size, route), route, key=slower)
  return made


def _place(device):
  """(x, y, z of its chip, number of its slice)."""
  return (*device.coords, getattr(device, "slice_index", 0) or 0)


def _links(group, chip: chips.Chip) -> float:
  """Links of a device of a group, of which each row is a `_place`.

  If the group has both devices of each chip, what comes over the chip's links
  is for both, and goes on to the other between the dies: each has as if all
  of them. If it has one of them, the other one's group uses the links too.
  """
  own = len(np.unique(group, axis=0))  # chips
  if own == 1 and len(group) > 1:
    return chip.die_links
  spans = [len(set(group[:, i])) for i in range(group.shape[1] - 1)]
  ring = _RINGS.get(chip.torus_axes, math.inf)
  total = sum(2 if n >= ring else 1 for n in spans if n > 1)
  return max(total, 1) * len(group) / own / chip.devices_per_chip
