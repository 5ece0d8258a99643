"""How many captions each record of a dataset has, counted once and kept.

To know them every record has to be read: seconds for some ten thousands of
them, minutes for millions. The counts are kept in the user's cache folder.
"""

import concurrent.futures
import hashlib
import logging
import os
import pathlib
import secrets
import time

import numpy as np

_LOG = logging.getLogger(__name__)
_THREADS = 8  # that read records
_CHUNK = 4096  # records a task of theirs
_OFTEN = 30.0  # seconds between two lines of the log


def of(count, captions_of, *, key, name) -> np.ndarray:
  """int32[count], captions of each record.

  Args:
    count: number of records.
    captions_of: function of a record's number that counts its captions.
    key: what the counts depend on; other keys are other counts.
    name: of the dataset, for the log.
  """
  digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
  path = folder() / f"{digest}.npy"
  found = _read(path, count)
  if found is not None:
    return found
  _LOG.info("counting the captions of %d records of %s", count, name)
  counts, told = np.zeros(count, np.int32), time.monotonic()

  def fill(start):
    for i in range(start, min(start + _CHUNK, count)):
      counts[i] = captions_of(i)
    return min(start + _CHUNK, count)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for done in pool.map(fill, range(0, count, _CHUNK)):
      if time.monotonic() > told + _OFTEN:
        told = time.monotonic()
        _LOG.info("captions of %d of %d records are counted", done, count)
  _write(path, counts)
  return counts


def folder() -> pathlib.Path:
  """Where the counts lie: XDG_CACHE_HOME or ~/.cache, lavit_jax/captions."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "lavit_jax" / "captions"


def _read(path, count):
  """The counts in a file, None if it holds none that make sense."""
  try:
    found = np.load(path)
  except (OSError, ValueError, EOFError):
    return None
  good = found.shape == (count,) and found.dtype == np.int32
  return found if good and (found >= 0).all() else None


def _write(path, counts):
  """Keeps the counts; a folder that cannot be written is no fault."""
  unfinished = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
      np.save(file, counts)
    os.replace(unfinished, path)
  except OSError as error:
    _LOG.info("%s is not written (%s); they are counted again", path, error)
