"""What a source holds, as a fingerprint: all that a run learns from it."""

import hashlib

from lavit_jax.data import examples
from lavit_jax.data.records import lines

_LOOKED_AT = 16  # examples of each task
_CHUNK = 1 << 20  # bytes read at once: an array may be one line


def of(source: examples.Source) -> str:
  """Hex digest of images' names, texts and their order; not of pixels.

  A source that has `contents` tells its own. Of one made of a file (`path`)
  its lines are taken in, unpacked, blank ones and line ends apart; else, where
  examples are computed, a few of each task. Then names and order of the
  images, and the number of examples of each task, which also tell one part
  of a file from another. So it costs a fraction of reading the source: no
  image is opened, and no text is tokenized.

  Two sources of one digest give a run the same rows, unless images were
  replaced under their names.
  """
  if hasattr(source, "contents"):
    return source.contents()
  digest = hashlib.sha256(examples.fingerprint(source).encode())
  if (path := getattr(source, "path", None)) is not None:
    with lines.unpacked(path) as file:
      _digest_of(file, digest)
  for task in source.tasks():
    count = source.num_examples(task)
    digest.update(f"{task} {count}\n".encode())
    if path is None:
      for i in range(0, count, -(-count // _LOOKED_AT) or 1):
        told = repr(source.example(task, i))
        digest.update(told.encode(errors="surrogatepass"))
  return digest.hexdigest()[:32]


def _digest_of(file, digest, chunk=_CHUNK):
  """The digest with every line that is not blank, stripped, and its end.

  Reads `chunk` bytes at once; holds the white space that may end a line.
  """
  begun, space = False, b""
  while piece := file.readline(chunk):
    ends = piece.endswith(b"\n")
    text = piece if begun else piece.lstrip()
    kept = text.rstrip()
    if kept:
      digest.update(space + kept if begun else kept)
      begun, space = True, b""
    if begun:
      space += text[len(kept) :]
    if ends and begun:
      digest.update(b"\n")
      begun, space = False, b""
  if begun:
    digest.update(b"\n")
  return digest
