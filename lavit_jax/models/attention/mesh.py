"""Attention as one program per device: `jax.shard_map` over the mesh.

XLA cannot partition a kernel, so its arrays are split here by the rule table:
rows over data and fsdp, heads over tensor, the sequence over context. Where
the sequence is split, each device keeps its own queries and gathers all keys,
values and segment ids.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import sharding
from lavit_jax.models.attention import forms

_NAMES = ("act_batch", "act_len", "act_heads", None)
SegmentIds = tuple[jax.Array, jax.Array]  # int[B, L] of queries, int[B, M]


def platform() -> str:
  """Returns the platform being compiled for: "cpu", "tpu" or "gpu".

  It is that of the current mesh (`sharding.use`), whose devices may be a
  topology that this machine does not have; without a mesh, that of the
  default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  # JAX adds its flags at run time.
  device = device or jax.config.jax_default_device  # type: ignore[attr-defined]
  return getattr(device, "platform", None) or jax.default_backend()


def device_kind() -> str:
  """Returns the kind of the current mesh's devices, "" without a mesh."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else ""


def ways() -> tuple[int, int, int]:
  """Returns how many ways the mesh splits (rows, sequence, heads)."""
  mesh = jax.sharding.get_abstract_mesh()
  if not set(sharding.MESH_AXES) <= set(mesh.axis_names):
    return 1, 1, 1
  rows, sequence, heads = (
    math.prod(mesh.shape[name] for name in _axes(axes)) for axes in _specs()[:3]
  )
  return rows, sequence, heads


@dataclasses.dataclass(frozen=True)
class SequenceShard:
  """The shard of the queries that one device holds.

  Attributes:
    index: int32[], the number of the shard.
    count: number of shards.
    axis: mesh axis over which the queries are split, None if they are not.
  """

  index: jax.Array | int = 0
  count: int = 1
  axis: str | None = None


# Maps (query [b, l, h, Dh], key and value [b, M, g, Dh], segment ids ([b, l],
# [b, M]) or None, a SequenceShard, constants) to [b, l, h, Dh].
Form = Callable[..., jax.Array]


def divides(query: jax.Array) -> bool:
  """Returns whether rows and heads of float[B, L, H, Dh] split evenly."""
  rows, _, heads = ways()
  return query.shape[0] % rows == 0 and query.shape[2] % heads == 0


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Returns whether self-attention of float[B, L, H, Dh] splits evenly."""
  _, shards, _ = ways()
  return (
    divides(query)
    and query.shape[1] == key.shape[1]
    and query.shape[1] % shards == 0
  )


def attend(
  form: Form,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: SegmentIds | None,
  *,
  causal: bool,
  lengths: Sequence[int] | None = None,
  constants: Any = None,
  specs: Callable[[str | None], Any] = lambda axis: None,
) -> jax.Array:
  """Runs a form of attention on each device's shard.

  Args:
    form: see `Form`.
    query: float[B, L, H, Dh], already scaled; `divides` is True.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], at least 0: a query attends to the keys
      of its own segment; or None.
    causal: whether query i attends to keys 0 ... i only; then L = M.
    lengths: L and M to pad to, multiples of the ways in which the sequence is
      split; None if L and M already are.
    constants: a tree of arrays that depend on no input, or None.
    specs: gives their partition from the axis over which queries are split.

  Returns:
    float[B, L, H, Dh] of the query's dtype; zeros where a query attends to no
    key.
  """
  length = query.shape[1]
  arrays = (query, key, value, segments)
  if lengths is not None:
    arrays = _pad(*arrays, lengths, causal=causal)
  out = _attend_sharded(form, *arrays, constants, specs)[:, :length]
  if segments is None or causal:  # each query attends to one key at least
    return out
  return jnp.where(_attends_to_none(segments), 0, out)


def _pad(query, key, value, segments, lengths, *, causal):
  """Pads rows with positions that none of their own attends to."""
  (batch, length), keys = query.shape[:2], key.shape[1]
  # Keys at the end of a causal row are masked even without segments.
  if segments is None and not causal and lengths[1] > keys:
    segments = tuple(jnp.zeros((batch, n), jnp.int32) for n in (length, keys))
  if segments is not None:
    segments = tuple(map(_pad_to, segments, lengths, (-2, -1)))
  key, value = (_pad_to(x, lengths[1]) for x in (key, value))
  return _pad_to(query, lengths[0]), key, value, segments


def _pad_to(x, length, value=0):
  """Pads [B, L, ...] with a value to [B, length, ...]."""
  if x.shape[1] == length:
    return x
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=value)


def _attends_to_none(segments):
  """Returns bool[B, L, 1, 1], True for queries whose segment has no key."""
  return ~same_segment(segments).any(-1)[:, 0, :, None, None]


def _attend_sharded(form, query, key, value, segments, constants, specs):
  """Runs the form under `jax.shard_map`; arguments are those of `attend`."""
  _, shards, heads = ways()
  if key.shape[2] % heads:  # too few key heads to split: one per query head
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  if math.prod(ways()) == 1:
    return form(query, key, value, segments, SequenceShard(), constants)
  spec = _specs()
  (axis,) = _axes(spec[1]) if shards > 1 else (None,)

  def per_device(query, key, value, segments, constants):
    shard = SequenceShard()
    if axis is not None:
      gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
      key, value = gather(key), gather(value)
      if segments is not None:
        segments = segments[0], gather(segments[1])
      shard = SequenceShard(jax.lax.axis_index(axis), shards, axis)
    return form(query, key, value, segments, shard, constants)

  heads_spec = jax.sharding.PartitionSpec(*spec)
  rows_spec = jax.sharding.PartitionSpec(*spec[:2])
  ids_spec = None if segments is None else (rows_spec, rows_spec)
  run = jax.shard_map(
    per_device,
    in_specs=(heads_spec, heads_spec, heads_spec, ids_spec, specs(axis)),
    out_specs=heads_spec,
    check_vma=False,  # Pallas calls do not say how their outputs vary
  )
  return run(query, key, value, segments, constants)


def einsums(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: SegmentIds | None,
  shard: SequenceShard,
  constants: Any,
) -> jax.Array:
  """Computes causal attention by einsums; a `Form` for `attend`."""
  del constants
  mask = causal_mask(query.shape[1], key.shape[1], shard)
  if segments is not None:
    mask = mask & same_segment(segments)
  return forms.attend(query, key, value, mask, None, 0.0)


def causal_mask(length: int, keys: int, shard: SequenceShard) -> jax.Array:
  """Returns bool[1, 1, l, M], True for keys not after a shard's query."""
  position = shard.index * length + jnp.arange(length)
  return (position[:, None] >= jnp.arange(keys))[None, None]


def same_segment(segments: SegmentIds) -> jax.Array:
  """Returns bool[B, 1, L, M], where int[B, L] and int[B, M] are equal."""
  queries, keys = segments
  return queries[:, None, :, None] == keys[:, None, None, :]


def _specs():
  return tuple(nn.logical_to_mesh_axes(_NAMES, sharding.RULES))


def _axes(entry):
  return (entry,) if isinstance(entry, str) else tuple(entry or ())
