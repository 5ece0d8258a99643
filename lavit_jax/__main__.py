"""`python -m lavit_jax`: the same as the command `lavit`."""

import sys

from lavit_jax.commands import main

if __name__ == "__main__":
  sys.exit(main.main())
