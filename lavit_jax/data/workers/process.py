"""Starts other processes of this package, which are led by pipes."""

import contextlib
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).parents[3]  # where this package is


def start(module: str, fds: Sequence[int] = ()) -> subprocess.Popen:
  """Starts `python -m MODULE ARGUMENT…`.

  Not by multiprocessing, which runs the script that called all this once more.
  The process has this package and no folder of the user's on its path, and an
  interrupt of the terminal goes to its parent alone.

  Args:
    module: of this package.
    fds: open files that it inherits; their numbers are its arguments.
  """
  path = os.pathsep.join(
    filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
  )
  return subprocess.Popen(
    [sys.executable, "-P", "-m", module, *map(str, fds)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": path},
    pass_fds=fds,
    start_new_session=True,
  )


def quiet_pillow() -> None:
  """Keeps Pillow from printing lines of its source for each odd image.

  What is bad of images is counted and said by us.
  """
  warnings.filterwarnings("ignore", module=r"PIL\.")


def kill(process: subprocess.Popen) -> None:
  """Ends a process, whatever it does, and waits for its end."""
  process.kill()
  process.wait()
  for stream in (process.stdin, process.stdout):
    if stream is not None:
      with contextlib.suppress(OSError):
        stream.close()
