"""Causal self-attention of packed rows on TPU: Pallas' splash kernel.

The kernel never holds the logits, skips blocks above the diagonal, and takes
segment ids. It is written for one example on one device: `vmap` over rows,
`attention_mesh` over devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from lavit_jax.models import attention_mesh

# The name of what forward leaves for backward (output and log-sum-exp): a
# remat policy that saves it keeps backward from running forward again.
RESIDUALS = "attention_out"

_LANES = 128
_HEAD_DIMS = (64, 256)
# Queries and keys of a block, by the kind of device. Chosen by size alone: no
# chip was there to measure them on.
_BLOCKS = {"TPU v6 lite": (1024, 1024)}
_BLOCK = (512, 1024)
# Of a row: a causal block on the diagonal computes twice what is needed.
_LARGEST_SHARE = 4
_ENOUGH = 512
# The fused backward keeps one gradient of the queries a block of keys.
_MOST_FUSED = 4


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Whether the kernel takes float[B, L, H, Dh] and float[B, L, G, Dh]."""
  least, most = _HEAD_DIMS
  own = query.shape[1] // attention_mesh.ways()[1]
  return (
    attention_mesh.fits(query, key)
    and own % _LANES == 0
    and own > 0
    and least <= query.shape[3] <= most
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Causal self-attention inside segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], times the scale.
    key: float[B, L, G, Dh].
    value: float[B, L, G, Dh].
    segment_ids: int[B, L] or None.
    interpret: run the kernel's Python, anywhere: for tests.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  form = functools.partial(_form, interpret)
  return attention_mesh.attend(form, query, key, value, segment_ids)


def _form(interpret, query, key, value, segments, every, index, axis):
  """The kernel on one device's share; see `attention_mesh.attend`."""
  parts = key.shape[1] // query.shape[1]
  trade = parts > 1 and query.shape[1] % (2 * _LANES) == 0
  if trade:
    query = _trade(query, axis, parts)
    segments = None if segments is None else _trade(segments, axis, parts)
  kernel = _kernel(query.shape, key.shape[1], trade, interpret)
  if parts > 1:
    kernel = _part(kernel, index, parts)
  heads_first = lambda x: x.swapaxes(1, 2)
  ids = None if segments is None else splash.SegmentIds(segments, every)
  out = jax.vmap(kernel)(
    heads_first(query), heads_first(key), heads_first(value), ids
  )
  out = heads_first(out)
  return _trade(out, axis, parts, back=True) if trade else out


def _kernel(shape, keys, trade, interpret):
  """The kernel for queries [b, l, h, Dh] of rows of `keys` places."""
  _, length, heads, _ = shape
  parts = keys // length
  mask = splash.CausalMask((keys, keys))
  if trade:
    mask.q_sequence = _traded(keys, parts)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=block_sizes(length // (1 + trade), keys),
    head_shards=1,
    q_seq_shards=parts,
    residual_checkpoint_name=RESIDUALS,
    interpret=interpret,
  )


def block_sizes(length: int, keys: int) -> splash.BlockSizes:
  """Blocks for `length` queries in a piece and rows of `keys` places."""
  queries, block = _BLOCKS.get(attention_mesh.device_kind(), _BLOCK)
  most = max(keys // _LARGEST_SHARE, _ENOUGH)
  queries = _divisor(length, min(queries, most))
  block = _divisor(keys, min(block, most))
  fused = keys // block <= _MOST_FUSED
  return splash.BlockSizes(
    block_q=queries,
    block_kv=block,
    block_kv_compute=_divisor(block, _ENOUGH),
    block_q_dkv=queries,
    block_kv_dkv=block,
    block_kv_dkv_compute=_divisor(block, _ENOUGH),
    block_q_dq=None if fused else queries,
    block_kv_dq=None if fused else block,
    use_fused_bwd_kernel=fused,
  )


def _divisor(length, most):
  """The largest multiple of 128 that divides `length` and is <= most."""
  blocks = length // _LANES
  size = max(n for n in range(1, most // _LANES + 1) if blocks % n == 0)
  return size * _LANES


def _part(kernel, index, parts):
  """The kernel of one part of the sequence, whose masks are their own."""

  def own(axis, array):
    if array is None:
      return None
    size = array.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)

  def cut(info):
    return info and info._replace(
      data_next=own(1, info.data_next),
      block_mask=own(1, info.block_mask),
      q_sequence=own(0, info.q_sequence),
    )

  infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
  return type(kernel)(*map(cut, infos), **kernel.kwargs)


def _trade(x, axis, parts, back=False):
  """Evens out the work of a causal mask over the parts of the sequence.

  Of 2 n halves of parts, part i has the halves 2 i and 2 i + 1, and would
  have about 2 i + 1 times the work of part 0. Half h goes to part h, or to
  2 n - 1 - h, so that each gets an early half and a late one. A part always
  gets one even half, put first, and one odd half.

  Args:
    x: [b, l, ...] of this part.
    axis: the mesh axis over which the sequence is split.
    parts: its size.
    back: the other way round.

  Returns:
    The same shape.
  """
  halves = jnp.split(x, 2, axis=1)
  moved = []
  for odd, half in enumerate(halves):
    pairs = [(i, _owner(2 * i + odd, parts)) for i in range(parts)]
    pairs = [pair[::-1] for pair in pairs] if back else pairs
    moved.append(jax.lax.ppermute(half, axis, pairs))
  return jnp.concatenate(moved, axis=1)


def _owner(half, parts):
  return half if half < parts else 2 * parts - 1 - half


def _traded(length, parts):
  """Places int32[L] of all the parts' queries after `_trade`."""
  halves = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
  order = sorted(range(2 * parts), key=lambda h: (_owner(h, parts), h % 2))
  return halves[order].reshape(-1)
