"""Low-rank adaptation (LoRA) of a frozen network's matrices.

Hu et al., arXiv 2106.09685: W x becomes W x + scale B A x, where only A and B
are trained, and scale = alpha / rank. The network's own code is unchanged:

  with lora.applied(tree, scale):
    out = net.apply({"params": frozen}, ...)

A LoRA tree is nested as the network's parameters are. In place of each adapted
kernel float[in, out] it has `a` float[in, rank] and `b` float[rank, out].
LLaMA, whose layers are one scan, takes the tree with stacked arrays as the
collection "lora": see `collection`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.models import matmul

Params = Mapping[str, Any]  # nested dicts of arrays

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")  # the projections of a U-Net
LLAMA = ("query", "key", "value", "out", "gate", "up", "down")


def init(
  rng: jax.Array,
  boxed: Params,
  rank: int,
  targets: Sequence[str] = ATTENTION,
) -> Params:
  """Returns a LoRA tree that changes nothing: `a` is random, `b` zero.

  Args:
    rng: a key.
    boxed: (abstract) parameters with their logical axes, as `jax.eval_shape`
      of a module's `init` gives them.
    rank: of the adaptation, at least 1.
    targets: names of the layers whose kernels are adapted.

  Returns:
    A tree of boxed float32 arrays, with the logical axes of the kernels.

  Raises:
    errors.ConfigError: no layer has such a name, or the rank is below 1.
  """
  flat = traverse_util.flatten_dict(dict(boxed))
  kernels = {
    path[:-1]: box
    for path, box in flat.items()
    if path[-1] == "kernel" and path[-2] in targets
  }
  if rank < 1 or not kernels:
    raise errors.ConfigError(
      f"LoRA of rank {rank} on {targets}: the rank must be at least 1, and the"
      f" network must have such layers (it has {len(kernels)}). Change"
      " model.lora, or set model.lora.rank=0 to train the whole network."
    )
  out = {}
  for number, (path, box) in enumerate(sorted(kernels.items())):
    *stack, rows, columns = box.value.shape
    *layers, row_axis, column_axis = box.names
    key = jax.random.fold_in(rng, number)
    a = jax.random.normal(key, (*stack, rows, rank)) * rows**-0.5
    out[*path, "a"] = nn.LogicallyPartitioned(a, (*layers, row_axis, "rank"))
    b = jnp.zeros((*stack, rank, columns))
    axes = (*layers, "rank", column_axis)
    out[*path, "b"] = nn.LogicallyPartitioned(b, axes)
  return traverse_util.unflatten_dict(out)


@contextlib.contextmanager
def applied(tree: Params | None, scale: float) -> Iterator[None]:
  """Adapts every layer that the tree has, within the `with` block.

  Gradients reach the tree, also through rematerialized blocks. Results are
  those of `merge`, but no gradient of a full kernel is computed.

  Args:
    tree: see `init`, unboxed; None adapts nothing.
    scale: alpha / rank.
  """
  if tree is None:
    yield
    return
  pairs = _pairs(tree)

  def add(call, args, kwargs, context):
    y = call(*args, **kwargs)
    pair = pairs.get(context.module.path)
    if pair is None or context.method_name != "__call__":
      return y
    low = matmul.linear(args[0].astype(y.dtype), pair["a"].astype(y.dtype))
    return y + scale * matmul.linear(low, pair["b"].astype(y.dtype))

  with nn.intercept_methods(add):
    yield


def collection(tree: Params, scale: float) -> Params:
  """Returns the collection "lora" of `llama.Llama`: `b` times the scale."""
  flat = traverse_util.flatten_dict(dict(tree))
  flat = {k: v * scale if k[-1] == "b" else v for k, v in flat.items()}
  return traverse_util.unflatten_dict(flat)


def merge(params: Params, tree: Params, scale: float) -> Params:
  """Returns parameters that equal the network with its LoRA.

  Args:
    params: of the frozen network, unboxed.
    tree: see `init`, unboxed.
    scale: alpha / rank.

  Returns:
    Parameters of the same shapes and dtypes; sums are float32.

  Raises:
    errors.UsageError: the network lacks a kernel that the tree adapts.
  """
  flat = traverse_util.flatten_dict(dict(params))
  for path, pair in _pairs(tree).items():
    kernel = flat.get((*path, "kernel"))
    shape = (*pair["a"].shape[:-1], pair["b"].shape[-1])
    if kernel is None or kernel.shape != shape:
      raise errors.UsageError(
        f"The network has no kernel {'/'.join(path)} of shape {shape}, which"
        " this LoRA adapts: it belongs to another network."
      )
    change = pair["a"].astype(jnp.float32) @ pair["b"].astype(jnp.float32)
    merged = kernel.astype(jnp.float32) + scale * change
    flat[*path, "kernel"] = merged.astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat)


def _pairs(tree: Params) -> dict[tuple[str, ...], dict[str, Any]]:
  """Returns {path of a layer: {"a": ..., "b": ...}}."""
  pairs: dict[tuple[str, ...], dict[str, Any]] = {}
  for path, leaf in traverse_util.flatten_dict(dict(tree)).items():
    pairs.setdefault(path[:-1], {})[path[-1]] = leaf
  return pairs
