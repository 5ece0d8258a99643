"""Files of a run, on a disk or in an object store such as gs://.

Whole files are there at once or not at all in both. Logs: `log_files.py`.
"""

import io
import os
import pathlib

from etils import epath

from lavit_jax.core import errors

_PATTERN = "*?["  # what makes a name a pattern


def is_remote(path) -> bool:
  """Whether a path is in an object store."""
  return "://" in os.fspath(path)


def path_of(path) -> epath.Path:
  """A path here or in an object store.

  Raises:
    errors.ConfigError: a store that this installation cannot reach.
  """
  path = os.fspath(path)
  if not is_remote(path):
    return epath.Path(path)
  if not path.startswith("gs://"):
    raise errors.ConfigError(
      f"{path} is in a store that is not known here. Give a folder, or"
      " gs://BUCKET/FOLDER."
    )
  found = epath.Path(path)
  try:
    found.exists()
  except ImportError as e:
    raise errors.ConfigError(
      f"{path} is in Google Cloud Storage, which needs more packages:"
      " pip install 'lavit_jax[gcs]'"
    ) from e
  return found


def place(path) -> pathlib.Path | epath.Path:
  """What the user gave, to read from: a pathlib.Path, or of an object store."""
  return path_of(path) if is_remote(path) else pathlib.Path(path)


def same(a, b) -> bool:
  """Whether two paths, not empty, mean one folder."""
  found = [os.fspath(path or "").rstrip("/") for path in (a, b)]
  whole = [p if is_remote(p) else os.path.realpath(p) for p in found]
  return all(found) and whole[0] == whole[1]


def require_local(path, what: str) -> None:
  """Refuses to write to an object store what needs a disk.

  Raises:
    errors.UsageError: `path` is in one; `what` is what would be written.
  """
  if is_remote(path):
    raise errors.UsageError(
      f"{os.fspath(path)}: {what} is written to a disk. Give a folder here,"
      f" then copy it: gcloud storage cp -r FOLDER {os.fspath(path)}"
    )


def absolute(path) -> epath.Path:
  """A path that stays what it is when the current folder changes."""
  found = path_of(path)
  return found if is_remote(path) else found.absolute()


def check_arrays_folder(path, *, write: bool) -> None:
  """Refuses folders whose names would lose the arrays that Orbax keeps there.

  Orbax finds what each process has written by a pattern that begins with the
  name of the folder, unescaped: with brackets nothing is found, with * or ?
  perhaps what is another folder's. TensorStore takes a backslash for a slash.

  Args:
    path: of a checkpoint, or of a folder that will hold some.
    write: whether arrays are to be written; what is there already can be read
      from a folder with brackets.

  Raises:
    errors.CheckpointError: there is such a character in its whole path.
  """
  whole = os.fspath(path) if is_remote(path) else os.path.abspath(path)
  found = [c for c in (_PATTERN if write else "") + "\\" if c in whole]
  found += ["**"] if "**" in whole and not write else []
  if found:
    raise errors.CheckpointError(
      f"{whole} has {' and '.join(found)} in its name: Orbax and TensorStore,"
      " which keep the arrays, would look for them elsewhere and lose them."
      " Give a folder without these characters"
      + ("." if write else ", or rename this one.")
    )


def listing(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder; nothing if it is not there.

  In an object store a folder that was just made is not: it is there while
  something is in it.
  """
  try:
    return list(folder.iterdir())
  except FileNotFoundError:
    return []


def move_folder(source: epath.Path, target: epath.Path) -> None:
  """Moves a folder to where none is; makes what it will be in.

  In an object store every object is copied, by the store, before any is
  removed: a kill leaves the old folder whole, or the new one.
  """
  if not is_remote(target):
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return
  # epath moves nothing into a folder that is not there, and releases of gcsfs
  # differ in what they do with a folder: they are given the objects.
  system, start = system_of(source)
  _, end = system_of(target)
  system.invalidate_cache()
  found = system.find(start)
  system.copy(found, [end + name[len(start) :] for name in found])
  source.rmtree()


def system_of(path):
  """Gives the file system that fsspec has for a path, and its path there."""
  import fsspec.core  # a dependency of gcsfs, not of this package

  return fsspec.core.url_to_fs(os.fspath(path))


def open_bytes(path) -> io.BufferedReader:
  """Opens a file to read, with `peek`, which object stores' files lack."""
  file = place(path).open("rb")
  return file if hasattr(file, "peek") else io.BufferedReader(file)


def write_whole(path: epath.Path, data: bytes) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  if is_remote(path):
    path.write_bytes(data)
    return
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(data)
  partial.replace(path)
