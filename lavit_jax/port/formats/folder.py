"""A directory that appears whole, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints


def partial_of(destination: pathlib.Path) -> pathlib.Path:
  """Where a directory is built before it gets its name."""
  return destination.with_name(f".{destination.name}.partial")


@contextlib.contextmanager
def building(destination) -> Iterator[pathlib.Path]:
  """A new folder beside `destination`, which takes its place at the end.

  What an interrupted call left there is removed first. After an error inside
  nothing remains. A `destination` that is there already must be a folder: the
  entries built are moved into it one by one, each whole, and an entry of the
  same name is never replaced.

  Raises:
    errors.CheckpointError: the disk is full or the place not writable.
  """
  destination = pathlib.Path(destination).absolute()
  partial = partial_of(destination)
  try:
    if partial.exists():
      shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    _publish(partial, destination)
  except OSError as e:
    if isinstance(e, FileNotFoundError):
      raise
    raise errors.CheckpointError(
      f"{destination} could not be written: {e}. Make room or choose another"
      " place, then give the same command again."
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
    # Parts last: when one is there, what it needs is there too.
    for path in sorted(partial.iterdir(), key=_is_part):
      moved += _move(path, destination / path.name)
  except BaseException:
    for path in reversed(moved):
      _remove(path)
    raise


def _is_part(path):
  return path.name in checkpoints.PARTS


def _move(path, target):
  """Moves an entry to where none is; folders that are no part are joined."""
  if target.is_dir() and path.is_dir() and not _is_part(path):
    return [m for p in path.iterdir() for m in _move(p, target / p.name)]
  if _is_part(path) and target.exists():
    raise errors.UsageError(
      f"{target} has appeared meanwhile: another import writes there too."
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


def require_free(
  destination, parts: Collection[str], words: bytes | None
) -> None:
  """Refuses a model directory that import would have to overwrite.

  Args:
    destination: where the model directory is to be.
    parts: those that are to be made.
    words: tokenizer.model that comes with them, or None.

  Raises:
    errors.UsageError: it has one of the parts, is something else, or has
      another tokenizer.model.
  """
  destination = pathlib.Path(destination)
  if not destination.exists():
    return
  if not destination.is_dir():
    raise errors.UsageError(
      f"{destination} is a file; expected a directory that is new or a model"
      " directory. Choose another name."
    )
  have = checkpoints.parts_in(destination)
  if twice := [part for part in parts if part in have]:
    raise errors.UsageError(
      f"{destination} already has {', '.join(twice)}. Choose another"
      " directory, or import only parts that it lacks with --only."
    )
  if any(destination.iterdir()) and not have:
    raise errors.UsageError(
      f"{destination} is not empty and is no model directory. Choose another"
      " name."
    )
  there = destination / "tokenizer.model"
  if words is not None and there.is_file() and there.read_bytes() != words:
    raise errors.UsageError(
      f"{there} differs from the tokenizer.model of the language model to be"
      " imported: its ids would be other words. Choose another directory."
    )


def require_new(destination) -> None:
  """UsageError unless nothing, or an empty folder, is there."""
  destination = pathlib.Path(destination)
  if destination.exists() and (
    not destination.is_dir() or any(destination.iterdir())
  ):
    raise errors.UsageError(
      f"{destination} exists and is not an empty directory; nothing is"
      " overwritten. Choose another name."
    )
