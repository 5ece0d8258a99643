"""Layers every network here is made of, and the one entry for attention."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import activations, dots

# What backward recomputes of a layer, by name (`remat` in every config).
REMAT = {
  "none": None,  # keep everything
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_IMPLEMENTATIONS = (None, "xla", "cudnn")
_LARGE_LOGITS = 1 << 23  # bytes; see `_attend_by_row`


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  mask: jax.Array | None = None,
  policy: jax.Array | None = None,
  policy_eps: float = 0.0,
  causal: bool = False,
  segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Attention of queries to keys; softmax in float32.

  Masks combine: a key is seen where `mask`, `causal` and the segments all
  allow it. A query that sees no key gives zeros. With a `policy` the softmax
  is LaVIT's (see `policy_softmax`) and only `causal` may be added.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh]; G divides H, each key head serves H / G heads.
    value: float[B, M, G, Dh].
    mask: bool, broadcastable to [B, H, L, M], True where a key is seen.
    policy: float, broadcastable to [B, H, L, M], factor of each weight.
    policy_eps: the eps of `policy_softmax`.
    causal: query i sees keys 0 ... i + M - L.
    segment_ids: int[B, L]; a query sees keys of its own segment.
    kv_segment_ids: int[B, M], by default `segment_ids`.
    scale: of the logits, Dh**-0.5 by default.
    implementation: None for the einsums here, which run anywhere; "xla" or
      "cudnn" for `jax.nn.dot_product_attention` (no policy).

  Returns:
    float[B, L, H, Dh] of the query's dtype.

  Raises:
    ValueError: heads that do not divide, or a combination not listed here.
  """
  heads, groups = query.shape[2], key.shape[2]
  if heads % groups or key.shape != value.shape:
    raise ValueError(
      f"query {query.shape}, key {key.shape}, value {value.shape}: key and"
      " value must be equal in shape and their heads must divide the query's."
    )
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f"implementation={implementation!r}: expected one of {_IMPLEMENTATIONS}."
    )
  if policy is not None and (
    implementation or mask is not None or segment_ids is not None
  ):
    raise ValueError(
      "policy cannot be combined with mask, segment_ids or implementation:"
      " multiply the mask into the policy instead."
    )
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  seen = _combine(query, key, mask, causal, segment_ids, kv_segment_ids)
  if implementation is not None:
    out = jax.nn.dot_product_attention(
      query, key, value, mask=seen, scale=scale, implementation=implementation
    )
    if seen is not None:  # [B, H | 1, L] -> [B, L, H | 1, 1]
      any_key = jnp.broadcast_to(
        seen.any(-1), (seen.shape[0], seen.shape[1], query.shape[1])
      )
      out = jnp.where(any_key.swapaxes(1, 2)[..., None], out, 0)
    return out.astype(query.dtype)
  rest = (query * scale, key, value, seen, policy)
  size = 4 * query.shape[1] * heads * key.shape[1]  # bytes of a row's logits
  if size >= _LARGE_LOGITS and policy is None:
    small = _attend_by_block
  elif query.shape[0] > 1 and size * query.shape[0] >= _LARGE_LOGITS:
    small = functools.partial(_attend_by_row, policy_eps)
  else:
    return _attend(policy_eps, *rest)
  return jax.lax.platform_dependent(
    *rest, cpu=small, default=functools.partial(_attend, policy_eps)
  )


def _attend(policy_eps, query, key, value, seen, policy):
  """`attention` of scaled queries; seen and policy [B | 1, …] or None."""
  logits = _logits(query, key)  # [B, H, L, M]
  if policy is None:
    weights = masked_softmax(logits, seen)
  else:
    policy = policy if seen is None else policy * seen
    weights = policy_softmax(logits, policy, policy_eps)
  return _mix(weights.astype(query.dtype), value)


def _attend_by_row(policy_eps, query, key, value, seen, policy):
  """`_attend` row by row: logits stay in a CPU's caches, twice as fast."""

  def widen(x):
    return None if x is None else jnp.broadcast_to(x, (rows, *x.shape[1:]))

  def one(row):
    arrays = [None if x is None else x[None] for x in row]
    return _attend(policy_eps, *arrays)[0]

  rows = query.shape[0]
  return jax.lax.map(one, (query, key, value, widen(seen), widen(policy)))


