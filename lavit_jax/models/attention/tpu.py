"""Attention on TPU: Pallas' splash kernel.

The kernel never holds the logits, skips blocks that a causal mask hides, and
takes segment ids. It is written for one example on one device: `vmap` over
rows, `attention_mesh` over devices. Rows are padded to its blocks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from lavit_jax.models.attention import mesh as mesh_lib

# The name of what forward leaves for backward (output and log-sum-exp): a
# remat policy that saves it keeps backward from running forward again.
RESIDUALS = "attention_out"

_LANES = 128
_HEAD_DIMS = (32, 512)  # the compiler fills up narrow ones in its registers
_WIDE = 256  # from here on blocks must be smaller to fit
# Queries and keys of a block, by the kind of device. Chosen by size alone: no
# chip was there to measure them on.
_BLOCKS = {"TPU v6 lite": (1024, 1024)}
_BLOCK = (512, 1024)
# In float32 (an autoencoder's one head of 512) 512 keys did not fit into 8 MiB,
# which is what a config may leave a kernel: `compiler_options`.
_BLOCK_OF_WIDE = (256, 256)
# Of a row: a causal block on the diagonal computes twice what is needed.
_LARGEST_SHARE = 4
_ENOUGH = 512
# The fused backward keeps one gradient of the queries a block of keys.
_MOST_FUSED = 4


def fits(query: jax.Array, key: jax.Array, *, causal: bool) -> bool:
  """Whether the kernel takes float[B, L, H, Dh] and float[B, M, G, Dh].

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    causal: whether places are compared; then L = M.
  """
  least, most = _HEAD_DIMS
  length, keys = query.shape[1], key.shape[1]
  return (
    mesh_lib.divides(query)
    and min(length, keys) >= _LANES
    and (length == keys or not causal)
    and least <= query.shape[3] <= most
  )


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  *,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Attention inside segments; `fits` must be True.

  Args:
    query: float[B, L, H, Dh], times the scale.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], at least 0, or None.
    causal: whether query i sees only keys 0 ... i; then L = M.
    interpret: run the kernel's Python, anywhere: for tests.

  Returns:
    float[B, L, H, Dh] of the query's dtype; zeros where a query sees no key.
  """
  _, parts, ways = mesh_lib.ways()
  length, heads, dim = query.shape[1:]
  lengths = _padded(length, parts), _padded(key.shape[1], parts)
  trade = causal and parts > 1 and lengths[0] // parts % (2 * _LANES) == 0
  kernel = _kernel(heads // ways, dim, lengths, parts, causal, trade, interpret)
  out = mesh_lib.attend(
    functools.partial(_form, trade),
    *mesh_lib.fill(query, key, value, segments, lengths, causal=causal),
    kernel,
    functools.partial(_specs, kernel, causal),
  )[:, :length]
  if segments is None or causal:  # each query sees a key, itself at least
    return out
  return jnp.where(mesh_lib.blind(segments), 0, out)


def _specs(kernel, causal, axis):
  """The kernel's masks, split over the queries' axis where they differ."""
  mesh = jax.sharding.get_abstract_mesh()
  spec = jax.sharding.PartitionSpec(None, axis if causal else None)
  return kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, spec))


def _form(trade, query, key, value, segments, part, kernel):
  """The kernel on one device's share; see `mesh.attend`."""
  if trade:
    query = _trade(query, part)
    if segments is not None:
      segments = _trade(segments[0], part), segments[1]
  heads_first = lambda x: x.swapaxes(1, 2)
  ids = None if segments is None else splash.SegmentIds(*segments)
  out = jax.vmap(kernel)(
    heads_first(query), heads_first(key), heads_first(value), ids
  )
  out = heads_first(out)
  return _trade(out, part, back=True) if trade else out


def _kernel(heads, dim, lengths, parts, causal, trade, interpret):
  """The kernel for `heads` heads of rows of L queries and M keys."""
  queries, keys = lengths
  own = queries // parts
  mask = splash.FullMask((own, keys))  # the same for each part
  if causal and parts == 1:
    mask = splash.CausalMask(lengths)
  elif causal:
    mask = _CausalParts(keys, parts, trade)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=block_sizes(own // (1 + trade), keys, dim),
    head_shards=1,
    q_seq_shards=parts if causal else 1,
    residual_checkpoint_name=RESIDUALS,
    interpret=interpret,
  )


def _padded(length, parts):
  """The next length whose parts are made of blocks that are not small."""
  own = -(-length // parts)
  step = _LANES if own <= 2 * _ENOUGH else _ENOUGH
  return -(-own // step) * step * parts


def block_sizes(length: int, keys: int, dim: int = 128) -> splash.BlockSizes:
  """Blocks for `length` queries in a piece and rows of `keys` places."""
  queries, block = _BLOCKS.get(mesh_lib.device_kind(), _BLOCK)
  if dim > _WIDE:
    queries, block = _BLOCK_OF_WIDE
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


def _trade(x, part, back=False):
  """Evens out the work of a causal mask over the parts of the sequence.

  Of 2 n halves of parts, part i has the halves 2 i and 2 i + 1, and would
  have about 2 i + 1 times the work of part 0. Half h goes to part h, or to
  2 n - 1 - h, so that each gets an early half and a late one. A part always
  gets one even half, put first, and one odd half.

  Args:
    x: [b, l, ...] of this part.
    part: the `attention_mesh.Part`.
    back: the other way round.

  Returns:
    The same shape.
  """
  halves = jnp.split(x, 2, axis=1)
  moved = []
  for odd, half in enumerate(halves):
    pairs = [(i, _owner(2 * i + odd, part.count)) for i in range(part.count)]
    pairs = [pair[::-1] for pair in pairs] if back else pairs
    moved.append(jax.lax.ppermute(half, part.axis, pairs))
  return jnp.concatenate(moved, axis=1)


def _owner(half, parts):
  return half if half < parts else 2 * parts - 1 - half


def _traded(length, parts):
  """Places int32[L] of all the parts' queries after `_trade`."""
  halves = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
  order = sorted(range(2 * parts), key=lambda h: (_owner(h, parts), h % 2))
  return halves[order].reshape(-1)


class _CausalParts(splash.Mask):
  """The causal mask of rows of L places in parts, which may have traded."""

  def __init__(self, length, parts, trade):
    self._given = length, parts, trade
    self._places = _traded(length, parts) if trade else np.arange(length)

  @property
  def shape(self) -> tuple[int, int]:
    return self._given[:1] * 2

  def __getitem__(self, index) -> np.ndarray:
    rows, columns = index
    keys = np.arange(self._given[0])[columns]
    return self._places[rows][:, None] >= keys[None]

  def __eq__(self, other) -> bool:
    return isinstance(other, _CausalParts) and self._given == other._given

  def __hash__(self) -> int:
    return hash((type(self), self._given))
