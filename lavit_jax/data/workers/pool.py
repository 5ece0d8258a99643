"""Runs a function of this package in other processes, item after item.

A process that ends or does not answer in time is replaced, and its item tried
again in the new one. Items and answers are JSON; what is large goes through
files.

  for index, answer in pool.run("lavit_jax.x:make", setup, items, count=4):
    …

`make(setup)` is called once in each process and returns a function of an item.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lavit_jax.core import errors, progress
from lavit_jax.data.workers import process

_LOG = logging.getLogger(__name__)
_TRIES = 3  # processes that an item may take with it
_CHUNK = 1 << 16  # bytes read at once
_POLL = 0.1  # seconds between two looks at whether all is over


@dataclasses.dataclass
class _Item:
  """An item, and how often a process has ended at it."""

  index: int
  value: Any
  tries: int = 0


class _Ended(Exception):
  """A process has ended, or was ended because it took too long."""


def run(
  make: str,
  setup: Any,
  items: Sequence[Any],
  *,
  count: int,
  timeout: float = 600.0,
) -> Iterator[tuple[int, Any]]:
  """Yields (index of an item, answer) in the order in which they are ready.

  Args:
    make: "module:function" of this package; function(setup) is called once in
      each process, and returns a function of an item.
    setup: a JSON value.
    items: JSON values.
    count: number of processes.
    timeout: seconds after which a process that works on one item is replaced.

  Raises:
    errors.DataError: the function raised it; or three processes have ended, or
      taken too long, at the same item.
  """
  todo: queue.SimpleQueue[_Item] = queue.SimpleQueue()
  done: queue.SimpleQueue[Any] = queue.SimpleQueue()
  for index, value in enumerate(items):
    todo.put(_Item(index, value))
  over = threading.Event()
  threads = [
    threading.Thread(
      target=_serve,
      args=(make, setup, timeout, todo, done, over),
      daemon=True,
    )
    for _ in range(max(1, min(count, len(items))))
  ]
  for thread in threads:
    thread.start()
  try:
    for _ in range(len(items)):
      found = done.get()
      if isinstance(found, BaseException):
        raise found
      yield found
  finally:
    over.set()
    for thread in threads:
      thread.join()


def shown(
  label: str,
  make: str,
  setup: Any,
  items: Sequence[Any],
  *,
  count: int = 0,
  done: int = 0,
  quiet: bool = False,
  timeout: float = 1800.0,
) -> Iterator[Any]:
  """Yields the answers of `run`, as they come, with a progress bar.

  Args:
    label: of the bar.
    make: see `run`; likewise setup and items.
    setup: see there.
    items: see there.
    count: number of processes; 0: as many as there are cores.
    done: items that were done before, which the bar counts, too.
    quiet: no bar.
    timeout: see `run`.

  Raises:
    errors.DataError: see `run`.
  """
  count = count or os.cpu_count() or 1
  with progress.Progress(
    done + len(items),
    start=done,
    label=label,
    stream=io.StringIO() if quiet else None,
  ) as bar:
    answers = run(make, setup, items, count=count, timeout=timeout)
    for number, (_, answer) in enumerate(answers, done + 1):
      bar.update(number)
      yield answer


def _serve(make, setup, timeout, todo, done, over) -> None:
  """Lets one process after another work on items, until all is over."""
  running = None
  try:
    while not over.is_set():
      try:
        item = todo.get_nowait()
      except queue.Empty:
        over.wait(_POLL)  # an item may come back
        continue
      try:
        running = running or _Process(make, setup)
        done.put((item.index, running.ask(item.value, timeout, over)))
      except _Ended as error:
        if running is not None:
          running.kill()
        running = None
        if over.is_set():
          break
        item.tries += 1
        if item.tries < _TRIES:
          _LOG.warning("a process is replaced: %s", error)
          todo.put(item)
          continue
        done.put(
          errors.DataError(
            f"{_TRIES} processes failed one after the other at the same work"
            f" ({str(item.value)[:80]}): {error}. Perhaps memory is short, or a"
            " disk does not answer. Give the same command again: what is done"
            " is kept."
          )
        )
        break
  except BaseException as error:  # is raised where the answers are read
    done.put(error)
  finally:
    if running is not None:
      running.kill()


class _Process:
  """A process that answers one item after another."""

  def __init__(self, make, setup):
    self._process = process.start("lavit_jax.data.workers.pool")
    self._rest = b""
    self._lines: collections.deque[bytes] = collections.deque()
    self._send([make, setup])

  def _send(self, value):
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(json.dumps(value).encode() + b"\n")
      self._process.stdin.flush()
    except OSError as error:
      raise _Ended(self._why()) from error

  def ask(self, value, timeout, over) -> Any:
    """Returns the answer to an item.

    Raises:
      errors.DataError: the function raised it.
      _Ended: the process has ended, takes too long, or all is over.
    """
    self._send(value)
    end = time.monotonic() + timeout
    while not self._lines:
      if over.is_set():
        raise _Ended("no answer is needed any more")
      if time.monotonic() > end:
        raise _Ended(f"it worked on one item for more than {timeout:g} seconds")
      self._receive()
    kind, answer = json.loads(self._lines.popleft())
    if kind == "error":
      raise errors.DataError(answer)
    if kind == "fault":
      raise RuntimeError(f"in another process: {answer}")
    return answer

  def _receive(self):
    """Takes what the process has written, waiting for a moment."""
    stream = self._process.stdout
    assert stream is not None
    if not select.select([stream], [], [], _POLL)[0]:
      return
    data = os.read(stream.fileno(), _CHUNK)
    if not data:
      raise _Ended(self._why())
    *lines, self._rest = (self._rest + data).split(b"\n")
    self._lines.extend(lines)

  def _why(self):
    with contextlib.suppress(subprocess.TimeoutExpired):
      self._process.wait(timeout=5)
    return f"it has ended by itself (status {self._process.poll()})"

  def kill(self) -> None:
    """Ends the process, whatever it does, and waits for its end."""
    process.kill(self._process)


def main() -> None:
  """Answers the items that standard input has, one a line."""
  answers = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # what is printed meanwhile is no answer
  process.quiet_pillow()
  module, name = (start := json.loads(sys.stdin.readline()))[0].split(":")
  function = None
  for line in sys.stdin:
    try:
      if function is None:
        function = _made(getattr(importlib.import_module(module), name), start)
      answer = ["answer", function(json.loads(line))]
    except errors.LavitError as error:
      answer = ["error", str(error)]
    except Exception as error:  # told to the parent, which raises it
      answer = ["fault", f"{type(error).__name__}: {error}"]
    try:
      answers.write(json.dumps(answer).encode() + b"\n")
      answers.flush()
    except BrokenPipeError:  # nobody is there any more to be told
      os._exit(1)


def _made(make, start):
  """Returns make(setup); what it warns of, the parent has said already."""
  log = logging.getLogger("lavit_jax")
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    return make(start[1])
  finally:
    log.setLevel(level)


if __name__ == "__main__":
  main()