def _attend_by_block(query, key, value, seen, policy):
  """`_attend` without a policy, one head and some queries at a time.

  Logits that outgrow a CPU's caches take most of the time: this is up to 8
  times as fast there.
  """
  del policy
  (batch, length, heads, dim), keys = query.shape, key.shape[1]
  block = min(length, max(_LARGE_LOGITS // (4 * keys), 1))
  count = -(-length // block)
  rest = count * block - length
  query = jnp.pad(query, ((0, 0), (0, rest), (0, 0), (0, 0)))
  shape = (batch * heads, count, block, dim)
  query = query.transpose(0, 2, 1, 3).reshape(shape)
  if seen is not None and seen.shape[2] > 1:
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, rest), (0, 0)))

  def head(given):
    number, query = given
    row, column = number // heads, number % heads
    mine = column * key.shape[2] // heads
    k, v = key[row, :, mine], value[row, :, mine]  # [M, Dh]
    mask = None
    if seen is not None:
      mask = seen[row % seen.shape[0], column % seen.shape[1]]  # [L | 1, M]

    def some(given):
      start, query = given
      one = mask
      if mask is not None and mask.shape[0] > 1:
        one = jax.lax.dynamic_slice_in_dim(mask, start, block)
      logits = jnp.einsum(
        "ld,md->lm", query, k, preferred_element_type=jnp.float32
      )
      return masked_softmax(logits, one).astype(v.dtype) @ v

    return jax.lax.map(some, (jnp.arange(count) * block, query))

  out = jax.lax.map(head, (jnp.arange(batch * heads), query))
  out = out.reshape(batch, heads, count * block, dim)[:, :, :length]
  return out.transpose(0, 2, 1, 3)


def _combine(query, key, mask, causal, segment_ids, kv_segment_ids):
  """One bool mask [B | 1, H | 1, L | 1, M] or None."""
  length, keys = query.shape[1], key.shape[1]
  seen = mask
  if causal:
    order = jnp.tril(jnp.ones((length, keys), bool), keys - length)
    seen = order[None, None] if seen is None else seen & order
  if segment_ids is not None:
    if kv_segment_ids is None:
      kv_segment_ids = segment_ids
    same = segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]
    seen = same if seen is None else seen & same
  return seen


