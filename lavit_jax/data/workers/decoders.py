"""Decodes images in other processes, which share memory with this one.

Threads of this process read the encoded images and build the rows; each waits
while another process decodes for it. Pixels are never pickled. A process that
ends, or takes longer than `timeout`, is replaced by a new one, which tries the
same image again; after three of them the image is a bad one.

In the file that a process shares are the square, then the encoded image and
its name.
"""

import contextlib
import logging
import mmap
import os
import pathlib
import queue
import select
import struct
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from lavit_jax.core import image_io
from lavit_jax.core.storage import files
from lavit_jax.data.images import decoding
from lavit_jax.data.workers import process

_LOG = logging.getLogger(__name__)
_TRIES = 3  # processes that an image may take with it
_TIMEOUT = 10.0  # seconds that an image may take
_SPACE = 96 << 20  # bytes that a process shares; what is not used takes none
_MOST_SIDE = 2048  # pixels of a square
# What is asked: whether the image is a path, its length, that of its name (0:
# none), side of the square.
_QUESTION = struct.Struct("<BIII")
_ANSWER = struct.Struct("<BI")  # what came of it, and the length of a message
_DONE, _BAD, _FAULT = range(3)
_MEMORY = pathlib.Path("/dev/shm")


class Decoders:
  """A `decoding.Decode` of several processes, which start when first needed.

  Any number of threads may call it.
  """

  def __init__(
    self, count: int, way: str = "exact", timeout: float = _TIMEOUT
  ) -> None:
    """Starts nothing yet.

    Args:
      count: number of processes.
      way: one of decoding.WAYS.
      timeout: seconds after which a process that decodes one image is replaced.

    Raises:
      errors.ConfigError: there is no such way.
      errors.DataError: it needs libraries that are not installed.
    """
    decoding.way(way)
    self._way, self._timeout = way, timeout
    self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
    for _ in range(count):
      self._free.put(None)
    self._lock = threading.Lock()
    self._all: set[_Worker] = set()

  def __call__(
    self, source: Any, side: int, name: str | None = None
  ) -> np.ndarray:
    """Returns the square of an image, as `decoding.exact` or `decoding.fast`.

    Args:
      source: as `image_io.load` takes it; paths and bytes go to a process.
      side: of the square, in pixels.
      name: of the image in errors; by default its path.

    Returns:
      uint8[side, side, 3].

    Raises:
      image_io.ImageError: it cannot be decoded, or processes end at it.
    """
    is_path = isinstance(source, str | os.PathLike)
    if is_path and not files.is_remote(source):
      data, name = os.fsencode(source), name or str(source)
    elif isinstance(source, bytes):
      data, is_path = source, False
    else:
      return decoding.way(self._way)(source, side, name)
    if len(data) > _SPACE // 2 or side > _MOST_SIDE:
      return decoding.way(self._way)(source, side, name)
    for _ in range(_TRIES):
      worker = self._free.get()
      try:
        worker = worker or self._start()
        return worker.decode(data, is_path, side, name or "", self._timeout)
      except _Ended as error:
        reason = str(error)
        _LOG.warning("a process that decodes is replaced: %s", error)
        if worker is not None:
          self._end(worker)
        worker = None
      finally:
        self._free.put(worker)
    raise image_io.ImageError(
      f"{name or f'<{len(data)} bytes>'}: {_TRIES} processes failed one after"
      f" the other to decode it ({reason}); replace or remove it."
    )

  def _start(self) -> "_Worker":
    worker = _Worker(self._way)
    with self._lock:
      self._all.add(worker)
    return worker

  def _end(self, worker) -> None:
    with self._lock:
      self._all.discard(worker)
    worker.kill()

  def close(self) -> None:
    """Ends all processes; those that are needed again start anew."""
    with self._lock:
      some, self._all = self._all, set()
    for worker in some:
      worker.kill()

  def __del__(self):
    with contextlib.suppress(Exception):  # Python ends
      self.close()


class _Ended(Exception):
  """A process has ended, or takes too long."""


class _Worker:
  """A process that decodes, and the memory that it shares."""

  def __init__(self, way):
    folder = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryFile(dir=folder) as file:
      file.truncate(_SPACE)
      self._memory = mmap.mmap(file.fileno(), _SPACE)
      self._process = process.start(
        "lavit_jax.data.workers.decoders", [file.fileno()]
      )
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    self._pixels = np.frombuffer(self._memory, np.uint8)
    self._in, self._out = self._process.stdin, self._process.stdout.fileno()
    self._send(way.encode() + b"\n")

  def _send(self, data):
    try:
      os.write(self._in.fileno(), data)  # less than a pipe holds
    except (OSError, ValueError) as error:
      raise _Ended(self._why()) from error

  def decode(self, data, is_path, side, name, timeout) -> np.ndarray:
    """Returns the square of an image.

    Raises:
      image_io.ImageError: it cannot be decoded.
      _Ended: the process has ended, or takes longer than `timeout`.
    """
    size, named = 3 * side * side, name.encode(errors="surrogatepass")
    try:
      end = size + len(data)
      self._memory[size:end] = data
      self._memory[end : end + len(named)] = named
    except ValueError as error:  # it was closed
      raise _Ended("it was ended") from error
    self._send(_QUESTION.pack(is_path, len(data), len(named), side))
    stop = time.monotonic() + timeout
    status, length = _ANSWER.unpack(self._receive(_ANSWER.size, stop, timeout))
    if status != _DONE:
      message = self._receive(length, stop, timeout).decode()
      if status == _BAD:
        raise image_io.ImageError(message)
      raise RuntimeError(f"in another process: {message}")
    return self._pixels[:size].reshape(side, side, 3).copy()

  def _receive(self, count, stop, timeout) -> bytes:
    data = b""
    while len(data) < count:
      left = stop - time.monotonic()
      if left <= 0 or not select.select([self._out], [], [], left)[0]:
        raise _Ended(f"an image took more than {timeout:g} seconds")
      try:
        part = os.read(self._out, count - len(data))
      except OSError as error:
        raise _Ended("it was ended") from error
      if not part:
        raise _Ended(self._why())
      data += part
    return data

  def _why(self):
    with contextlib.suppress(Exception):
      self._process.wait(timeout=5)
    return f"it has ended by itself (status {self._process.poll()})"

  def kill(self) -> None:
    """Ends the process."""
    process.kill(self._process)


def main() -> None:
  """Decodes what the parent asks for."""
  memory = mmap.mmap(int(sys.argv[1]), _SPACE)
  pixels = np.frombuffer(memory, np.uint8)
  questions = sys.stdin.buffer
  answers = os.fdopen(os.dup(1), "wb", buffering=0)
  os.dup2(2, 1)  # what is printed meanwhile is no answer
  process.quiet_pillow()
  decode = decoding.way(questions.readline().decode().strip())
  while question := questions.read(_QUESTION.size):
    is_path, length, named, side = _QUESTION.unpack(question)
    start = 3 * side * side
    end = start + length
    data = memory[start:end]
    name = memory[end : end + named].decode(errors="surrogatepass") or None
    try:
      square = decode(os.fsdecode(data) if is_path else data, side, name)
      pixels[:start] = square.reshape(-1)
      status, message = _DONE, ""
    except image_io.ImageError as error:
      status, message = _BAD, str(error)
    except Exception as error:  # told to the parent, which raises it
      status, message = _FAULT, f"{type(error).__name__}: {error}"
    said = message.encode(errors="replace")
    answers.write(_ANSWER.pack(status, len(said)) + said)


if __name__ == "__main__":
  main()
