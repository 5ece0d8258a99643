"""Reads Thrift's compact form, in which Parquet describes itself.

PyArrow knows these descriptions too, but some of what it is asked of a damaged
one ends the process: see `footer.py`.
"""

from collections.abc import Mapping
from typing import Any

_MOST_DEPTH = 16
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY = 1, 2, 3, 7, 8
_INTEGERS = (4, 5, 6)
_LISTS, _MAP, _RECORD, _UUID = (9, 10), 11, 12, 13


class Odd(Exception):
  """Something here is not what is expected."""


Wanted = Mapping[int, Any]  # field -> None, or what is wanted of its records


def record(
  data: bytes, at: int, wanted: Wanted, depth: int = 0
) -> tuple[dict[int, Any], int]:
  """Returns (fields of a record, where it ends).

  Args:
    data: that hold it.
    at: where it begins.
    wanted: the fields that are returned; of texts and numbers that are no
      integers, None.
    depth: of the record within others.

  Raises:
    IndexError: the data end before.
    Odd: it is none.
  """
  if depth > _MOST_DEPTH:
    raise Odd("depth")
  fields: dict[int, Any] = {}
  number = 0
  while True:
    head = data[at]
    at += 1
    if not head:
      return fields, at
    number += head >> 4
    if not head >> 4:
      number, at = signed(data, at)
    kind = head & 15
    if kind in (_TRUE, _FALSE):
      value: Any = kind == _TRUE
    else:
      inner = wanted.get(number) or {}
      value, at = _value(data, at, kind, inner, depth)
    if number in wanted:
      fields[number] = value


def _value(data, at, kind, wanted, depth) -> tuple[Any, int]:
  """Returns (a value, where it ends)."""
  if kind in _INTEGERS:
    return signed(data, at)
  if kind == _BINARY:
    size, at = varint(data, at)
    return None, _within(data, at + size)
  if kind == _RECORD:
    return record(data, at, wanted, depth + 1)
  if kind in _LISTS:
    return _list(data, at, wanted, depth)
  if kind in (_BYTE, _TRUE, _FALSE):  # in a list a truth value has a byte
    return data[at], at + 1
  if kind == _DOUBLE:
    return None, _within(data, at + 8)
  if kind == _UUID:
    return None, _within(data, at + 16)
  if kind == _MAP:
    return None, _map(data, at, depth)
  raise Odd("kind of a field")


def _list(data, at, wanted, depth) -> tuple[list[Any], int]:
  head = data[at]
  count, at = head >> 4, at + 1
  if count == 15:
    count, at = varint(data, at)
  if count > len(data):  # each has a byte at least
    raise Odd("length of a list")
  values = []
  for _ in range(count):
    value, at = _value(data, at, head & 15, wanted, depth + 1)
    values.append(value)
  return values, at


def _map(data, at, depth) -> int:
  count, at = varint(data, at)
  if not count:
    return at
  kinds, at = data[at], at + 1
  if count > len(data):
    raise Odd("length of a map")
  for _ in range(count):
    for kind in (kinds >> 4, kinds & 15):
      _, at = _value(data, at, kind, {}, depth + 1)
  return at


def _within(data, at) -> int:
  if at > len(data):
    raise IndexError
  return at


def varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns (a number of as many bytes as it needs, where it ends).

  Raises:
    IndexError: the data end before.
    Odd: it is too long.
  """
  value = data[at]
  if value < 128:
    return value, at + 1
  value, shift = value & 127, 7
  while True:
    at += 1
    byte = data[at]
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at + 1
    shift += 7
    if shift > 63:
      raise Odd("number")


def signed(data: bytes, at: int) -> tuple[int, int]:
  """Returns (a number that may be negative, where it ends); see `varint`."""
  value, at = varint(data, at)
  return (value >> 1) ^ -(value & 1), at
