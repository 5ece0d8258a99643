"""int8 weights for the LLM: a quarter of float32, half of bfloat16.

Weights only. Each output channel of a layer's kernel, and each row of the
embedding and the head, is rounded to int8 on a scale of its own, max |w| / 127
(float32). `models/llama.py` casts a kernel back where it is used, one layer at
a time, and multiplies by the scale after the product. Norms, merger,
projection and selector stay float. This saves memory, not time: a CPU decodes
slower than with large float32 weights (benchmarks/int8.py).

Why not qwix (0.1.8): under `nn.scan` its `quantize_params` takes the scales of
a stacked kernel along the wrong axis, so that the scan refuses them; a
quantized head fails in `.astype`; its float32 scales turn the carry of a
bfloat16 scan into float32; and the `jnp.take` of an embedding stays float.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.models import llama

MODES = ("int8",)
DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = 127  # -128 is left out: the same steps on both sides of zero
_INPUTS = 1  # kernels are [layers, D, F], tables are [V, D]
_TABLES = ("llm/embedding", "llm/head")
_PIECE = 1 << 24  # numbers that are float32 at once


def quantize(model: llama.Llama, params, mode: str = "int8"):
  """The same language model with int8 weights.

  Args:
    model: the language model.
    params: its parameters as `decode.generate` takes them: float arrays,
      under "embedding", "head", "layers", "norm".
    mode: one of `MODES`.

  Returns:
    (model, params) for `decode.generate` and `beam.beam_search`. Of the model
    only `unroll` changes, to 1: layers unrolled would all be cast back at
    once.

  Raises:
    errors.UsageError: no such mode, or params that are something else.
    errors.CheckpointError: a weight is not finite.
  """
  check_mode(mode)
  flat = flax.traverse_util.flatten_dict({"llm": params}, sep="/")
  _check_arrays(flat)
  out = {}
  for path, array in flat.items():
    if _is_rounded(path):
      everything = (slice(None),) * array.ndim
      out |= _int8(path, array.shape, [(everything, np.asarray(array))])
    else:
      out[path] = array
  config = dataclasses.replace(model.config, unroll=1)
  tree = flax.traverse_util.unflatten_dict(out, sep="/")
  return llama.Llama(config), tree["llm"]


def load_part(
  directory, *, mode: str = "int8", dtype: str = "float32"
) -> checkpoints.Part:
  """Reads the part `llm` of a model directory with int8 weights.

  Array by array and piece by piece, as they lie on disk: beside the result,
  memory holds about one piece (32 MiB of an imported checkpoint, a whole
  array of one that was trained on one device) and twice the int8 of the
  largest array.

  Args:
    directory: a model directory.
    mode: one of `MODES`.
    dtype: of what stays float.

  Returns:
    As `checkpoints.load_part`, but for the int8 kernels and their scales
    under "llm", and `unroll` of the config, which is 1 (see `quantize`).

  Raises:
    errors.CheckpointError: the part is missing, damaged, or not finite.
    errors.UsageError: no such mode or dtype.
  """
  check_mode(mode)
  dtype = check_dtype(dtype)
  stored = checkpoints.StoredPart(directory, "llm")
  _check_arrays(stored.arrays)
  out = {}
  for path, array in stored.arrays.items():
    if _is_rounded(path):
      out |= _int8(path, array.shape, stored.blocks(path, whole=_INPUTS))
    else:
      wanted = checkpoints.cast_dtype(array.dtype, dtype)
      out[path] = _on_device(stored.read(path).astype(wanted))
  config = stored.meta["llama"] | {"unroll": 1}
  tree = flax.traverse_util.unflatten_dict(out, sep="/")
  return checkpoints.Part(tree, stored.meta | {"llama": config})


def loaded_shapes(
  arrays: Mapping[str, jax.ShapeDtypeStruct], dtype, mode: str | None = "int8"
) -> dict[str, jax.ShapeDtypeStruct]:
  """What arrays of a part become when they are loaded, int8 or not.

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


def check_mode(mode) -> None:
  """UsageError for a mode that does not exist."""
  if mode not in MODES:
    raise errors.UsageError(
      f"quantize={mode!r}: expected {' or '.join(map(repr, MODES))}, or None"
      " for weights as they are."
    )


def check_dtype(dtype) -> jnp.dtype:
  """The dtype of what stays float; UsageError for one not of `DTYPES`."""
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = None
  if name not in DTYPES:
    raise errors.UsageError(
      f"dtype={dtype!r}: expected {', '.join(map(repr, DTYPES))}, also where"
      " quantize='int8': it is the dtype of the computation and of what stays"
      " float."
    )
  return jnp.dtype(name)


def _check_arrays(arrays):
  """UsageError unless these are the float arrays of a language model."""
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
        " already. Use them as they are, or start from the float ones."
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
  """int8 array and scale, by path, of the pieces of a float array."""
  rounded = np.empty(shape, np.int8)
  scale = np.empty(_scale_shape(shape), np.float32)
  for index, block in blocks:
    rounded[index], scale[_scale_shape(index)] = _round(path, block)
  return {path: _on_device(rounded), _scale_path(path): _on_device(scale)}


def _round(path, block):
  """(int8 of the block's shape, float32 scale); a few rows at a time."""
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
