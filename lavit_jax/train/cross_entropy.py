"""Cross-entropy over a large vocabulary, block by block, on any mesh.

Its gradient is written out, and found together with the loss: a block's logits
are there once, for both. What a device adds up for its rows of the head stays
on it, in float32, until the last block, and is sent once. Left to itself XLA
sums it over all devices at every block, and computes all logits twice.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lavit_jax.core import sharding

NO_CLASS = -1e9  # the logit of a padding row: exp underflows to 0


@dataclasses.dataclass(frozen=True)
class _Mesh:
  """Mesh axes that split rows and lengths, and a head [V, D]; () for none."""

  rows: tuple[str, ...] = ()
  length: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  width: tuple[str, ...] = ()

  @property
  def tokens(self):
    """How int[B, L] is split."""
    return PartitionSpec(self.rows or None, self.length or None)

  @property
  def head(self):
    """How float[V, D] is split."""
    return PartitionSpec(self.vocab or None, self.width or None)


def _current(shape, head) -> _Mesh:
  """The axes of the current mesh, none where an array does not divide."""
  mesh = jax.sharding.get_abstract_mesh()
  if not set(sharding.MESH_AXES) <= set(mesh.axis_names):
    return _Mesh()
  names = ("act_batch", "act_len"), ("vocab", "embed")
  axes = [
    (axis,) if isinstance(axis, str) else tuple(axis or ())
    for pair in names
    for axis in nn.logical_to_mesh_axes(pair, sharding.RULES)
  ]
  # An axis of one device would leave a gather and two copies of the head.
  axes = [tuple(a for a in split if mesh.shape[a] > 1) for split in axes]
  for size, split in zip((*shape, *head), axes, strict=True):
    ways = 1
    for name in split:
      ways *= mesh.shape[name]
    if size % ways:
      return _Mesh()
  return _Mesh(*axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_nll(block: int, vocab_size: int, hidden, head, targets, weights):
  """Sum of weights x -log p of the targets, and -log p itself.

  Args:
    block: positions of each row whose logits live at once.
    vocab_size: rows of the head in use; the rest are no class.
    hidden: float[B, L, D]; products are in its dtype, sums in float32.
    head: float[V, D], one row an id.
    targets: int[B, L].
    weights: float32[B, L]; no gradient.

  Returns:
    (float32[], float32[B, L], 0 where the weight is 0). Only the first has
    gradients.
  """
  mesh = _current(targets.shape, head.shape)
  run = functools.partial(_losses, mesh, block, vocab_size)
  specs = (mesh.tokens, mesh.head, mesh.tokens)
  nll = _over(run, mesh, specs, mesh.tokens)(hidden, head, targets)
  return _summed(nll, weights)


def _summed(nll, weights):
  nll = jnp.where(weights != 0, nll, 0.0)
  return (nll * weights).sum(), nll


def _forward(block, vocab_size, hidden, head, targets, weights):
  mesh = _current(targets.shape, head.shape)
  run = functools.partial(_losses_and_gradients, mesh, block, vocab_size)
  tokens = mesh.tokens
  nll, by_hidden, by_head = _over(
    run, mesh, (tokens, mesh.head, tokens, tokens), (tokens, tokens, mesh.head)
  )(hidden, head, targets, weights)
  return _summed(nll, weights), (by_hidden, by_head.astype(head.dtype))


def _backward(block, vocab_size, gradients, grad):
  """The gradients of the sum times the gradient by the sum."""
  del block, vocab_size
  scale, _ = grad
  by_hidden, by_head = (x * scale.astype(x.dtype) for x in gradients)
  return by_hidden, by_head, None, None


weighted_nll.defvjp(_forward, _backward)


def _over(function, mesh, in_specs, out_specs):
  """The function on each device's share, or on all where there is no mesh."""
  if mesh == _Mesh():
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _losses(mesh, block, vocab_size, hidden, head, targets):
  """-log p float32[b, l] of a device's rows."""
  rows, ids = _gathered(mesh, head, hidden.dtype)

  def step(_, xs):
    hidden, targets = xs
    logits = _logits(hidden, rows, ids, vocab_size)
    _, nll, _ = _scored(mesh, logits, ids, targets)
    return None, nll

  xs = split(hidden, block), split(targets, block)
  return joined(jax.lax.scan(step, None, xs)[1], targets.shape[1])


def _losses_and_gradients(
  mesh, block, vocab_size, hidden, head, targets, weights
):
  """-log p, and gradients of its weighted sum.

  Those are (softmax - one hot) x weight times the other factor: by this
  device's hidden states, and by its part of the head.
  """
  rows, ids = _gathered(mesh, head, hidden.dtype)

  def step(by_head, xs):
    hidden, targets, weights = xs
    logits = _logits(hidden, rows, ids, vocab_size)
    total, nll, hot = _scored(mesh, logits, ids, targets)
    error = (jnp.exp(logits - total[:, None]) - hot) * weights.reshape(-1, 1)
    error = error.astype(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])  # [b * block, D]
    by_head += jnp.einsum(
      "nv,nd->vd", error, flat, preferred_element_type=jnp.float32
    )
    by_hidden = _sum(error @ rows, mesh.vocab)
    return by_head, (nll, by_hidden.reshape(hidden.shape))

  xs = tuple(split(x, block) for x in (hidden, targets, weights))
  zeros = jnp.zeros(rows.shape, jnp.float32)
  by_head, (nll, by_hidden) = jax.lax.scan(step, zeros, xs)
  if mesh.width:
    by_head = jax.lax.psum_scatter(
      by_head, mesh.width, scatter_dimension=1, tiled=True
    )
  others = (*mesh.rows, *mesh.length)
  by_head = _sum(by_head, tuple(a for a in others if a not in mesh.width))
  length = targets.shape[1]
  return joined(nll, length), joined(by_hidden, length), by_head


def _scored(mesh, logits, ids, targets):
  """(log of the sum over classes [n], -log p [b, block], one hot [n, v])."""
  highest = _maximum(logits.max(-1), mesh.vocab)
  exps = jnp.exp(logits - highest[:, None]).sum(-1)
  total = highest + jnp.log(_sum(exps, mesh.vocab))
  # A masked sum, not a gather: it fuses.
  hot = ids == targets.reshape(-1)[:, None]
  chosen = _sum(jnp.where(hot, logits, 0.0).sum(-1), mesh.vocab)
  return total, (total - chosen).reshape(targets.shape), hot


def _gathered(mesh, head, dtype):
  """A device's rows of the head, whole, in a dtype, and their ids."""
  head, first = head.astype(dtype), 0
  if mesh.width:
    head = jax.lax.all_gather(head, mesh.width, axis=1, tiled=True)
  if mesh.vocab:
    first = jax.lax.axis_index(mesh.vocab) * head.shape[0]
  return head, first + jnp.arange(head.shape[0])


def _logits(hidden, rows, ids, vocab_size: int):
  """Logits float32[b * block, V] of float[b, block, D]."""
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
  """[B, L, ...] to [blocks, B, block, ...], the last one padded."""
  batch, length = x.shape[:2]
  count = -(-length // block)
  pad = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(batch, count, block, *x.shape[2:])
  return x.swapaxes(0, 1)


def joined(x: jax.Array, length: int) -> jax.Array:
  """[blocks, B, block, ...] to [B, L, ...], the padding cut off."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
