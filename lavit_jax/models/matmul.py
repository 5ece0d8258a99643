"""Matrix products with explicit gradients, which are faster than JAX's own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **unused: Any
) -> jax.Array:
  """Computes `linear` for `nn.Dense(dot_general=...)`.

  Raises:
    ValueError: another contraction than the last axis of x with the first
      axis of a matrix.
  """
  expected = (((x.ndim - 1,), (0,)), ((), ()))
  if dimension_numbers != expected or kernel.ndim != 2:
    raise ValueError(
      f"dimension_numbers={dimension_numbers} with a kernel {kernel.shape}:"
      " matmul.dot_general contracts the last axis of x with the first axis of"
      " a matrix only. Use jax.lax.dot_general."
    )
  return linear(x, kernel)


def linear(
  x: jax.Array, kernel: jax.Array, saved_as: str = "product"
) -> jax.Array:
  """Maps float[..., D] by float[D, F] to float[..., F].

  Args:
    x: float[..., D].
    kernel: float[D, F].
    saved_as: name of the result, by which a remat policy keeps it.
  """
  return checkpoint_name(_linear(x, kernel), saved_as)


@jax.custom_vjp
def _linear(x, kernel):
  """Computes the product; its gradients are `_backward`.

  JAX's own gradient by the kernel is a product g^T x, for which XLA on a CPU
  first copies all of g, transposed: half the time of the backward pass.
  Written as x^T g it needs no copy: 1.9 times faster there, equal elsewhere.
  """
  return _contract(x, kernel, (x.ndim - 1,), (0,))


def _forward(x, kernel):
  return _linear(x, kernel), (x, kernel)


def _backward(saved, grad):
  x, kernel = saved
  by_x = _contract(grad, kernel, (grad.ndim - 1,), (1,))
  return by_x, by_kernel(x, grad)


def by_kernel(x: jax.Array, grad: jax.Array) -> jax.Array:
  """Returns the gradient of `linear` by its kernel, float[D, F].

  Args:
    x: float[..., D].
    grad: float[..., F], gradient of the result, of the dtype of x.
  """
  rows = tuple(range(x.ndim - 1))
  return _contract(x, grad, rows, rows)


_linear.defvjp(_forward, _backward)


def scaled(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
  """Maps float[..., D] by int8[D, F], scale float[F] to float[..., F].

  The scale multiplies the product, not the kernel. The kernel is cast where it
  is used and not kept: under a scan one layer at a time. Sums are float32:
  products with integers up to 127 exceed float16.
  """
  y = jax.lax.dot_general(
    x,
    kernel.astype(x.dtype),
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return (y * scale).astype(x.dtype)


def tall(x: jax.Array, table: jax.Array) -> jax.Array:
  """Maps float[B, D] by a table float[V, D] with V >> B to float32[B, V].

  On a CPU, XLA computes table x^T up to 1.6 times faster, if a barrier hides
  from it that a transpose follows.
  """

  def direct(x, table):
    equation = "bd,vd->bv"
    return jnp.einsum(equation, x, table, preferred_element_type=jnp.float32)

  def transposed(x, table):
    equation = "vd,bd->vb"
    out = jnp.einsum(equation, table, x, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(out).T

  return jax.lax.platform_dependent(x, table, cpu=transposed, default=direct)


def _contract(a, b, axes_a, axes_b):
  return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())))
