"""Checks that notebooks are kept without outputs; --fix removes them.

  python .ci/notebooks.py [--fix] [NOTEBOOK ...]

Without names: all of notebooks/. Exit status 1 if one has outputs or numbers
of executions.
"""

import json
import pathlib
import sys


def stripped(notebook: dict) -> dict:
  """Returns a notebook without outputs and without numbers of executions."""
  cells = [
    cell | {"outputs": [], "execution_count": None}
    if cell["cell_type"] == "code"
    else cell
    for cell in notebook["cells"]
  ]
  return notebook | {"cells": cells}


def main(arguments: list[str]) -> int:
  """Checks or mends the named notebooks; returns the exit status."""
  fix = "--fix" in arguments
  root = pathlib.Path(__file__).resolve().parents[1]
  names = [name for name in arguments if name != "--fix"]
  status = 0
  for path in map(pathlib.Path, names or root.glob("notebooks/*.ipynb")):
    notebook = json.loads(path.read_text("utf-8"))
    clean = stripped(notebook)
    if clean == notebook:
      continue
    if fix:
      text = json.dumps(clean, indent=1, ensure_ascii=False)
      path.write_text(f"{text}\n", "utf-8")
      continue
    print(
      f"{path} holds outputs: python .ci/notebooks.py --fix {path}",
      file=sys.stderr,
    )
    status = 1
  return status


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
