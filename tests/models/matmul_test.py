import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import matmul


@pytest.mark.parametrize("rows", [(5,), (2, 5), (2, 3, 5)])
def test_linear_and_its_gradients_are_those_of_a_plain_product(rows):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (*rows, 4))
  kernel = jax.random.normal(keys[1], (4, 3))
  grad = jax.random.normal(keys[2], (*rows, 3))
  ours, back = jax.vjp(matmul.linear, x, kernel)
  plain, plain_back = jax.vjp(lambda x, kernel: x @ kernel, x, kernel)
  np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)
  for a, b in zip(back(grad), plain_back(grad), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_another_contraction_is_refused():
  with pytest.raises(ValueError, match="dimension_numbers"):
    matmul.dot_general(
      jnp.zeros((2, 4)), jnp.zeros((3, 4)), (((1,), (1,)), ((), ()))
    )
