"""CRC-32C (Castagnoli), as event files carry it, fast enough in NumPy.

Long data are cut into lanes of equal length that are gone through side by side.
A CRC is linear over the bits of what it began with: the CRC of two pieces is
that of the second, plus that of the first carried over as many zero bytes as
the second is long. That carrying is a 32 x 32 matrix over {0, 1}.
"""

import functools

import numpy as np

_LANES = 1024
_SHORT = 1 << 16  # bytes, below which lanes cost more than they save


def _byte_table() -> np.ndarray:
  """uint32[256]: what the lowest byte of a state turns into."""
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = table >> 1 ^ np.where(table & 1, np.uint32(0x82F63B78), 0)
  return table.astype(np.uint32)


_TABLE = _byte_table()
_PLAIN = tuple(_TABLE.tolist())


def crc32c(data: bytes) -> int:
  """The CRC of bytes: `b"123456789"` gives 0xE3069283."""
  state = 0xFFFFFFFF
  if len(data) >= _SHORT:
    length = len(data) // _LANES
    whole = np.frombuffer(data, np.uint8, length * _LANES)
    state = _lanes(whole.reshape(_LANES, length), state)
    data = data[length * _LANES :]
  return _bytes(data, state) ^ 0xFFFFFFFF


def _bytes(data, state: int) -> int:
  for byte in data:
    state = _PLAIN[(state ^ byte) & 0xFF] ^ state >> 8
  return state


def _lanes(pieces: np.ndarray, state: int) -> int:
  """The state behind uint8[lanes, length], one after the other."""
  lanes, length = pieces.shape
  states = np.zeros(lanes, np.uint32)
  states[0] = state
  for column in np.ascontiguousarray(pieces.T):
    states = _TABLE[(states ^ column) & 0xFF] ^ states >> 8
  tables = _carry(length)
  total = 0
  for found in states.tolist():
    total = (
      tables[0][total & 0xFF]
      ^ tables[1][total >> 8 & 0xFF]
      ^ tables[2][total >> 16 & 0xFF]
      ^ tables[3][total >> 24]
      ^ found
    )
  return total


@functools.lru_cache(maxsize=64)
def _carry(length: int) -> tuple[tuple[int, ...], ...]:
  """Four tables of 256: a state, byte by byte, carried over zero bytes."""
  bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
  power = _TABLE[bits & 0xFF] ^ bits >> 8  # uint32[32]: over one zero byte
  matrix = bits  # over none
  while length:
    if length & 1:
      matrix = _apply(power, matrix)
    power = _apply(power, power)
    length >>= 1
  values = np.arange(256, dtype=np.uint32)
  return tuple(
    tuple(_apply(matrix, values << np.uint32(8 * i)).tolist()) for i in range(4)
  )


def _apply(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
  """The matrix, uint32[32] of its columns, times each of uint32[n]."""
  out = np.zeros_like(values)
  for bit in range(32):
    out ^= np.where(values >> np.uint32(bit) & 1, matrix[bit], np.uint32(0))
  return out
