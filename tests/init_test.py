"""`import lavit_jax` is cheap, and has what it promises."""

import subprocess
import sys

import pytest

import lavit_jax
from lavit_jax.infer import pipeline


def test_lavit_is_the_class_of_the_pipeline():
  assert lavit_jax.LaVIT is pipeline.LaVIT
  assert "LaVIT" in dir(lavit_jax)


def test_importing_the_package_imports_no_library():
  code = (
    "import sys, lavit_jax; assert lavit_jax.__version__;"
    "print(*sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == ""


def test_what_is_not_there_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'Lavit'"):
    _ = lavit_jax.Lavit
