"""Fingerprints the contents of a source: everything that a run learns from."""

import hashlib
from typing import Any

from lavit_jax.data import examples
from lavit_jax.data.records import lines

_EXAMPLES_HASHED = 16  # of each task
_CHUNK = 1 << 20  # bytes read at once: an array may be one line


def is_stored(source: examples.Source) -> bool:
  """Returns whether a source's examples are stored, and not computed."""
  return (
    isinstance(source, examples.HasContents)
    or getattr(source, "path", None) is not None
  )


def of(source: examples.Source) -> str:
  """Returns a hex digest of the images' names, the texts and their order.

  Two sources with the same digest give a run the same rows, unless images were
  replaced under their names. Costs a fraction of reading the source: no image
  is opened, and no text is tokenized.

  A source that has `contents` computes the digest itself. Of a source that is
  read from a file (`path`) all lines are hashed, unpacked, without blank lines
  and line ends; where examples are computed, a few of each task. Names and
  order of the images and the number of examples of each task are added, which
  also distinguishes the splits of a file.
  """
  if isinstance(source, examples.HasContents):
    return source.contents()
  digest = hashlib.sha256(examples.fingerprint(source).encode())
  if (path := getattr(source, "path", None)) is not None:
    with lines.unpacked(path) as file:
      _hash_lines(file, digest)
  for task in source.tasks():
    count = source.num_examples(task)
    digest.update(f"{task} {count}\n".encode())
    if path is None:
      for i in range(0, count, -(-count // _EXAMPLES_HASHED) or 1):
        text = repr(source.example(task, i))
        digest.update(text.encode(errors="surrogatepass"))
  return digest.hexdigest()[:32]


def _hash_lines(file: Any, digest: Any, chunk: int = _CHUNK) -> Any:
  r"""Adds every line that is not blank, stripped and ended by "\n".

  Reads `chunk` bytes at once. White space is held back until it is known
  whether it ends the line.

  Args:
    file: binary file.
    digest: hashlib object to update.
    chunk: bytes.

  Returns:
    The digest.
  """
  in_line, space = False, b""
  while piece := file.readline(chunk):
    ends = piece.endswith(b"\n")
    text = piece if in_line else piece.lstrip()
    stripped = text.rstrip()
    if stripped:
      digest.update(space + stripped if in_line else stripped)
      in_line, space = True, b""
    if in_line:
      space += text[len(stripped) :]
    if ends and in_line:
      digest.update(b"\n")
      in_line, space = False, b""
  if in_line:
    digest.update(b"\n")
  return digest
