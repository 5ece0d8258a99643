"""Fingerprints of stored weights and files: what they are, not where.

Hex digests of all bytes. Arrays are read one by one, so that memory holds the
largest; what was read once in a process is remembered. A gigabyte takes about
a second; what took as long is kept in the user's cache folder, and read again
when a file of the weights has changed.
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
_WORTH_KEEPING = 1.0  # seconds of reading


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
  return _digest(directory, ((name, branch),))


def of_words(directory) -> str:
  """Digest of the weights that make words: encoder, then tokenizer.

  What a code cache holds of the tokenizer that made it.
  """
  parts = (("encoder", ""), ("tokenizer", ""))
  return _digest(directory, parts)


def of_file(path) -> str:
  """Digest of a file's bytes."""
  with files.place(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def of_bytes(data: bytes) -> str:
  """What `of_file` tells of a file that holds these."""
  return hashlib.sha256(data).hexdigest()[:_DIGITS]


def _digest(directory, parts):
  directory = os.fspath(files.absolute(directory))
  stamps = tuple(_stamp(directory, name) for name, _ in parts)
  path = _folder() / of_bytes(repr((directory, parts, stamps)).encode())
  if found := _kept(path):
    return found
  digest, seconds = _digested(directory, parts, stamps)
  found = digest.hexdigest()[:_DIGITS]
  if seconds >= _WORTH_KEEPING:
    _keep(path, found)
  return found


def _folder() -> pathlib.Path:
  """Where digests are kept: XDG_CACHE_HOME or ~/.cache."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "lavit_jax" / "fingerprints"


def _kept(path):
  """The digest in a file, None if it holds none."""
  try:
    found = path.read_text()
  except (OSError, ValueError):
    return None
  return found if re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", found) else None


def _keep(path, digest):
  """Keeps a digest; a folder that cannot be written is no fault."""
  unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(digest)
    os.replace(unfinished, path)
  except OSError as error:
    _LOG.info("%s is not written (%s); weights are read again", path, error)


def _stamp(directory, name):
  """What changes when a part is written anew, or its weights exchanged."""
  checkpoints.read_meta(directory, name)  # or it says what is missing
  path = files.place(directory) / name / "part.json"
  if files.is_remote(path):
    return tuple(fetched.version(path).items())
  told = []
  for inside in sorted(path.parent.rglob("*")):
    if inside.is_file():
      found, name = inside.stat(), str(inside.relative_to(path.parent))
      told.append((name, found.st_mtime_ns, found.st_ino, found.st_size))
  return tuple(told)


@functools.lru_cache(maxsize=16)
def _digested(directory, parts, stamps):
  """(a digest that has taken in branches of parts, seconds that it took)."""
  if not parts:
    return hashlib.sha256(), 0.0
  before, seconds = _digested(directory, parts[:-1], stamps[:-1])
  digest, begun = before.copy(), time.monotonic()
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
