"""Cross-entropy over a large vocabulary, block by block, on any mesh.

Its gradient is written by hand and computed together with the loss: a block's
logits exist once, for both. Each device sums the gradient of its rows of the
head in float32 over all blocks, and sends it once. XLA on its own would reduce
it over all devices at every block, and compute all logits twice.

Shapes in lower case are those of one device: its rows b of the batch, its part
v of the vocabulary; n = b * block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lavit_jax.core import sharding

NO_CLASS = -1e9  # the logit of a padding row of the head: exp underflows to 0


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Mesh axes that split batch, length, and a head [V, D]; () for none."""

  batch: tuple[str, ...] = ()
  length: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  width: tuple[str, ...] = ()

  @property
  def tokens(self) -> PartitionSpec:
    """How int[B, L] is split."""
    return PartitionSpec(self.batch or None, self.length or None)

  @property
  def head(self) -> PartitionSpec:
    """How float[V, D] is split."""
    return PartitionSpec(self.vocab or None, self.width or None)


def _current_axes(tokens: tuple[int, ...], head: tuple[int, ...]) -> _Axes:
  """Returns the axes of the current mesh for arrays of these shapes.

  Without a mesh, or where an array does not divide, there are none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(sharding.MESH_AXES) <= set(mesh.axis_names):
    return _Axes()
  names = ("act_batch", "act_len"), ("vocab", "embed")
  axes = [
    (axis,) if isinstance(axis, str) else tuple(axis or ())
    for pair in names
    for axis in nn.logical_to_mesh_axes(pair, sharding.RULES) or ()
  ]
  # An axis of one device would cost a gather and two copies of the head.
  axes = [tuple(a for a in split if mesh.shape[a] > 1) for split in axes]
  for size, split in zip((*tokens, *head), axes, strict=True):
    ways = 1
    for name in split:
      ways *= mesh.shape[name]
    if size % ways:
      return _Axes()
  return _Axes(*axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_nll(
  block: int,
  vocab_size: int,
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes nll = -log p of the targets and its weighted sum.

  Args:
    block: positions of each row whose logits exist at the same time.
    vocab_size: rows of the head in use; the others are no classes.
    hidden: float[B, L, D]; products are in its dtype, sums in float32.
    head: float[V, D], one row an id.
    targets: int[B, L].
    weights: float32[B, L]; no gradient.

  Returns:
    (sum of weights * nll float32[], nll float32[B, L], 0 where the weight is
    0). Only the sum has gradients.
  """
  axes = _current_axes(targets.shape, head.shape)
  run = functools.partial(_nll, axes, block, vocab_size)
  specs = (axes.tokens, axes.head, axes.tokens)
  nll = _per_device(run, axes, specs, axes.tokens)(hidden, head, targets)
  return _weighted_sum(nll, weights)


def _weighted_sum(nll, weights):
  nll = jnp.where(weights != 0, nll, 0.0)
  return (nll * weights).sum(), nll


def _forward(block, vocab_size, hidden, head, targets, weights):
  """Computes `weighted_nll` and its gradients at once."""
  axes = _current_axes(targets.shape, head.shape)
  run = functools.partial(_nll_and_gradients, axes, block, vocab_size)
  tokens = axes.tokens
  nll, by_hidden, by_head = _per_device(
    run, axes, (tokens, axes.head, tokens, tokens), (tokens, tokens, axes.head)
  )(hidden, head, targets, weights)
  return _weighted_sum(nll, weights), (by_hidden, by_head.astype(head.dtype))


def _backward(block, vocab_size, gradients, cotangents):
  """Scales the gradients of the sum by the sum's cotangent."""
  del block, vocab_size
  scale, _ = cotangents
  by_hidden, by_head = (x * scale.astype(x.dtype) for x in gradients)
  return by_hidden, by_head, None, None


weighted_nll.defvjp(_forward, _backward)


