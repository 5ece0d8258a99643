"""Matrix products in int8 and fp8, for training.

For chips whose peak in int8 or fp8 is twice that in bfloat16 (`FORMATS`). Both
operands are rounded at every step, with one scale per row of the left one and
per column of the right one: the largest magnitude of each. Sums are int32 or
float32; parameters, optimizer state and gradients keep their dtypes.

qwix rounds and multiplies (`qwix.quantize`, `qwix.dot_general`). This module
decides which products have low precision: the forward product and the gradient
by x. The gradient by the kernel stays in the dtype of x: it is a sum over all
tokens of a batch, in which small errors of many rows add up.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.core import errors
from lavit_jax.models import matmul

# (format of activations and kernels, format of gradients) by name. TPU v5e,
# v5p and v6e support int8; NVIDIA H100 and later support both. Of the fp8
# formats e4m3 has more digits, and e5m2, for gradients, a wider range.
FORMATS = {
  "int8": (jnp.int8, jnp.int8),
  "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def check(name: str) -> None:
  """Checks that a format can be used.

  Args:
    name: one of `FORMATS`, or "" for products in the model's dtype.

  Raises:
    errors.ConfigError: the format is unknown, or qwix is not installed.
  """
  if name not in ("", *FORMATS):
    raise errors.ConfigError(
      f"matmul={name!r} is unknown: expected one of {sorted(FORMATS)}, or ''"
      " for products in the model's dtype."
    )
  if name:
    try:
      import qwix  # noqa: F401  # optional extra
    except ImportError as e:
      raise errors.ConfigError(
        f"matmul={name!r} needs qwix: pip install qwix. The extras"
        " lavit_jax[tpu] and lavit_jax[cuda] install it."
      ) from e


def linear(
  x: jax.Array, kernel: jax.Array, name: str, saved_as: str = "product"
) -> jax.Array:
  """Maps float[..., D] by float[D, F] to float[..., F] in low precision.

  Args:
    x: float32 or bfloat16; the result and the gradients have its dtype.
    kernel: of the dtype of x.
    name: one of `FORMATS`.
    saved_as: name of the result, as of `matmul.linear`.
  """
  return checkpoint_name(_linear(x, kernel, name), saved_as)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, kernel, name):
  values, _ = FORMATS[name]
  return _product(x, kernel, (0,), values, values)


def _forward(x, kernel, name):
  return _linear(x, kernel, name), (x, kernel)


def _backward(name, saved, grad):
  x, kernel = saved
  values, gradients = FORMATS[name]
  by_x = _product(grad, kernel, (1,), gradients, values)
  return by_x, matmul.by_kernel(x, grad)


_linear.defvjp(_forward, _backward)


def _product(rows, kernel, axes, rows_format, kernel_format):
  """Contracts the last axis of `rows` with axes of a kernel, both rounded."""
  import qwix  # optional extra

  row_axes = tuple(range(rows.ndim - 1))
  free_axes = tuple(i for i in range(kernel.ndim) if i not in axes)
  left = qwix.quantize(rows, rows_format, channelwise_axes=row_axes)
  right = qwix.quantize(kernel, kernel_format, channelwise_axes=free_axes)
  contracted = ((rows.ndim - 1,), axes)
  out = qwix.dot_general(left, right, (contracted, ((), ())))
  return out.astype(rows.dtype)
