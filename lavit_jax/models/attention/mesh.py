"""Attention as each device's own program: `jax.shard_map` over the mesh.

XLA cannot split a kernel, so its arrays are split by hand, as the rule table
says: rows over data and fsdp, heads over tensor, the sequence over context.
Where the sequence is split, each device keeps its own queries and gathers all
keys, values and segment ids.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import sharding
from lavit_jax.models.attention import forms

_NAMES = ("act_batch", "act_len", "act_heads", None)


def platform() -> str:
  """What is being compiled for: "cpu", "tpu" or "gpu".

  The platform of the current mesh (`sharding.use`), whose devices may be a
  topology that is not there; without a mesh, that of the default device.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  device = device or jax.config.jax_default_device
  return getattr(device, "platform", None) or jax.default_backend()


def device_kind() -> str:
  """The kind of the current mesh's devices, "" without a mesh."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.device_kind if device else ""


def ways() -> tuple[int, int, int]:
  """Parts into which the current mesh splits (rows, sequence, heads)."""
  mesh = jax.sharding.get_abstract_mesh()
  if not set(sharding.MESH_AXES) <= set(mesh.axis_names):
    return 1, 1, 1
  return tuple(
    math.prod(mesh.shape[name] for name in _axes(axes)) for axes in _specs()[:3]
  )


@dataclasses.dataclass(frozen=True)
class Part:
  """The part of the queries that a device has.

  Attributes:
    index: int32[], its number.
    count: of all parts.
    axis: the mesh axis over which the queries are split, None if they are not.
  """

  index: jax.Array | int = 0
  count: int = 1
  axis: str | None = None


def divides(query: jax.Array) -> bool:
  """Whether rows and heads of float[B, L, H, Dh] split evenly."""
  rows, _, heads = ways()
  return query.shape[0] % rows == 0 and query.shape[2] % heads == 0


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Whether self-attention of float[B, L, H, Dh] splits evenly."""
  _, parts, _ = ways()
  return (
    divides(query)
    and query.shape[1] == key.shape[1]
    and query.shape[1] % parts == 0
  )


def fill(query, key, value, segments, lengths, *, causal: bool):
  """Rows filled up with places that no place of theirs sees.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M], at least 0, or None.
    lengths: L and M to come.
    causal: keys that come last are then not seen, segments or not.

  Returns:
    The same four, of the new lengths; segments where they are now needed.
  """
  (batch, length), keys = query.shape[:2], key.shape[1]
  if segments is None and not causal and lengths[1] > keys:
    segments = tuple(jnp.zeros((batch, n), jnp.int32) for n in (length, keys))
  if segments is not None:
    segments = tuple(map(_pad, segments, lengths, (-2, -1)))
  key, value = (_pad(x, lengths[1]) for x in (key, value))
  return _pad(query, lengths[0]), key, value, segments


def _pad(x, length, value=0):
  """[B, L, ...] filled up with a value to [B, length, ...]."""
  if x.shape[1] == length:
    return x
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=value)


def blind(segments: tuple[jax.Array, jax.Array]) -> jax.Array:
  """bool[B, L, 1, 1]: the queries whose segment has no key."""
  return ~same(segments).any(-1)[:, 0, :, None, None]


def attend(
  form: Callable,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: tuple[jax.Array, jax.Array] | None,
  constants: Any = None,
  specs: Callable[[str | None], Any] = lambda axis: None,
) -> jax.Array:
  """Runs a form of attention on each device's share.

  Args:
    form: maps (query [b, l, h, Dh], key and value [b, M, g, Dh], segments
      ([b, l], [b, M]) or None, `Part`, constants) to [b, l, h, Dh].
    query: float[B, L, H, Dh], times the scale; `divides` is True, and the
      parts of the sequence divide L and M.
    key: float[B, M, G, Dh].
    value: float[B, M, G, Dh].
    segments: int[B, L] and int[B, M]: a query sees keys of its own; or None.
    constants: a tree of arrays that depend on no input, or None.
    specs: their partition, given the axis over which queries are split.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  _, parts, heads = ways()
  if key.shape[2] % heads:  # too few key heads to split: one a query head
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  if math.prod(ways()) == 1:
    return form(query, key, value, segments, Part(), constants)
  spec = _specs()
  (axis,) = _axes(spec[1]) if parts > 1 else (None,)

  def mine(query, key, value, segments, constants):
    part = Part()
    if axis is not None:
      gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
      key, value = gather(key), gather(value)
      if segments is not None:
        segments = segments[0], gather(segments[1])
      part = Part(jax.lax.axis_index(axis), parts, axis)
    return form(query, key, value, segments, part, constants)

  heads_spec = jax.sharding.PartitionSpec(*spec)
  rows_spec = jax.sharding.PartitionSpec(*spec[:2])
  ids_spec = None if segments is None else (rows_spec, rows_spec)
  run = jax.shard_map(
    mine,
    in_specs=(heads_spec, heads_spec, heads_spec, ids_spec, specs(axis)),
    out_specs=heads_spec,
    check_vma=False,  # Pallas calls do not say how their outputs vary
  )
  return run(query, key, value, segments, constants)


def einsums(query, key, value, segments, part, constants):
  """A causal form for `attend`: the one XLA compiles for itself."""
  del constants
  seen = causal(query.shape[1], key.shape[1], part)
  if segments is not None:
    seen = seen & same(segments)
  return forms.attend(query, key, value, seen, None, 0.0)


def causal(length: int, keys: int, part: Part) -> jax.Array:
  """bool[1, 1, l, M]: what a part's queries see of keys that are not later."""
  place = part.index * length + jnp.arange(length)
  return (place[:, None] >= jnp.arange(keys))[None, None]


def same(segments: tuple[jax.Array, jax.Array]) -> jax.Array:
  """bool[B, 1, L, M] of int[B, L] and int[B, M]: where they are equal."""
  queries, keys = segments
  return queries[:, None, :, None] == keys[:, None, None, :]


def _specs():
  return tuple(nn.logical_to_mesh_axes(_NAMES, sharding.RULES))


def _axes(entry):
  return (entry,) if isinstance(entry, str) else tuple(entry or ())
