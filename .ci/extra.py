"""Prints what an extra of setup.py asks for, one requirement a line.

  pip install $(python .ci/extra.py docs)

So the site is built without installing the package and all that it requires.
"""

import pathlib
import runpy
import sys

import setuptools


def main(extra: str) -> None:
  """Reads the list without building anything."""
  setuptools.setup = lambda **kwargs: None
  root = pathlib.Path(__file__).resolve().parents[1]
  print("\n".join(runpy.run_path(str(root / "setup.py"))["EXTRAS"][extra]))


if __name__ == "__main__":
  main(sys.argv[1])
