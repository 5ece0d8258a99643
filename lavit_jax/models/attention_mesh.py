"""Attention as each device's own program: `jax.shard_map` over the mesh.

XLA cannot split a kernel, so its arrays are split by hand, as the rule table
says: rows over data and fsdp, heads over tensor, the sequence over context.
Where the sequence is split, each device keeps its own queries and gathers all
keys, values and segment ids.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax import sharding
from lavit_jax.models import attention_forms

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


def fits(query: jax.Array, key: jax.Array) -> bool:
  """Whether self-attention of float[B, L, H, Dh] splits evenly."""
  rows, parts, heads = ways()
  return (
    query.shape[1] == key.shape[1]
    and query.shape[0] % rows == 0
    and query.shape[1] % parts == 0
    and query.shape[2] % heads == 0
  )


def attend(
  form: Callable,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None,
) -> jax.Array:
  """Runs a form of causal self-attention on each device's share.

  Args:
    form: maps (query [b, l, h, Dh], key and value [b, L, g, Dh], segment ids
      [b, l] and [b, L] or None twice, the number of this part of the
      sequence, and the axis over which it is split or None) to [b, l, h, Dh].
    query: float[B, L, H, Dh], times the scale; `fits` is True.
    key: float[B, L, G, Dh].
    value: float[B, L, G, Dh].
    segment_ids: int[B, L] or None.

  Returns:
    float[B, L, H, Dh] of the query's dtype.
  """
  _, parts, heads = ways()
  if key.shape[2] % heads:  # too few key heads to split: one a query head
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  if math.prod(ways()) == 1:
    return form(query, key, value, segment_ids, segment_ids, 0, None)
  spec = _specs()
  (axis,) = _axes(spec[1]) if parts > 1 else (None,)

  def mine(query, key, value, segments):
    every, index = segments, 0
    if axis is not None:
      gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
      key, value = gather(key), gather(value)
      every = None if segments is None else gather(segments)
      index = jax.lax.axis_index(axis)
    return form(query, key, value, segments, every, index, axis)

  heads_spec = jax.sharding.PartitionSpec(*spec)
  rows_spec = jax.sharding.PartitionSpec(*spec[:2])
  run = jax.shard_map(
    mine,
    in_specs=(heads_spec, heads_spec, heads_spec, rows_spec),
    out_specs=heads_spec,
    check_vma=False,  # Pallas calls do not say how their outputs vary
  )
  return run(query, key, value, segment_ids)


def einsums(query, key, value, segments, every, index, axis):
  """A form for `attend`: the one XLA compiles for itself."""
  del axis
  length, keys = query.shape[1], key.shape[1]
  place = index * length + jnp.arange(length)
  seen = (place[:, None] >= jnp.arange(keys))[None, None]  # [1, 1, l, L]
  if segments is not None:
    same = segments[:, None, :, None] == every[:, None, None, :]
    seen = seen & same
  return attention_forms.attend(query, key, value, seen, None, 0.0)


def _specs():
  return tuple(nn.logical_to_mesh_axes(_NAMES, sharding.RULES))


def _axes(entry):
  return (entry,) if isinstance(entry, str) else tuple(entry or ())
