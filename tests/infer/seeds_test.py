"""Seeds that no program can take are refused by name."""

import re

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.infer import image_generation, seeds
from lavit_jax.infer.tasks import arguments


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, np.int64(3)])
def test_seeds_of_int32_are_taken(seed):
  seeds.check(seed)


@pytest.mark.parametrize("seed", [-1, 2**31, 10**20, 1.5, "3", True, None])
def test_others_are_refused_by_name(seed):
  said = re.escape(f"seed={seed!r}: expected an integer from 0 to 2147483647")
  with pytest.raises(errors.UsageError, match=said):
    seeds.check(seed)


def test_none_is_taken_where_nothing_is_sampled():
  seeds.check(None, optional=True)
  assert arguments.seeds(None, False, 3) is None


def test_tasks_check_it_before_anything_is_computed():
  with pytest.raises(errors.UsageError, match="seed=-1"):
    arguments.seeds(-1, False, 3)
  with pytest.raises(errors.UsageError, match="seed=-2"):
    image_generation.write(None, ["x"], [None], None, form="codes", seed=-2)
