"""The CRC in lanes is the CRC byte by byte."""

import numpy as np
import pytest

from lavit_jax.train.telemetry import crc32c


def _byte_by_byte(data):
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def test_the_published_check_values():
  assert crc32c.crc32c(b"123456789") == 0xE3069283
  assert crc32c.crc32c(b"\x00" * 32) == 0x8A9136AA  # RFC 3720, B.4
  assert crc32c.crc32c(bytes(range(32))) == 0x46DD794E
  assert crc32c.crc32c(b"") == 0


@pytest.mark.parametrize("size", [0, 1, 9, 4095, 4096, 4097, 5000, 13001])
def test_lanes_change_nothing(monkeypatch, size):
  monkeypatch.setattr(crc32c, "_SHORT", 4096)
  data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
  assert crc32c.crc32c(data) == _byte_by_byte(data)


def test_a_message_and_its_crc_leave_the_residue():
  """Of every valid frame the same: no reference of our own is needed."""
  data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
  crc = crc32c.crc32c(data)
  assert crc32c.crc32c(data + crc.to_bytes(4, "little")) == 0x48674BC7
