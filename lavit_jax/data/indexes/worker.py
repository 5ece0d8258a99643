"""Makes indexes of archives in a process of its own: see `stored.py`.

Reads a JSON list of paths, and answers each with a line: null, or what is
wrong.
"""

import json
import sys

from lavit_jax.core import errors
from lavit_jax.core.storage import files
from lavit_jax.data.indexes import stored


def main() -> None:
  """Makes the indexes of the archives that standard input names."""
  for path in json.load(sys.stdin):
    try:
      stored.make(files.input_path(path))
      answer = None
    except errors.LavitError as error:
      answer = str(error)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
