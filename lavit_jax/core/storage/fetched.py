"""Files of an object store for libraries that read from a disk alone.

Copies lie under $LAVIT_FETCHED (by default ~/.cache/lavit_jax/fetched), each
in a folder named by where it was copied from, and in that by what: which files,
how large and which version. A copy is there whole or not at all, and is used
again. A new one takes the place of those of other versions that no process
reads, which a lock beside each tells. All may be deleted when nothing runs.
What does not fit the disk is refused before any byte is copied.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Sequence

from etils import epath

from lavit_jax.core import errors
from lavit_jax.core.storage import files

_AT_ONCE = 8  # files
_SPARE = 1 << 30  # bytes of the disk that copies leave free
_STALE = 3600.0  # seconds without a write, after which a copy was killed
_VERSION = ("size", "generation", "etag", "mtime", "created")
_locks: dict[pathlib.Path, io.IOBase] = {}  # of this process, until it ends


def folder(path, names: Sequence[str]) -> pathlib.Path:
  """A folder on this disk that has these files of the folder `path`.

  Args:
    path: a folder here, which is given back, or in an object store.
    names: of its files, without folders.

  Raises:
    FileNotFoundError: one of them is not there.
    errors.DataError: they do not fit the disk, or change while they are read.
  """
  if not files.is_remote(path):
    return pathlib.Path(path)
  place = files.path_of(path)
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    found = list(pool.map(lambda name: version(place / name), names))
    target = _root() / _digest(os.fspath(place)) / _digest([*names, found])
    _lock(target)
    target.mkdir(exist_ok=True)
    missing = [
      (place / name, target / name, int(told["size"]))
      for name, told in zip(names, found, strict=True)
      if not _is_whole(target / name, int(told["size"]))
    ]
    if missing:
      _prune(target)
    _check_room(place, target, sum(size for _, _, size in missing))
    list(pool.map(lambda one: _copy(*one), missing))
  return target


def _digest(told) -> str:
  return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _lock(copy: pathlib.Path) -> None:
  """Holds a copy, there or to be made, for as long as this process lives."""
  if copy in _locks:
    return
  copy.parent.mkdir(parents=True, exist_ok=True)
  lock = copy.with_suffix(".lock").open("ab")
  with contextlib.suppress(OSError):  # without locks `_prune` removes none
    fcntl.flock(lock, fcntl.LOCK_SH)
  _locks[copy] = lock


def _prune(copy: pathlib.Path) -> None:
  """Removes what killed processes left in a copy, and its other versions."""
  for path in copy.glob("*.tmp"):
    try:
      if time.time() - path.stat().st_mtime > _STALE:
        path.unlink()
    except FileNotFoundError:  # the process that made it was quicker
      continue
  for other in copy.parent.iterdir():
    if other == copy or not other.is_dir():
      continue
    with other.with_suffix(".lock").open("ab") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:  # a process reads it, or this disk has no locks
        continue
      shutil.rmtree(other, ignore_errors=True)


def read_range(path, start: int, stop: int) -> bytes:
  """Bytes start to stop of a file here or in an object store; thread-safe."""
  if not files.is_remote(path):
    with open(path, "rb") as file:
      file.seek(start)
      return file.read(stop - start)
  system, name = files.system_of(path)
  return system.cat_file(name, start=start, end=stop)


def version(path: epath.Path) -> dict[str, str]:
  """Size and version of an object."""
  system, name = files.system_of(path)
  found = system.info(name)
  return {
    key: str(found[key]) for key in _VERSION if found.get(key) is not None
  }


def _root() -> pathlib.Path:
  if told := os.environ.get("LAVIT_FETCHED"):
    return pathlib.Path(told)
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "lavit_jax" / "fetched"


def _is_whole(path: pathlib.Path, size: int) -> bool:
  return path.is_file() and path.stat().st_size == size


def _check_room(place, target, needed):
  free = shutil.disk_usage(target).free
  if needed and needed + _SPARE > free:
    raise errors.DataError(
      f"{place} is copied to {target} to be read, {needed / 1e9:.1f} GB, but"
      f" only {free / 1e9:.1f} GB are free there. Set LAVIT_FETCHED to a folder"
      " on a larger disk, or make room."
    )


def _copy(source: epath.Path, target: pathlib.Path, size: int) -> None:
  """Copies one object; several processes of a machine may do so at once."""
  partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
  try:
    with source.open("rb") as there, partial.open("wb") as here:
      shutil.copyfileobj(there, here, 1 << 22)
    if (found := partial.stat().st_size) != size:
      raise errors.DataError(
        f"{source} had {size} bytes and now has {found}: it was changed or cut"
        " while it was copied. Give the same command again."
      )
    os.replace(partial, target)
  finally:
    partial.unlink(missing_ok=True)
