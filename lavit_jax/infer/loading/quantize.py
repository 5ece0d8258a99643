"""int8 weights for the LLM: a quarter of float32, half of bfloat16.

Only weights are quantized. Each output channel of a layer's kernel, and each
row of the embedding and the head, is rounded to int8 with its own scale, max
|w| / 127 (float32). `models/llama.py` casts a kernel back where it is used, one
layer at a time, and multiplies by the scale after the product. Norms, merger,
projection and selector stay float. This saves memory, not time: a CPU decodes
slower than with large float32 weights (benchmarks/int8.py).

Why not qwix (0.1.8): under `nn.scan` its `quantize_params` takes the scales of
a stacked kernel along the wrong axis, so that the scan refuses them; a
quantized head fails in `.astype`; its float32 scales turn the carry of a
bfloat16 scan into float32; and the `jnp.take` of an embedding stays float.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama

Params = Any  # a tree of arrays

MODES = ("int8",)
DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = 127  # -128 is not used, so that the range is symmetric
_INPUTS = 1  # kernels are [layers, D, F], tables are [V, D]
_TABLES = ("llm/embedding", "llm/head")
_PIECE = 1 << 24  # elements cast to float32 at once


def quantize(
  model: llama.Llama, params: Params, mode: str = "int8"
) -> tuple[llama.Llama, Params]:
  """Returns the same language model with int8 weights.

  Args:
    model: the language model.
    params: its parameters as `decode.generate` takes them: float arrays,
      under "embedding", "head", "layers", "norm".
    mode: one of `MODES`.

  Returns:
    (model, params) for `decode.generate` and `beam.beam_search`. The config
    of the model differs in `unroll`, which is 1: unrolled layers would all be
    cast back at once.

  Raises:
    errors.UsageError: no such mode, or not the params of an LLM.
    errors.CheckpointError: a weight is not finite.
  """
  check_mode(mode)
  flat = flax.traverse_util.flatten_dict({"llm": params}, sep="/")
  _check_arrays(flat)
  out: dict[str, Any] = {}
  for path, array in flat.items():
    if _is_rounded(path):
      all_of_it = (slice(None),) * array.ndim
      out |= _int8(path, array.shape, [(all_of_it, np.asarray(array))])
    else:
      out[path] = array
  config = dataclasses.replace(model.config, unroll=1)
  tree = flax.traverse_util.unflatten_dict(out, sep="/")
  return llama.Llama(config), tree["llm"]


def load_part(
  directory: str | os.PathLike, *, mode: str = "int8", dtype: str = "float32"
) -> checkpoints.Part:
  """Reads the part `llm` of a model directory with int8 weights.

  Arrays are read piece by piece, as they are chunked on disk. Beside the
  result, memory holds about one piece (32 MiB of an imported checkpoint, a
  whole array of one that was trained on one device) and twice the int8 of the
  largest array.

  Args:
    directory: a model directory.
    mode: one of `MODES`.
    dtype: of the arrays that stay float.

  Returns:
    As `checkpoints.load_part`, with int8 kernels and their scales under "llm",
    and with `unroll` 1 in the config (see `quantize`).

  Raises:
    errors.CheckpointError: the part is missing, damaged, or not finite.
    errors.UsageError: no such mode or dtype.
  """
  check_mode(mode)
  float_dtype = check_dtype(dtype)
  stored = checkpoints.StoredPart(directory, "llm")
  _check_arrays(stored.arrays)
  out: dict[str, Any] = {}
  for path, array in stored.arrays.items():
    if _is_rounded(path):
      out |= _int8(path, array.shape, stored.blocks(path, whole=_INPUTS))
    else:
      wanted = checkpoints.cast_dtype(array.dtype, float_dtype)
      out[path] = _on_device(stored.read(path).astype(wanted))
  config = stored.meta["llama"] | {"unroll": 1}
  tree = flax.traverse_util.unflatten_dict(out, sep="/")
  return checkpoints.Part(tree, stored.meta | {"llama": config})


def loaded_shapes(
  arrays: Mapping[str, jax.ShapeDtypeStruct],
  dtype: jax.typing.DTypeLike,
  mode: str | None = "int8",
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes and dtypes of the arrays of a part after loading.

  Args:
    arrays: of `checkpoints.StoredPart`, by path.
    dtype: of floats.
    mode: one of `MODES`, or None for floats alone.
  """
  out = {}
  for path, array in arrays.items():
    if mode is not None and _is_rounded(path):
      out[path] = jax.ShapeDtypeStruct(array.shape, np.int8)
      shape = _scale_shape(array.shape)
      out[_scale_path(path)] = jax.ShapeDtypeStruct(shape, np.float32)
    else:
      wanted = checkpoints.cast_dtype(array.dtype, dtype)
      out[path] = jax.ShapeDtypeStruct(array.shape, wanted)
  return out