def _per_device(
  function: Callable[..., Any], axes: _Axes, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Maps a function over the devices' shares; without a mesh, runs it whole."""
  if axes == _Axes():
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _nll(axes, block, vocab_size, hidden, head, targets):
  """Computes nll float32[b, l] of a device's rows."""
  rows, ids = _gather_head(axes, head, hidden.dtype)

  def step(_, xs):
    hidden, targets = xs
    logits = _logits(hidden, rows, ids, vocab_size)
    _, nll, _ = _softmax_terms(axes, logits, ids, targets)
    return None, nll

  xs = split(hidden, block), split(targets, block)
  return joined(jax.lax.scan(step, None, xs)[1], targets.shape[1])


def _nll_and_gradients(axes, block, vocab_size, hidden, head, targets, weights):
  """Computes nll and the gradients of its weighted sum.

  The gradient by the logits is (softmax - one hot) * weight; times the head it
  is that by the hidden states, times the hidden states that by the head.
  """
  rows, ids = _gather_head(axes, head, hidden.dtype)

  def step(by_head, xs):
    hidden, targets, weights = xs
    logits = _logits(hidden, rows, ids, vocab_size)
    total, nll, hot = _softmax_terms(axes, logits, ids, targets)
    error = (jnp.exp(logits - total[:, None]) - hot) * weights.reshape(-1, 1)
    error = error.astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])  # [n, D]
    by_head += jnp.einsum(
      "nv,nd->vd", error, flat, preferred_element_type=jnp.float32
    )
    by_hidden = _sum(error @ rows, axes.vocab)
    return by_head, (nll, by_hidden.reshape(hidden.shape))

  xs = tuple(split(x, block) for x in (hidden, targets, weights))
  zeros = jnp.zeros(rows.shape, jnp.float32)
  by_head, (nll, by_hidden) = jax.lax.scan(step, zeros, xs)
  if axes.width:
    by_head = jax.lax.psum_scatter(
      by_head, axes.width, scatter_dimension=1, tiled=True
    )
  others = (*axes.batch, *axes.length)
  by_head = _sum(by_head, tuple(a for a in others if a not in axes.width))
  length = targets.shape[1]
  return joined(nll, length), joined(by_hidden, length), by_head


def _softmax_terms(axes, logits, ids, targets):
  """Computes what loss and gradient share.

  Args:
    axes: of the mesh.
    logits: float32[n, v].
    ids: int[v], of the columns.
    targets: int[b, block].

  Returns:
    (logsumexp over all classes [n], nll [b, block], one hot bool[n, v]).
  """
  highest = _maximum(logits.max(-1), axes.vocab)
  exps = jnp.exp(logits - highest[:, None]).sum(-1)
  total = highest + jnp.log(_sum(exps, axes.vocab))
  # A masked sum, not a gather: it fuses.
  hot = ids == targets.reshape(-1)[:, None]
  chosen = _sum(jnp.where(hot, logits, 0.0).sum(-1), axes.vocab)
  return total, (total - chosen).reshape(targets.shape), hot


def _gather_head(axes, head, dtype):
  """Gathers a device's rows of the head [v, D] in a dtype, and their ids."""
  head, first = head.astype(dtype), 0
  if axes.width:
    head = jax.lax.all_gather(head, axes.width, axis=1, tiled=True)
  if axes.vocab:
    first = jax.lax.axis_index(axes.vocab) * head.shape[0]
  return head, first + jnp.arange(head.shape[0])


def _logits(hidden, rows, ids, vocab_size: int):
  """Computes logits float32[n, v] of float[b, block, D]."""
  hidden = hidden.reshape(-1, hidden.shape[-1])
  logits = jnp.einsum(
    "nd,vd->nv", hidden, rows, preferred_element_type=jnp.float32
  )
  return jnp.where(ids < vocab_size, logits, NO_CLASS)


def _sum(x, axes):
  return jax.lax.psum(x, axes) if axes else x


def _maximum(x, axes):
  return jax.lax.pmax(x, axes) if axes else x


def split(x: jax.Array, block: int) -> jax.Array:
  """Splits [B, L, ...] into [blocks, B, block, ...], padding the last one."""
  batch, length = x.shape[:2]
  count = -(-length // block)
  pad = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(batch, count, block, *x.shape[2:])
  return x.swapaxes(0, 1)


def joined(x: jax.Array, length: int) -> jax.Array:
  """Joins [blocks, B, block, ...] to [B, L, ...] and cuts the padding off."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
