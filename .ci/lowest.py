"""Prints setup.py's requirements at their lower bounds, as pip constraints.

What the package itself requires, and setup.py's OPTIONAL of its extras. The
tests' own tools and PyTorch are the newest on every lane, and no lane installs
the extra gcs.
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
  told = runpy.run_path(str(root / "setup.py"))
  for requirement in (*told["REQUIRED"], *told["OPTIONAL"]):
    found = _BOUND.match(requirement)
    if found is None:
      raise SystemExit(
        f".ci/lowest.py: {requirement!r} of setup.py has no lower bound of the"
        " form name>=version: give it one that this lane can install."
      )
    print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
  main()
