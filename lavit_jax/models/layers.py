"""Layers every network here is made of, and the one entry for attention."""

import functools
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import activations, matmul
from lavit_jax.models.attention import forms, gpu, mesh, tpu

_POLICIES = jax.checkpoint_policies
# What backward recomputes of a layer, by name (`remat` in every config). The
# products of `matmul.linear` are named "product", what attention gives
# "attention_out".
REMAT = {
  "none": None,  # keep everything
  # Keep what matrix products and attention give, recompute what is between.
  "dots": _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable,
    _POLICIES.save_only_these_names("product", "attention_out"),
  ),
  # The same, the products in the host's memory meanwhile.
  "offload": _POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=["attention_out"],
    names_which_can_be_offloaded=["product"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "attention": _POLICIES.save_only_these_names("attention_out"),
  "full": _POLICIES.nothing_saveable,  # keep only what goes into a layer
}

_LONG = 128  # places of a row from which a kernel would matter
_KERNELS = {"tpu": tpu, "gpu": gpu}

_LOG = logging.getLogger(__name__)


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
) -> jax.Array:
  """Attention of queries to keys; softmax in float32.

  Masks combine: a key is seen where `mask`, `causal` and the segments all
  allow it. A query that sees no key gives zeros. With a `policy` the softmax
  is LaVIT's (`attention.forms.policy_softmax`) and only `causal` may be added.

  Rows that see all keys, all but some keys (a mask of [B, 1, 1, M]), or those
  before them, packed or not, are computed by a library's kernel on the
  platform of the current mesh. It never holds the logits, float32[B, H, L, M]:

    tpu  `attention_tpu`, splash kernel   L and M from 128, Dh 32 ... 512
    gpu  `attention_gpu`, cuDNN's kernel  L and M from 128, Dh to 128 in steps
                                          of 8, bfloat16 or float16
    cpu  none: einsums, by row or block if the logits are large

  What does not fit, policies, and other masks (a cache's) are einsums. Where
  the mesh splits L over `context`, each device gathers the keys and values of
  what the kernels compute and of causal rows.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh]; G divides H, each key head serves H / G heads.
    value: float[B, M, G, Dh].
    mask: bool, broadcastable to [B, H, L, M], True where a key is seen.
    policy: float, broadcastable to [B, H, L, M], factor of each weight.
    policy_eps: the eps of `policy_softmax`.
    causal: query i sees keys 0 ... i + M - L.
    segment_ids: int[B, L], at least 0; L = M, and a query sees keys of its
      own segment.

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
  if policy is not None and (mask is not None or segment_ids is not None):
    raise ValueError(
      "policy cannot be combined with mask or segment_ids: multiply the mask"
      " into the policy instead."
    )
  query = query * query.shape[-1] ** -0.5
  if policy is None and forms.is_of_keys(mask, causal, segment_ids):
    segments = forms.segments(query, key, mask, segment_ids)
    if form := _form(query, key, causal):
      return form(query, key, value, segments)
  seen = forms.combine(query, key, mask, causal, segment_ids)
  return forms.attend(query, key, value, seen, policy, policy_eps)


def _form(query, key, causal):
  """The form that the current mesh asks for, None: einsums of whole arrays."""
  platform = mesh.platform()
  kernel = _KERNELS.get(platform)
  if kernel and kernel.fits(query, key, causal=causal):
    return functools.partial(kernel.attend, causal=causal)
  # One row on a mesh that splits rows: parameters are made, nothing is run.
  outline = query.shape[0] == 1 < mesh.ways()[0]
  if kernel and not outline and min(query.shape[1], key.shape[1]) >= _LONG:
    shapes = (query.shape, key.shape, query.dtype.name)
    _say_no_kernel(platform, *shapes, mesh.ways())
  split = max(mesh.ways()) > 1
  if causal and split and mesh.fits(query, key):
    return functools.partial(mesh.attend, mesh.einsums)
  return None


@functools.cache  # once for each shape
def _say_no_kernel(platform, query, key, dtype, ways):
  """Logs that long rows go without a kernel: slow, and large in memory."""
  _LOG.warning(
    "Attention of %s over keys %s in %s takes no kernel on this %s, but"
    " einsums that hold all logits: see the table of layers.attention. The"
    " mesh splits rows, places and heads %d, %d and %d ways, which must divide"
    " them.",
    query,
    key,
    dtype,
    platform,
    *ways,
  )


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
    variable_axes={"params": 0, "lora": 0},
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
    dot_general=matmul.dot_general,
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
