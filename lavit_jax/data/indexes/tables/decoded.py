"""Keeps what was decoded last, for several threads."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Hashable
from typing import Any


class Decoded:
  """The values used last, of at most so many bytes together.

  A value that several threads ask for is made once; the others wait for it. An
  error goes to all who wait, and is not kept.
  """

  def __init__(self, most: int, size_of: Callable[[Any], int]) -> None:
    """Keeps nothing yet.

    Args:
      most: bytes of all values; of larger ones the last is kept.
      size_of: gives the bytes of a value.
    """
    self._most, self._size_of = most, size_of
    self._values: collections.OrderedDict[Hashable, Any]
    self._values = collections.OrderedDict()
    self._sizes: dict[Hashable, int] = {}
    self._total = 0
    self._lock = threading.Lock()

  def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
    """Returns the value of a key, made if it is not there."""
    with self._lock:
      future = self._values.pop(key, None)
      mine = future is None
      if future is None:
        future = concurrent.futures.Future()
      self._values[key] = future  # the one used last
    if not mine:
      return future.result()
    try:
      value = make()
      size = self._size_of(value)
    except BaseException as error:
      with self._lock:
        del self._values[key]
      future.set_exception(error)
      raise
    future.set_result(value)
    with self._lock:
      self._sizes[key] = size
      self._total += size
      self._drop(key)
    return value

  def _drop(self, newest):
    """Drops the values used first, until the others are few enough."""
    if self._total <= self._most:
      return
    for key in list(self._values):
      if key in self._sizes and key != newest:
        self._total -= self._sizes.pop(key)
        del self._values[key]
      if self._total <= self._most:
        return
