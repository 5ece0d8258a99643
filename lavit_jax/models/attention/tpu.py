"""Attention on TPU by Pallas' splash kernel.

The kernel never holds the logits, skips blocks that a causal mask hides, and
takes segment ids. It is written for one example on one device: `jax.vmap`
extends it to rows, `mesh.attend` to devices. Rows are padded to its blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from lavit_jax.models.attention import mesh as mesh_lib

# Name of the forward pass's residuals (output and log-sum-exp). A remat policy
# that saves it keeps the backward pass from running forward again.
RESIDUALS = "attention_out"

_LANES = 128
# Smallest and largest. The compiler pads narrow heads in its registers.
_HEAD_DIMS = (32, 512)
_WIDE_HEAD_DIM = 256  # wider heads need smaller blocks to fit
# Queries and keys of a block, by the kind of device. Chosen by size, not
# measured.
_BLOCKS = {"TPU v6 lite": (1024, 1024)}
_DEFAULT_BLOCK = (512, 1024)
# In float32 (an autoencoder's one head of 512) 512 keys do not fit into 8 MiB,
# which is all that a config may leave a kernel: see `compiler_options`.
_WIDE_BLOCK = (256, 256)
# A block is at most this part of a row: a causal block on the diagonal
# computes twice what is needed.
_MIN_BLOCKS = 4
_SMALL_BLOCK = 512  # from which on padding and splitting go in steps of it
# The fused backward pass holds one gradient of the queries per block of keys.
_MAX_FUSED_BLOCKS = 4


def fits(query: jax.Array, key: jax.Array, *, causal: bool) -> bool:
  """Returns whether the kernel supports [B, L, H, Dh] and [B, M, G, Dh].

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    causal: whether a causal mask is applied; then L = M.
  """
  narrowest, widest = _HEAD_DIMS
  length, keys = query.shape[1], key.shape[1]
  return (
    mesh_lib.divides(query)
    and min(length, keys) >= _LANES
    and (length == keys or not causal)
    and narrowest <= query.shape[3] <= widest
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: mesh_lib.SegmentIds | None,
  *,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Computes attention within segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], already scaled.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], at least 0, or None.
    causal: whether query i attends to keys 0 ... i only; then L = M.
    interpret: run the kernel in Python on any platform, for tests.

  Returns:
    float[B, L, H, Dh] of the query's dtype; zeros where a query attends to no
    key.
  """
  _, shards, ways = mesh_lib.ways()
  length, heads, dim = query.shape[1:]
  lengths = _padded(length, shards), _padded(key.shape[1], shards)
  zigzag = causal and shards > 1 and lengths[0] // shards % (2 * _LANES) == 0
  kernel = _kernel(
    heads // ways, dim, lengths, shards, causal, zigzag, interpret
  )
  return mesh_lib.attend(
    functools.partial(_form, zigzag),
    query,
    key,
    value,
    segments,
    causal=causal,
    lengths=lengths,
    constants=kernel,
    specs=functools.partial(_specs, kernel, causal),
  )


def _specs(kernel, causal, axis):
  """Returns specs of the kernel's masks: causal ones differ by shard."""
  mesh = jax.sharding.get_abstract_mesh()
  spec = jax.sharding.PartitionSpec(None, axis if causal else None)
  return kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, spec))


def _form(zigzag, query, key, value, segments, shard, kernel):
  """Runs the kernel on one device's shard; a `mesh.Form`."""
  if zigzag:
    query = _zigzag(query, shard)
    if segments is not None:
      segments = _zigzag(segments[0], shard), segments[1]
  heads_first = lambda x: x.swapaxes(1, 2)
  ids = None if segments is None else splash.SegmentIds(*segments)
  out = jax.vmap(kernel)(
    heads_first(query), heads_first(key), heads_first(value), ids
  )
  out = heads_first(out)
  return _zigzag(out, shard, inverse=True) if zigzag else out


