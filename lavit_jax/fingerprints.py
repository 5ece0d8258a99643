"""Fingerprints of stored weights and files: what they are, not where.

Hex digests of all bytes. Arrays are read one by one, so that memory holds the
largest; what was read once in a process is remembered. A gigabyte takes about
a second.
"""

import functools
import hashlib
import os

import numpy as np

from lavit_jax import checkpoints, fetched, files

_DIGITS = 32


def of_part(directory, name: str, branch: str = "") -> str:
  """Digest of the weights of one part of a model directory.

  Args:
    directory: a model directory.
    name: of checkpoints.PARTS.
    branch: path of a branch of the weights, such as "decoder"; "" for all.
      The same wherever it is kept: only paths within it count.

  Raises:
    errors.CheckpointError: there is no such part, or it is damaged.
  """
  return _digest(directory, ((name, branch),)).hexdigest()[:_DIGITS]


def of_words(directory) -> str:
  """Digest of the weights that make words: encoder, then tokenizer.

  What a code cache holds of the tokenizer that made it.
  """
  parts = (("encoder", ""), ("tokenizer", ""))
  return _digest(directory, parts).hexdigest()[:_DIGITS]


def of_file(path) -> str:
  """Digest of a file's bytes."""
  with files.place(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def _digest(directory, parts):
  directory = os.fspath(files.absolute(directory))
  stamps = tuple(_stamp(directory, name) for name, _ in parts)
  return _digested(directory, parts, stamps).copy()


def _stamp(directory, name):
  """What changes when a part is written anew."""
  checkpoints.read_meta(directory, name)  # or it says what is missing
  path = files.place(directory) / name / "part.json"
  if files.is_remote(path):
    return tuple(fetched.version(path).items())
  found = path.stat()
  return found.st_mtime_ns, found.st_ino, found.st_size


@functools.lru_cache(maxsize=16)
def _digested(directory, parts, stamps):
  """A digest that has taken in some branches of parts, in order."""
  if not parts:
    return hashlib.sha256()
  digest = _digested(directory, parts[:-1], stamps[:-1]).copy()
  name, branch = parts[-1]
  stored = checkpoints.StoredPart(directory, name)
  for path in stored.arrays:
    if branch and path != branch and not path.startswith(f"{branch}/"):
      continue
    keys = path.removeprefix(branch).strip("/").split("/")
    # As JAX writes a path of names in a tree.
    digest.update("".join(f"[{key!r}]" for key in keys).encode())
    array = np.ascontiguousarray(stored.read(path))
    digest.update(array.reshape(-1).view(np.uint8))
  return digest
