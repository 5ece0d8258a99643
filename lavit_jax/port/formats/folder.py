"""Destination folders, which appear complete or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints


def partial_of(destination: pathlib.Path) -> pathlib.Path:
  """Returns the folder in which a destination is built."""
  return destination.with_name(f".{destination.name}.partial")


@contextlib.contextmanager
def building(destination: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a new folder, which becomes `destination` when the block ends.

  Leftovers of an interrupted call are removed first. After an error inside
  nothing remains. Where `destination` exists already, the entries of the new
  folder are moved into it one by one, each of them complete; an existing entry
  is never replaced.

  Raises:
    errors.CheckpointError: the disk is full or the folder not writable.
  """
  path = pathlib.Path(destination).absolute()
  partial = partial_of(path)
  try:
    if partial.exists():
      shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    _publish(partial, path)
  except OSError as e:
    if isinstance(e, FileNotFoundError):
      raise
    raise errors.CheckpointError(
      f"{path} could not be written: {e}. Free some space or choose another"
      " folder, then run the same command again."
    ) from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _publish(partial, destination):
  if destination.exists() and not any(destination.iterdir()):
    destination.rmdir()
  if not destination.exists():
    os.replace(partial, destination)
    return
  moved = []
  try:
    # Parts come last: once a part is there, the files that it needs are too.
    for path in sorted(partial.iterdir(), key=_is_part):
      moved += _move(path, destination / path.name)
  except BaseException:
    for path in reversed(moved):
      _remove(path)
    raise


def _is_part(path):
  return path.name in checkpoints.PARTS


def _move(path, target):
  """Moves an entry unless the target exists; merges folders that are no part.

  Returns:
    The new paths.
  """
  if target.is_dir() and path.is_dir() and not _is_part(path):
    return [m for p in path.iterdir() for m in _move(p, target / p.name)]
  if _is_part(path) and target.exists():
    raise errors.UsageError(
      f"{target} has appeared in the meantime: another import is writing to"
      " the same folder."
    )
  if target.exists():  # a small file, the same for every part
    return []
  path.rename(target)
  return [target]


def _remove(path):
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def write_files(directory: pathlib.Path, contents: Mapping[str, bytes]) -> None:
  """Writes files, making their folders.

  Args:
    directory: the root.
    contents: by path under the root.
  """
  for name, data in contents.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def require_free(
  destination: str | os.PathLike,
  parts: Collection[str],
  tokenizer_model: bytes | None,
) -> None:
  """Checks that an import would not have to overwrite anything.

  Args:
    destination: the future model directory.
    parts: those to be written.
    tokenizer_model: the tokenizer.model that comes with them, or None.

  Raises:
    errors.UsageError: the destination has one of the parts or another
      tokenizer.model, or is no model directory.
  """
  destination = pathlib.Path(destination)
  if not destination.exists():
    return
  if not destination.is_dir():
    raise errors.UsageError(
      f"{destination} is a file; expected a new directory or a model"
      " directory. Choose another name."
    )
  present = checkpoints.parts_in(destination)
  if twice := [part for part in parts if part in present]:
    raise errors.UsageError(
      f"{destination} already has {', '.join(twice)}. Choose another"
      " directory, or import only parts that it does not have with --only."
    )
  if any(destination.iterdir()) and not present:
    raise errors.UsageError(
      f"{destination} is not empty and is no model directory. Choose another"
      " name."
    )
  existing = destination / "tokenizer.model"
  if (
    tokenizer_model is not None
    and existing.is_file()
    and existing.read_bytes() != tokenizer_model
  ):
    raise errors.UsageError(
      f"{existing} differs from the tokenizer.model of the language model to"
      " be imported: the same ids would stand for other text. Choose another"
      " directory."
    )


def require_new(destination: str | os.PathLike) -> None:
  """Raises UsageError unless the path is free or an empty folder."""
  destination = pathlib.Path(destination)
  if destination.exists() and (
    not destination.is_dir() or any(destination.iterdir())
  ):
    raise errors.UsageError(
      f"{destination} exists and is not an empty directory, and nothing is"
      " overwritten. Choose another name."
    )