def _logits(query, key):
  """float32[B, H, L, M] products of float[B, L, H, Dh], float[B, M, G, Dh]."""
  batch, length, heads, dim = query.shape
  groups = key.shape[2]
  float32 = jnp.float32
  if groups == heads:
    return jnp.einsum(
      "blhd,bmhd->bhlm", query, key, preferred_element_type=float32
    )
  query = query.reshape(batch, length, groups, heads // groups, dim)
  out = jnp.einsum(
    "blgrd,bmgd->bgrlm", query, key, preferred_element_type=float32
  )
  return out.reshape(batch, heads, length, key.shape[1])


def _mix(weights, value):
  """float[B, L, H, Dh] of weights [B, H, L, M] and values [B, M, G, Dh]."""
  batch, heads, length, keys = weights.shape
  groups, dim = value.shape[2:]
  if groups == heads:
    return jnp.einsum("bhlm,bmhd->blhd", weights, value)
  weights = weights.reshape(batch, groups, heads // groups, length, keys)
  out = jnp.einsum("bgrlm,bmgd->blgrd", weights, value)
  return out.reshape(batch, length, heads, dim)


def masked_softmax(logits: jax.Array, seen: jax.Array | None) -> jax.Array:
  """Softmax of float32[..., M] over the keys seen; zeros where none is."""
  if seen is None:
    return jax.nn.softmax(logits, axis=-1)
  lowest = jnp.finfo(logits.dtype).min
  weights = jax.nn.softmax(jnp.where(seen, logits, lowest), axis=-1)
  return jnp.where(seen.any(-1, keepdims=True), weights, 0.0)


def policy_softmax(
  logits: jax.Array, policy: jax.Array, eps: float
) -> jax.Array:
  """LaVIT's softmax with a policy, differentiable in the policy.

  e = exp(a - max over all keys) * policy, then (e + eps / M) / (sum e + eps).
  With eps > 0 every key keeps a little weight, masked ones too (the official
  code's). With eps = 0 it is the softmax over the keys of policy > 0, and the
  mean over all keys where there is none, the limit of the form above.

  Args:
    logits: float32[B, H, L, M].
    policy: float, broadcastable to it, in 0 ... 1.
    eps: a constant >= 0.

  Returns:
    float32[B, H, L, M] whose last axis sums to one.
  """
  keys = logits.shape[-1]
  highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - highest) * policy
  total = weights.sum(-1, keepdims=True)
  if eps:
    return (weights + eps / keys) / (total + eps)
  some = total > 0
  return jnp.where(some, weights / jnp.where(some, total, 1.0), 1.0 / keys)


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Unit vectors x / norm; where the norm is below eps, 0 with gradient 0."""
  square = jnp.square(x).sum(-1, keepdims=True)
  small = square <= eps * eps
  inverse = jax.lax.rsqrt(jnp.where(small, 1.0, square))
  return x * jnp.where(small, 0.0, inverse)


def rotary(
  x: jax.Array, positions: jax.Array, theta: float = 10000.0
) -> jax.Array:
  """Turns pairs (i, i + Dh / 2) of float[B, L, H, Dh], as HF's LLaMA does.

  Args:
    x: float[B, L, H, Dh], Dh even.
    positions: int[B, L].
    theta: base of the wavelengths.

  Returns:
    float[B, L, H, Dh] of x's dtype, computed in float32.
  """
  half = x.shape[-1] // 2
  rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None].astype(jnp.float32) * rates  # [B, L, Dh/2]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)


def remat(block: type[nn.Module], name: str) -> type[nn.Module]:
  """The block with the named remat policy, for use under `nn.scan`."""
  if name not in REMAT:
    raise ValueError(f"remat={name!r} is unknown; use one of {sorted(REMAT)}.")
  if name == "none":
    return block
  return nn.remat(block, policy=REMAT[name], prevent_cse=False)


def stack(
  block: type[nn.Module], depth: int, remat_name: str, unroll: int = 1
) -> type[nn.Module]:
  """`depth` blocks as one scan with stacked parameters.

  A block maps (carry, context) to (carry, output); the context, one pytree,
  is the same for all. Parameters get a first axis "layers".
  """
  return nn.scan(
    remat(block, remat_name),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=depth,
    unroll=unroll,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  use_bias: bool = True,
  dtype: Any = "float32",
  kernel_init=None,
  name: str | None = None,
) -> nn.Dense:
  """`nn.Dense` with the logical axes of its kernel; the bias has the last."""
  kernel_init = kernel_init or nn.initializers.lecun_normal()
  zeros = nn.initializers.zeros
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=jnp.dtype(dtype),
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(zeros, axes[-1:]),
    dot_general=dots.dot_general,
    name=name,
  )


def _constant(value, *axes):
  init = nn.initializers.constant(value)
  return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
  """x / sqrt(mean x² + eps) * scale in float32, then `dtype`."""

  epsilon: float = 1e-5
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[..., D] to dtype[..., D]."""
    scale = self.param("scale", _constant(1.0, "norm"), x.shape[-1:])
    x = x.astype(jnp.float32)
    variance = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.epsilon)
    return (x * scale).astype(self.dtype)


class LayerNorm(nn.Module):
  """LayerNorm in float32, the variance from the centred values."""

  epsilon: float = 1e-5
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[..., D] to dtype[..., D]."""
    scale = self.param("scale", _constant(1.0, "norm"), x.shape[-1:])
    bias = self.param("bias", _constant(0.0, "norm"), x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(variance + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class Mlp(nn.Module):
  """Linear, exact GELU, linear."""

  hidden_dim: int
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    up, down = ("embed", "mlp"), ("mlp", "embed")
    h = dense(self.hidden_dim, up, dtype=self.dtype, name="fc1")(x)
    h = activations.gelu(h)  # [B, L, F]
    h = nn.with_logical_constraint(h, ("act_batch", "act_len", "act_mlp"))
    return dense(x.shape[-1], down, dtype=self.dtype, name="fc2")(h)


class GatedMlp(nn.Module):
  """SwiGLU block of hidden size F, no biases."""

  hidden_dim: int
  dtype: Any = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    linear = functools.partial(dense, use_bias=False, dtype=self.dtype)
    up, down = ("embed", "mlp"), ("mlp", "embed")
    gate = activations.silu(linear(self.hidden_dim, up, name="gate")(x))
    h = gate * linear(self.hidden_dim, up, name="up")(x)  # [B, L, F]
    h = nn.with_logical_constraint(h, ("act_batch", "act_len", "act_mlp"))
    return linear(x.shape[-1], down, name="down")(h)
