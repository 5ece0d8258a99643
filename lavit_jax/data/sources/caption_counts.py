"""Counts the captions of each record of a dataset once, and keeps the counts.

Counting reads every record, which takes seconds for tens of thousands of them
and minutes for millions. Counts are kept in the user's cache folder.
"""

import concurrent.futures
import hashlib
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable

import numpy as np

from lavit_jax.core.storage import array_files, files

_LOG = logging.getLogger(__name__)
_THREADS = 8  # that read records
_CHUNK = 4096  # records a task of a thread
_LOG_EVERY = 30.0  # seconds


def of(
  count: int,
  captions_of: Callable[[int], int],
  *,
  key: object,
  name: str,
) -> np.ndarray:
  """Returns the number of captions of each record, int32[count].

  Args:
    count: number of records.
    captions_of: counts the captions of a record, given its number.
    key: everything the counts depend on; its repr names their file.
    name: of the dataset, for the log.
  """
  digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
  path = folder() / f"{digest}.npy"
  stored = _read(path, count)
  if stored is not None:
    return stored
  _LOG.info("counting the captions of %d records of %s", count, name)
  counts, logged = np.zeros(count, np.int32), time.monotonic()

  def fill(start):
    stop = min(start + _CHUNK, count)
    for i in range(start, stop):
      counts[i] = captions_of(i)
    return stop

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for done in pool.map(fill, range(0, count, _CHUNK)):
      if time.monotonic() > logged + _LOG_EVERY:
        logged = time.monotonic()
        _LOG.info("counted the captions of %d of %d records", done, count)
  _write(path, counts)
  return counts


def folder() -> pathlib.Path:
  """Returns where counts are kept, in XDG_CACHE_HOME or else ~/.cache."""
  return files.user_cache("captions")


def _read(path, count):
  """Returns the counts in a file, None if it holds no valid ones."""
  try:
    counts = array_files.read(path)
  except (OSError, ValueError, EOFError):
    return None
  good = counts.shape == (count,) and counts.dtype == np.int32
  return counts if good and (counts >= 0).all() else None


def _write(path, counts):
  """Keeps the counts if the folder can be written."""
  unfinished = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
      np.save(file, counts)
    os.replace(unfinished, path)
  except OSError as error:
    _LOG.info(
      "%s could not be written (%s); captions will be counted again",
      path,
      error,
    )
