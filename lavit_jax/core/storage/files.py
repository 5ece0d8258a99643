"""Paths and files on a disk or in an object store such as gs://.

Files are written atomically in both. Growing logs: `log_files.py`.
"""

import io
import os
import pathlib
import secrets
from typing import Any

from etils import epath

from lavit_jax.core import errors

PathLike = str | os.PathLike[str]

_PATTERN = "*?["  # characters that make a name a pattern


def is_remote(path: PathLike) -> bool:
  """Returns whether a path is in an object store."""
  return "://" in os.fspath(path)


def path_of(path: PathLike) -> epath.Path:
  """Returns an epath.Path on this disk or in an object store.

  Raises:
    errors.ConfigError: this installation cannot reach the store.
  """
  path = os.fspath(path)
  if not is_remote(path):
    return epath.Path(path)
  if not path.startswith("gs://"):
    raise errors.ConfigError(
      f"{path} is in an unknown kind of store. Give a folder, or"
      " gs://BUCKET/FOLDER."
    )
  remote = epath.Path(path)
  try:
    remote.exists()
  except ImportError as e:
    raise errors.ConfigError(
      f"{path} is in Google Cloud Storage, which needs more packages:"
      " pip install 'lavit_jax[gcs]'"
    ) from e
  return remote


def input_path(path: PathLike) -> Any:
  """Returns a path to read from.

  It is a pathlib.Path on this disk, an epath.Path in an object store.
  """
  return path_of(path) if is_remote(path) else pathlib.Path(path)


def user_cache(name: str) -> pathlib.Path:
  """Returns a folder of the user's caches: in XDG_CACHE_HOME or ~/.cache."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "lavit_jax" / name


def same(a: PathLike | None, b: PathLike | None) -> bool:
  """Returns whether two paths are not empty and name the same folder."""
  paths = [os.fspath(path or "").rstrip("/") for path in (a, b)]
  real = [p if is_remote(p) else os.path.realpath(p) for p in paths]
  return all(paths) and real[0] == real[1]


def require_local(path: PathLike, what: str) -> None:
  """Checks that a path to write to is on a disk.

  Args:
    path: to write to.
    what: subject of the message, such as "A model folder".

  Raises:
    errors.UsageError: it is in an object store.
  """
  if is_remote(path):
    raise errors.UsageError(
      f"{os.fspath(path)}: {what} is written to a disk. Give a folder here,"
      f" then copy it: gcloud storage cp -r FOLDER {os.fspath(path)}"
    )


def absolute(path: PathLike) -> epath.Path:
  """Returns an absolute path, on this disk or in an object store."""
  epath_path = path_of(path)
  return epath_path if is_remote(path) else epath_path.absolute()


def check_arrays_folder(path: PathLike, *, write: bool) -> None:
  """Checks that Orbax can keep arrays in a folder of this name.

  Orbax finds the files of each process by a pattern that begins with the name
  of the folder, unescaped: with brackets it finds nothing, with * or ? perhaps
  files of another folder. TensorStore takes a backslash for a slash.

  Args:
    path: of a checkpoint, or of a folder for checkpoints.
    write: whether arrays are to be written; existing ones can be read from a
      folder with brackets.

  Raises:
    errors.CheckpointError: the absolute path has such a character.
  """
  full = os.fspath(path) if is_remote(path) else os.path.abspath(path)
  bad = [c for c in (_PATTERN if write else "") + "\\" if c in full]
  bad += ["**"] if "**" in full and not write else []
  if bad:
    raise errors.CheckpointError(
      f"{full} has {' and '.join(bad)} in its name: Orbax and TensorStore,"
      " which store the arrays, would look for them elsewhere and lose them."
      " Give a folder without these characters"
      + ("." if write else ", or rename this one.")
    )


def listing(folder: epath.Path) -> list[epath.Path]:
  """Returns the contents of a folder; nothing if it does not exist.

  In an object store a folder exists only while there is something in it.
  """
  try:
    return list(folder.iterdir())
  except FileNotFoundError:
    return []


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder to a path that does not exist; creates its parents.

  In an object store every object is copied, within the store, before any is
  removed: a kill leaves the old folder or the new one complete.
  """
  if not is_remote(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return
  # epath does not move into a folder that does not exist, and releases of
  # gcsfs treat folders differently: so single objects are copied.
  system, old = system_of(source)
  _, new = system_of(target)
  system.invalidate_cache()
  names = system.find(old)
  system.copy(names, [new + name[len(old) :] for name in names])
  source.rmtree()


def system_of(path: PathLike) -> tuple[Any, str]:
  """Returns fsspec's file system for a path, and the path in it."""
  import fsspec.core  # optional extra: a dependency of gcsfs

  return fsspec.core.url_to_fs(os.fspath(path))


def open_bytes(path: PathLike) -> io.BufferedReader:
  """Opens a file to read, with `peek`, which object stores' files lack."""
  file = input_path(path).open("rb")
  return file if hasattr(file, "peek") else io.BufferedReader(file)


def write_whole(path: epath.Path, data: bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  if is_remote(path):
    path.write_bytes(data)
    return
  # Of a name that nobody has: `path` may be one of several of the user's files.
  partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
  try:
    partial.write_bytes(data)
    partial.replace(path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
