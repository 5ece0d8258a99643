"""Copies files of an object store for libraries that read from a disk only.

Copies are under $LAVIT_FETCHED (by default ~/.cache/lavit_jax/fetched), in a
folder named after their source, and in that in one named after their files,
sizes and versions. Copies are complete or absent, and are used again. A new
copy replaces those of other versions that no process reads, which locks beside
them tell. All copies may be deleted while nothing runs. Files that do not fit
on the disk are refused before any byte is copied.
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
from lavit_jax.core.storage import files, patient

_THREADS = 8  # files copied at once
_RESERVED = 1 << 30  # bytes of the disk that copies leave free
_STALE = 3600.0  # seconds without a write, after which a partial file is stale
_VERSION = ("size", "generation", "etag", "mtime", "created")
_locks: dict[pathlib.Path, io.IOBase] = {}  # of this process, until it ends


def folder(path: files.PathLike, names: Sequence[str]) -> pathlib.Path:
  """Returns a folder on this disk with the given files of `path`.

  Args:
    path: a folder on this disk, which is returned, or in an object store.
    names: of its files, without folders.

  Raises:
    FileNotFoundError: a file does not exist.
    errors.DataError: the files do not fit on the disk, or change meanwhile.
  """
  if not files.is_remote(path):
    return pathlib.Path(path)
  source = files.path_of(path)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    versions = list(pool.map(lambda name: version(source / name), names))
    target = _root() / _digest(os.fspath(source)) / _digest([*names, versions])
    _lock(target)
    target.mkdir(exist_ok=True)
    missing = [
      (source / name, target / name, int(stored["size"]))
      for name, stored in zip(names, versions, strict=True)
      if not _is_complete(target / name, int(stored["size"]))
    ]
    if missing:
      _prune(target)
    _check_room(source, target, sum(size for _, _, size in missing))
    list(pool.map(lambda args: _copy(*args), missing))
  return target


def _digest(value) -> str:
  return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


def _lock(copy: pathlib.Path) -> None:
  """Locks a copy, existing or not, for the lifetime of this process."""
  if copy in _locks:
    return
  copy.parent.mkdir(parents=True, exist_ok=True)
  lock = copy.with_suffix(".lock").open("ab")
  with contextlib.suppress(OSError):  # without locks `_prune` removes nothing
    fcntl.flock(lock, fcntl.LOCK_SH)
  _locks[copy] = lock


def _prune(copy: pathlib.Path) -> None:
  """Removes stale partial files of a copy, and its other versions."""
  for path in copy.glob("*.tmp"):
    try:
      if time.time() - path.stat().st_mtime > _STALE:
        path.unlink()
    except FileNotFoundError:  # its own process has removed it
      continue
  for other in copy.parent.iterdir():
    if other == copy or not other.is_dir():
      continue
    with other.with_suffix(".lock").open("ab") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:  # a process reads it, or the disk has no locks
        continue
      shutil.rmtree(other, ignore_errors=True)


def read_range(path: files.PathLike, start: int, stop: int) -> bytes:
  """Reads bytes start to stop of a local or remote file; thread-safe.

  Raises:
    OSError: they cannot be read; of an object store, after several tries.
  """
  if not files.is_remote(path):
    with open(path, "rb") as file:
      file.seek(start)
      return file.read(stop - start)
  system, name = files.system_of(path)
  return patient.ask(path, lambda: system.cat_file(name, start=start, end=stop))


def version(path: epath.Path) -> dict[str, str]:
  """Returns size and version of an object."""
  system, name = files.system_of(path)
  info = patient.ask(path, lambda: system.info(name))
  return {key: str(info[key]) for key in _VERSION if info.get(key) is not None}


def _root() -> pathlib.Path:
  if configured := os.environ.get("LAVIT_FETCHED"):
    return pathlib.Path(configured)
  return files.user_cache("fetched")


def _is_complete(path: pathlib.Path, size: int) -> bool:
  return path.is_file() and path.stat().st_size == size


def _check_room(source, target, needed):
  """Raises DataError if the disk has too little room for the copies."""
  free = shutil.disk_usage(target).free
  if needed and needed + _RESERVED > free:
    raise errors.DataError(
      f"{source} must be copied to {target}, {needed / 1e9:.1f} GB, but only"
      f" {free / 1e9:.1f} GB are free there. Set LAVIT_FETCHED to a folder on a"
      " larger disk, or make room."
    )


def _copy(source: epath.Path, target: pathlib.Path, size: int) -> None:
  """Copies one object; several processes of a machine may do so at once."""
  partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
  try:
    with source.open("rb") as remote, partial.open("wb") as local:
      shutil.copyfileobj(remote, local, 1 << 22)
    if (copied := partial.stat().st_size) != size:
      raise errors.DataError(
        f"{source} had {size} bytes, but {copied} were copied: it was changed"
        " or truncated meanwhile. Give the same command again."
      )
    os.replace(partial, target)
  finally:
    partial.unlink(missing_ok=True)
