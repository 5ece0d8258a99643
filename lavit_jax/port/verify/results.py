"""Results of checks: an array and the measure by which it is compared.

A check returns {name of an `out_*` array: (array, kind)}. `verify.TOLERANCES`
has the kinds: "float", "score" and "exact"; "image" for images in [0, 1] and
"levels" for uint8 ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Results = dict[str, tuple[Any, str]]


def floats(**values: Any) -> Results:
  """Returns results that are held to the tolerance of floats."""
  return {f"out_{name}": (value, "float") for name, value in values.items()}


def exact(**values: Any) -> Results:
  """Returns results that must be equal."""
  return {f"out_{name}": (value, "exact") for name, value in values.items()}


def nhwc(recorded: np.ndarray) -> jax.Array:
  """Converts recorded images from NCHW to NHWC."""
  return jnp.asarray(recorded.transpose(0, 2, 3, 1))


def nchw(images: Any) -> np.ndarray:
  """Converts images from [..., H, W, C] to [..., C, H, W]."""
  return np.moveaxis(np.asarray(images), -1, -3)
