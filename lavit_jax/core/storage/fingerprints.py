"""Fingerprints of stored weights and files, which do not depend on their path.

Fingerprints are hex digests of all bytes. Arrays are read one by one, so that
memory holds only the largest. Results are remembered within a process. A
gigabyte takes about a second; results that took that long are kept in the
user's cache folder until a file of the weights changes.
"""

import functools
import hashlib
import logging
import os
import pathlib
import re
import secrets
import time

import numpy as np

from lavit_jax.core.storage import checkpoints, fetched, files

_LOG = logging.getLogger(__name__)
_DIGITS = 32
_MIN_SECONDS = 1.0  # results that took less are not kept


def of_part(directory: files.PathLike, name: str, branch: str = "") -> str:
  """Returns the fingerprint of one part's weights.

  Args:
    directory: a model directory.
    name: one of `checkpoints.PARTS`.
    branch: path of a branch of the weights, such as "decoder"; "" for all.
      Only paths within the branch count, not its own.

  Raises:
    errors.CheckpointError: the part is missing or damaged.
  """
  return _fingerprint(directory, ((name, branch),))


def of_tokenizer(directory: files.PathLike) -> str:
  """Returns the fingerprint of encoder and tokenizer together.

  A code cache stores it for the tokenizer that computed the codes.
  """
  parts = (("encoder", ""), ("tokenizer", ""))
  return _fingerprint(directory, parts)


def of_file(path: files.PathLike) -> str:
  """Returns the fingerprint of a file's bytes."""
  with files.input_path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def of_bytes(data: bytes) -> str:
  """Returns the fingerprint of a file with this content."""
  return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _fingerprint(directory, parts):
  directory = os.fspath(files.absolute(directory))
  stamps = tuple(_stamp(directory, name) for name, _ in parts)
  path = _folder() / of_bytes(repr((directory, parts, stamps)).encode())
  if stored := _stored(path):
    return stored
  digest, seconds = _digested(directory, parts, stamps)
  fingerprint = digest.hexdigest()[:_DIGITS]
  if seconds >= _MIN_SECONDS:
    _store(path, fingerprint)
  return fingerprint


def _folder() -> pathlib.Path:
  """Returns the cache folder of fingerprints."""
  return files.user_cache("fingerprints")


def _stored(path):
  """Returns the fingerprint in a file, None if it has none."""
  try:
    text = path.read_text()
  except (OSError, ValueError):
    return None
  return text if re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", text) else None


def _store(path, fingerprint):
  """Stores a fingerprint; it is no error if the folder is not writable."""
  unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(fingerprint)
    os.replace(unfinished, path)
  except OSError as error:
    _LOG.info(
      "%s cannot be written (%s); weights will be read again", path, error
    )


def _stamp(directory, name):
  """Returns a value that changes whenever the files of a part change."""
  checkpoints.read_meta(directory, name)  # raises if the part is missing
  path = files.input_path(directory) / name / "part.json"
  if files.is_remote(path):
    return tuple(fetched.version(path).items())
  stamps = []
  for file in sorted(path.parent.rglob("*")):
    if file.is_file():
      stat, name = file.stat(), str(file.relative_to(path.parent))
      stamps.append((name, stat.st_mtime_ns, stat.st_ino, stat.st_size))
  return tuple(stamps)


@functools.lru_cache(maxsize=16)
def _digested(directory, parts, stamps):
  """Returns the hash object of branches of parts, and the seconds it took."""
  if not parts:
    return hashlib.sha256(), 0.0
  previous, seconds = _digested(directory, parts[:-1], stamps[:-1])
  digest, begun = previous.copy(), time.monotonic()
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
  return digest, seconds + time.monotonic() - begun
