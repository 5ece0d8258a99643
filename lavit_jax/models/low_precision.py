"""Matrix products in narrow number formats, for training.

For chips whose peak in int8 or fp8 is twice that in bfloat16 (`FORMATS`). Both
arrays of a product are rounded as it runs, on a scale for every row of the left
one and every column of the right one, the largest magnitude of each; sums are
wide, and parameters, optimizer and gradients stay as they are.

The rounding and the scaled product are qwix's (`qwix.quantize`,
`qwix.dot_general`). Which products are narrow is decided here: the forward one
and the gradient by x. The gradient by the kernel, a sum over all tokens of a
batch, for which small errors of many rows add up, stays in the dtype of x.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.core import errors
from lavit_jax.models import matmul

# (format of activations and kernels, format of gradients) by name. TPU v5e,
# v5p and v6e: int8. NVIDIA H100 and later: both; fp8 is e4m3, which has more
# digits, and e5m2, which reaches further, for gradients.
FORMATS = {
  "int8": (jnp.int8, jnp.int8),
  "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def check(name: str) -> None:
  """Refuses a format that is unknown, or for which qwix is missing.

  Raises:
    errors.ConfigError: one of the two.
  """
  if name not in ("", *FORMATS):
    raise errors.ConfigError(
      f"matmul={name!r} is unknown: expected one of {sorted(FORMATS)}, or ''"
      " for products in dtype."
    )
  if name:
    try:
      import qwix  # noqa: F401
    except ImportError as e:
      raise errors.ConfigError(
        f"matmul={name!r} needs qwix: pip install qwix (lavit_jax[tpu] and"
        " lavit_jax[cuda] bring it)."
      ) from e


def linear(x, kernel, name: str):
  """Maps float[..., D] by float[D, F] to float[..., F] in a narrow format.

  The result is named "product", as that of `matmul.linear`.

  Args:
    x: of float32 or bfloat16; so are the result and the gradients.
    kernel: of the dtype of x.
    name: one of `FORMATS`.
  """
  return checkpoint_name(_linear(x, kernel, name), "product")


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


def _product(rows, kernel, axes, of_rows, of_kernel):
  """Contracts the last axis of `rows` with an axis of a kernel, rounded."""
  import qwix

  every_row = tuple(range(rows.ndim - 1))
  kept = tuple(i for i in range(kernel.ndim) if i not in axes)
  left = qwix.quantize(rows, of_rows, channelwise_axes=every_row)
  right = qwix.quantize(kernel, of_kernel, channelwise_axes=kept)
  contracted = ((rows.ndim - 1,), axes)
  return qwix.dot_general(left, right, (contracted, ((), ()))).astype(
    rows.dtype
  )
