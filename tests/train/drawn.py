"""Random parameters for tests that only need some."""

import jax
import numpy as np

from lavit_jax.core import sharding


def draw(abstract, seed=0):
  """Random parameters, none zero, without a program that has to compile."""
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    if not np.issubdtype(leaf.dtype, np.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    fan = max(int(np.prod(leaf.shape[:-1])), 1)
    drawn = rng.normal(0, fan**-0.5, leaf.shape)
    if jax.tree_util.keystr(path[-1:], simple=True) == "scale":
      drawn = 1 + drawn / 10
    return drawn.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, sharding.unbox(abstract))
