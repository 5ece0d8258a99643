"""Prints setup.py's requirements at their lower bounds, as pip constraints.

Only what the package itself requires: the tests' own tools, and PyTorch with
what belongs to it, are the newest on every lane.
"""

import pathlib
import re
import runpy

import setuptools

_BOUND = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)$")


def main():
  """Reads the list without building anything."""
  setuptools.setup = lambda **kwargs: None
  root = pathlib.Path(__file__).resolve().parents[1]
  required = runpy.run_path(str(root / "setup.py"))["REQUIRED"]
  for requirement in required:
    found = _BOUND.match(requirement)
    if found is None:
      raise SystemExit(
        f".ci/lowest.py: {requirement!r} of setup.py has no lower bound of the"
        " form name>=version: give it one that this lane can install."
      )
    print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
  main()
