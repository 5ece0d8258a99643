"""Functions that processes of the pool are asked for in its tests."""

import os
import pathlib
import time

from lavit_jax.core import errors


def make(setup):
  """Doubles numbers; words name what else is to happen."""
  root = pathlib.Path(setup["root"])
  if setup.get("broken"):
    raise errors.DataError("the data are gone")

  def answer(item):
    (root / f"started.{os.getpid()}").touch()
    if isinstance(item, int):
      print("what is printed is no answer")
      return 2 * item
    name, rest = item.split()
    first = not (root / f"{name}.{rest}").exists()
    (root / f"{name}.{rest}").touch()
    if name == "die" and first:
      os._exit(9)
    if name == "hang" and first:
      time.sleep(60)
    if name == "always":
      os._exit(9)
    if name == "refuse":
      raise errors.DataError(f"{rest} is refused")
    if name == "fail":
      raise ValueError(rest)
    return name

  return answer
