"""GELU and SiLU that keep their derivative for the backward pass.

JAX keeps the argument and computes the derivative when it is needed. XLA on a
CPU then computes it, exp and erf included, again in each of the products that
take it in: half of the backward pass of an MLP. The derivative needs no more
memory than the argument that it stands in for.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """X Phi(x) with the exact normal distribution function, not tanh."""
  return nn.gelu(x, approximate=False)


def _gelu_forward(x):
  share = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))
  return jax.lax.optimization_barrier((x * share, share + x * density))


@jax.custom_vjp
def silu(x: jax.Array) -> jax.Array:
  """X sigmoid(x)."""
  return nn.silu(x)


def _silu_forward(x):
  share = nn.sigmoid(x)
  value = x * share
  return jax.lax.optimization_barrier((value, share + value * (1.0 - share)))


def _backward(derivative, grad):
  return (grad * derivative,)


gelu.defvjp(_gelu_forward, _backward)
silu.defvjp(_silu_forward, _backward)