def _kernel(heads, dim, lengths, shards, causal, zigzag, interpret):
  """Returns the kernel for `heads` heads of rows of L queries and M keys."""
  queries, keys = lengths
  per_shard = queries // shards
  mask = splash.FullMask((per_shard, keys))  # the same for each shard
  if causal and shards == 1:
    mask = splash.CausalMask(lengths)
  elif causal:
    mask = _ShardedCausalMask(keys, shards, zigzag)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=block_sizes(per_shard // (1 + zigzag), keys, dim),
    head_shards=1,
    q_seq_shards=shards if causal else 1,
    residual_checkpoint_name=RESIDUALS,
    interpret=interpret,
  )


def _padded(length, shards):
  """Returns the next length that splits into shards of whole blocks."""
  per_shard = -(-length // shards)
  step = _LANES if per_shard <= 2 * _SMALL_BLOCK else _SMALL_BLOCK
  return -(-per_shard // step) * step * shards


def block_sizes(length: int, keys: int, dim: int = 128) -> splash.BlockSizes:
  """Returns the kernel's block sizes.

  Args:
    length: queries that are contiguous in the row: a shard, or half of one.
    keys: positions of the row.
    dim: width of a head.
  """
  queries, block = _BLOCKS.get(mesh_lib.device_kind(), _DEFAULT_BLOCK)
  if dim > _WIDE_HEAD_DIM:
    queries, block = _WIDE_BLOCK
  largest = max(keys // _MIN_BLOCKS, _SMALL_BLOCK)
  queries = _divisor(length, min(queries, largest))
  block = _divisor(keys, min(block, largest))
  fused = keys // block <= _MAX_FUSED_BLOCKS
  return splash.BlockSizes(
    block_q=queries,
    block_kv=block,
    block_kv_compute=_divisor(block, _SMALL_BLOCK),
    block_q_dkv=queries,
    block_kv_dkv=block,
    block_kv_dkv_compute=_divisor(block, _SMALL_BLOCK),
    block_q_dq=None if fused else queries,
    block_kv_dq=None if fused else block,
    use_fused_bwd_kernel=fused,
  )


def _divisor(length, largest):
  """Returns the largest multiple of 128 up to `largest` that divides it."""
  blocks = length // _LANES
  size = max(n for n in range(1, largest // _LANES + 1) if blocks % n == 0)
  return size * _LANES


def _zigzag(x, shard, inverse=False):
  """Balances the work of a causal mask over the shards of the sequence.

  Of n shards, shard i has the halves 2 i and 2 i + 1, and would have about
  2 i + 1 times the work of shard 0. Half h is sent to shard h, or to
  2 n - 1 - h, so that each has an early half and a late one. Of these one is
  even and comes first, one is odd.

  Args:
    x: [b, l, ...] of this shard.
    shard: the `mesh.SequenceShard`.
    inverse: send the halves back.

  Returns:
    The array [b, l, ...] that this shard has afterwards.
  """
  halves = jnp.split(x, 2, axis=1)
  received = []
  for odd, half in enumerate(halves):
    pairs = [(i, _owner(2 * i + odd, shard.count)) for i in range(shard.count)]
    pairs = [pair[::-1] for pair in pairs] if inverse else pairs
    received.append(jax.lax.ppermute(half, shard.axis, pairs))
  return jnp.concatenate(received, axis=1)


def _owner(half, shards):
  """Returns the shard that a half is sent to."""
  return half if half < shards else 2 * shards - 1 - half


def _zigzag_positions(length, shards):
  """Returns positions int32[L] of all shards' queries after `_zigzag`."""
  halves = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
  order = sorted(range(2 * shards), key=lambda h: (_owner(h, shards), h % 2))
  return halves[order].reshape(-1)


class _ShardedCausalMask(splash.Mask):
  """The causal mask of rows of L positions in shards, zigzag or not."""

  def __init__(self, length, shards, zigzag):
    self._key = length, shards, zigzag
    positions = np.arange(length)
    self._positions = _zigzag_positions(length, shards) if zigzag else positions

  @property
  def shape(self) -> tuple[int, int]:
    length = self._key[0]
    return length, length

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = index
    keys = np.arange(self._key[0])[columns]
    return self._positions[rows][:, None] >= keys[None]

  def __eq__(self, other) -> bool:
    return isinstance(other, _ShardedCausalMask) and self._key == other._key

  def __hash__(self) -> int:
    return hash((type(self), self._key))