def check_mode(mode: Any) -> None:
  """Raises UsageError for a mode that does not exist."""
  if mode not in MODES:
    raise errors.UsageError(
      f"quantize={mode!r}: expected {' or '.join(map(repr, MODES))}, or None"
      " for weights that are not quantized."
    )


def check_dtype(dtype: Any) -> jnp.dtype:
  """Returns the dtype of float arrays; UsageError if it is not of DTYPES."""
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = None
  if name not in DTYPES:
    raise errors.UsageError(
      f"dtype={dtype!r}: expected {', '.join(map(repr, DTYPES))}, with"
      " quantize='int8' too: it is the dtype of the computation and of the"
      " arrays that are not quantized."
    )
  return jnp.dtype(name)


def _check_arrays(arrays):
  """Raises UsageError unless these are float arrays of a language model."""
  missing = [path for path in _TABLES if path not in arrays]
  if missing:
    raise errors.UsageError(
      f"No array {' nor '.join(missing)} among {', '.join(sorted(arrays)[:4])}"
      ' …: expected the parameters of the LLM. Give params["llm"] of the part.'
    )
  for path, array in arrays.items():
    if _is_rounded(path) and not jnp.issubdtype(array.dtype, jnp.floating):
      raise errors.UsageError(
        f"{path} is {array.dtype}, not float: these weights are quantized"
        " already. Use them without quantize, or start from float weights."
      )


def _is_rounded(path):
  in_layers = path.startswith("llm/layers/") and path.endswith("/kernel")
  return in_layers or path in _TABLES


def _scale_path(path):
  if path in _TABLES:
    return f"{path}_scale"
  return path.removesuffix("kernel") + "scale"


def _scale_shape(shape):
  return shape[:_INPUTS] + shape[_INPUTS + 1 :]


def _int8(path, shape, blocks: Iterable[tuple[tuple, np.ndarray]]):
  """Returns the int8 array and its scale, by path, from float pieces."""
  rounded = np.empty(shape, np.int8)
  scale = np.empty(_scale_shape(shape), np.float32)
  for index, block in blocks:
    rounded[index], scale[_scale_shape(index)] = _round(path, block)
  return {path: _on_device(rounded), _scale_path(path): _on_device(scale)}


def _round(path, block):
  """Returns (int8 of the block's shape, float32 scale)."""
  rounded = np.empty(block.shape, np.int8)
  scales = []
  rows = max(1, _PIECE // block[:1].size)
  for start in range(0, len(block), rows):
    x = block[start : start + rows].astype(np.float32)
    scale = np.maximum(x.max(_INPUTS), -x.min(_INPUTS)) / _LARGEST
    if not np.isfinite(scale).all():
      raise errors.CheckpointError(
        f"{path} has weights that are not finite (NaN or infinite), which int8"
        " cannot hold. The checkpoint is damaged, or its training diverged."
      )
    scale[scale == 0] = 1.0
    x /= np.expand_dims(scale, _INPUTS)
    rounded[start : start + rows] = np.rint(x, out=x)
    scales.append(scale)
  return rounded, np.concatenate(scales)


def _on_device(array):
  return jax.device_put(array, jax.local_devices()[0])
