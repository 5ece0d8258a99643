"""Activations that keep their derivative equal JAX's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import activations

_X = jnp.asarray([-30.0, -4.0, -1.0, -0.1, 0.0, 1e-3, 0.7, 2.0, 5.0, 40.0])
_PAIRS = {
  "gelu": (activations.gelu, lambda x: nn.gelu(x, approximate=False)),
  "silu": (activations.silu, nn.silu),
}


@pytest.mark.parametrize("name", _PAIRS)
def test_values_and_derivatives_equal_those_of_jax(name):
  ours, theirs = _PAIRS[name]
  np.testing.assert_allclose(ours(_X), theirs(_X), atol=1e-6)
  for x in (_X, _X.astype(jnp.bfloat16)):
    value, back = jax.vjp(ours, x)
    expected, back_expected = jax.vjp(theirs, x)
    assert value.dtype == x.dtype
    atol = 1e-6 if x.dtype == jnp.float32 else 0.02
    value, expected = (jnp.float32(a) for a in (value, expected))
    np.testing.assert_allclose(value, expected, atol=atol, rtol=0.01)
    (grad,), (wanted,) = back(jnp.ones_like(x)), back_expected(jnp.ones_like(x))
    assert grad.dtype == x.dtype
    np.testing.assert_allclose(
      jnp.float32(grad), jnp.float32(wanted), atol=2 * atol
    )


@pytest.mark.parametrize("name", _PAIRS)
def test_under_scan_remat_and_vmap(name):
  ours, theirs = _PAIRS[name]

  def deep(function, x):
    step = jax.checkpoint(lambda x, _: (function(x), None))
    return jax.lax.scan(step, x, None, length=3)[0].sum()

  x = jnp.stack([_X, -_X])
  got = jax.vmap(jax.grad(lambda x: deep(ours, x)))(x)
  wanted = jax.vmap(jax.grad(lambda x: deep(theirs, x)))(x)
  np.testing.assert_allclose(got, wanted, atol=1e-6)
