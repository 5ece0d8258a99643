"""Reads files of NumPy arrays that may be damaged."""

import tokenize
from typing import Any

import numpy as np

# What NumPy raises of a header that is damaged, beside ValueError.
ODD = (
  *(tokenize.TokenError, SyntaxError, KeyError, TypeError, IndexError),
  *(AttributeError, OverflowError, MemoryError, UnicodeError),
)


def read(path: Any, *, mapped: bool = False) -> np.ndarray:
  """Returns the array in a .npy file, without pickled objects.

  Args:
    path: of the file, or an open one.
    mapped: leave it on the disk, and read what is asked for.

  Raises:
    OSError: it cannot be read.
    ValueError, EOFError: it is damaged.
  """
  try:
    found = np.load(path, mmap_mode="r" if mapped else None)
  except ODD as error:
    raise ValueError(f"its head is damaged ({error})") from error
  if not isinstance(found, np.ndarray):
    raise ValueError("it holds several arrays")
  return found
