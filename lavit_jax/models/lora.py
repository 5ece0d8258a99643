"""Low-rank changes of a frozen network's matrices (LoRA).

Hu et al., arXiv 2106.09685: W x becomes W x + scale B A x, where only A and B
are trained, and scale = alpha / rank. The network itself knows nothing of it:

  with lora.applied(tree, scale):
    out = net.apply({"params": frozen}, ...)

A tree has the nesting of the network's parameters; in place of the kernel
float[in, out] of each matrix it changes it has `a` float[in, rank] and `b`
float[rank, out]. LLaMA, whose layers are one scan, takes the tree, its kernels
stacked, as the collection "lora": see `collection`.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from lavit_jax.core import errors
from lavit_jax.models import matmul

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")  # the projections of a U-Net
LLAMA = ("query", "key", "value", "out", "gate", "up", "down")


def init(rng, boxed, rank: int, targets=ATTENTION):
  """Low-rank changes that start as none: `a` is random, `b` zero.

  Args:
    rng: a key.
    boxed: (abstract) parameters with their logical axes, as `jax.eval_shape`
      of a module's `init` gives them.
    rank: of each change, at least 1.
    targets: names of the layers whose kernels are changed.

  Returns:
    A tree of boxed float32 arrays; a kernel's own axes stay where they were.

  Raises:
    errors.ConfigError: no such layer, or a rank below 1.
  """
  flat = traverse_util.flatten_dict(boxed)
  kernels = {
    path[:-1]: box
    for path, box in flat.items()
    if path[-1] == "kernel" and path[-2] in targets
  }
  if rank < 1 or not kernels:
    raise errors.ConfigError(
      f"LoRA of rank {rank} on {targets}: the rank must be at least 1, and the"
      f" network must have such layers (it has {len(kernels)}). Change"
      " model.lora, or set model.lora.rank=0 to train the whole."
    )
  out = {}
  for number, (path, box) in enumerate(sorted(kernels.items())):
    *stack, rows, columns = box.value.shape
    *layers, into, out_of = box.names
    key = jax.random.fold_in(rng, number)
    a = jax.random.normal(key, (*stack, rows, rank)) * rows**-0.5
    out[*path, "a"] = nn.LogicallyPartitioned(a, (*layers, into, "rank"))
    b = jnp.zeros((*stack, rank, columns))
    out[*path, "b"] = nn.LogicallyPartitioned(b, (*layers, "rank", out_of))
  return traverse_util.unflatten_dict(out)


@contextlib.contextmanager
def applied(tree, scale: float):
  """Adds the changes to every layer they belong to, inside.

  Gradients reach the tree, through recomputed blocks too. The sum is that of
  `merge`, without the whole kernels' gradients.

  Args:
    tree: see `init`, unboxed; None changes nothing.
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


def collection(tree, scale: float):
  """The tree as `llama.Llama` adds it up: `b` times the scale."""
  flat = traverse_util.flatten_dict(tree)
  flat = {k: v * scale if k[-1] == "b" else v for k, v in flat.items()}
  return traverse_util.unflatten_dict(flat)


def merge(params, tree, scale: float):
  """The parameters of one network that does what both did.

  Args:
    params: of the frozen network, unboxed.
    tree: see `init`, unboxed.
    scale: alpha / rank.

  Returns:
    Parameters of the same shapes and dtypes; sums are float32.

  Raises:
    errors.UsageError: a change of a kernel that is not there.
  """
  flat = traverse_util.flatten_dict(params)
  for path, pair in _pairs(tree).items():
    kernel = flat.get((*path, "kernel"))
    shape = (*pair["a"].shape[:-1], pair["b"].shape[-1])
    if kernel is None or kernel.shape != shape:
      raise errors.UsageError(
        f"There is no kernel {'/'.join(path)} of the shape that this LoRA"
        " changes: it belongs to another network."
      )
    change = pair["a"].astype(jnp.float32) @ pair["b"].astype(jnp.float32)
    merged = kernel.astype(jnp.float32) + scale * change
    flat[*path, "kernel"] = merged.astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat)


def _pairs(tree):
  """{path of a layer: {"a": ..., "b": ...}}."""
  pairs = {}
  for path, leaf in traverse_util.flatten_dict(tree).items():
    pairs.setdefault(path[:-1], {})[path[-1]] = leaf
  return pairs
