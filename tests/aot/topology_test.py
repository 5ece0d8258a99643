"""Topologies that are not there: how their devices reach each other."""

import numpy as np
import pytest

from lavit_jax.aot import topology
from lavit_jax.commands import main
from lavit_jax.core import errors, sharding

pytestmark = pytest.mark.libtpu
pytest.importorskip("libtpu")


def test_links_count_whole_rings_twice():
  devices = topology.devices("v5e:16x16")
  chip = topology.chip_of(devices[0])
  links = lambda mesh: {
    size: route.links for size, route in topology.routes(mesh, chip).items()
  }
  mesh = sharding.make_mesh({"data": 2, "fsdp": 128}, devices)
  assert links(mesh) == {1: 1, 2: 1, 128: 3, 256: 4}
  mesh = sharding.make_mesh({"data": 16, "fsdp": 16}, devices)
  assert links(mesh)[256] == 4
  small = topology.devices("v5e:2x4")
  mesh = sharding.make_mesh({"fsdp": 8}, small)
  assert links(mesh) == {1: 1, 8: 2}


def test_two_devices_of_a_chip_share_its_links():
  """A torus of 4 x 4 x 4 chips, each of two devices: six links a chip."""
  devices = topology.devices("tpu7x:4x4x4")
  chip = topology.chip_of(devices[0])
  assert (len(devices), chip.devices_per_chip) == (128, 2)
  mesh = sharding.make_mesh({"fsdp": 64, "tensor": 2}, devices)
  first, second = mesh.devices[0, 0, 0]
  assert tuple(first.coords) == tuple(second.coords)
  assert {first.core_on_chip, second.core_on_chip} == {0, 1}
  links = lambda mesh: {
    size: route.links for size, route in topology.routes(mesh, chip).items()
  }
  # All devices: as if each had all six links of its chip. Both of a chip: what
  # is between the dies. One of each chip: the others send over the links too.
  found = links(mesh)
  assert (found[128], found[2], found[64]) == (6, chip.die_links, 3)
  mesh = sharding.make_mesh({"data": 8, "fsdp": 16}, devices)
  # 16 chips of two rings, four links, one device of each chip; and four chips
  # of a ring with both devices.
  assert links(mesh)[16] == links(mesh)[8] == 2


def test_slices_are_crossed_by_data_alone():
  devices = topology.devices("v5e:2x2", slices=2)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, devices)
  slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
  for number in (0, 1):
    assert set(slices[number].flat) == {slices[number].flat[0]}
  assert slices[0].flat[0] != slices[1].flat[0]
  routes = topology.routes(mesh, topology.chip_of(devices[0]))
  assert {size: one.slices for size, one in routes.items()} == {
    1: 1,
    2: 2,
    4: 1,
    8: 2,
  }
  with pytest.raises(errors.ConfigError, match="2 slices"):
    sharding.make_mesh({"data": 1, "fsdp": 8}, devices)


def test_a_wrong_topology_is_reported(capsys):
  with pytest.raises(errors.UsageError, match="v5e:4x4, v5p:4x4x8"):
    topology.devices("v9:1x1")
  assert main.main(["compile", "--config", "tiny/pretrain.py"]) == 2
  assert "--topology" in capsys.readouterr().err
