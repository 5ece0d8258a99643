"""GELU and SiLU that save their derivative for the backward pass.

JAX saves the argument and computes the derivative where it is used. XLA on a
CPU then computes it, exp and erf included, once for each matrix product that
uses it: half of the backward pass of an MLP. The derivative takes as much
memory as the argument, in whose place it is saved.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Computes ``x * Phi(x)``, Phi the exact normal distribution function."""
  return nn.gelu(x, approximate=False)


def _gelu_forward(x):
  share = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
  return jax.lax.optimization_barrier((x * share, share + x * density))


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
  """Computes ``x * sigmoid(x)``."""
  return nn.silu(x)


def _silu_forward(x):
  share = nn.sigmoid(x)
  value = x * share
  return jax.lax.optimization_barrier((value, share + value * (1.0 - share)))


def _backward(derivative, grad):
  return (grad * derivative,)


gelu.defvjp(_gelu_forward, _backward)
silu.defvjp(_silu_forward, _backward)
