"""Layers that every network shares, and the entry point of attention."""

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util

from lavit_jax.models import activations, matmul
from lavit_jax.models.attention import forms, mesh

with epy.lazy_imports():  # Pallas is imported where there is a TPU alone
  from lavit_jax.models.attention import gpu, tpu

_POLICIES = jax.checkpoint_policies
# Rematerialization policies: which activations of a layer are saved for the
# backward pass, by the name that configs give in `remat`. Results of
# `matmul.linear` are named "product", that of a LLaMA's attention behind its
# heads "projection", those of attention itself "attention_out".
REMAT = {
  "none": None,  # save everything
  # Save results of matrix products and attention, recompute the rest.
  "dots": _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable,
    _POLICIES.save_only_these_names("product", "projection", "attention_out"),
  ),
  # The same without the projection: of a LLaMA's layer a twelfth of the forward
  # products is computed twice, and less is kept.
  "most": _POLICIES.save_only_these_names("product", "attention_out"),
  # Save attention on the device, products in the host's memory.
  "offload": _POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=["attention_out"],
    names_which_can_be_offloaded=["product", "projection"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
  "attention": _POLICIES.save_only_these_names("attention_out"),
  "full": _POLICIES.nothing_saveable,  # save only the inputs of a layer
}

_LONG = 128  # positions from which on a missing kernel is worth a warning
_KERNELS = {"tpu": tpu, "gpu": gpu}

_LOG = logging.getLogger(__name__)


def traced_once(init: Callable[..., Any]) -> Callable[..., Any]:
  """Returns an initializer that is traced once for each shape and dtype.

  flax traces that of every parameter again whenever `apply` is traced, to
  compare shapes: findings/flax_initializers_at_apply.sh.

  Args:
    init: maps (key, shape, dtype) to an array, without a side effect.
  """
  return jax.jit(init, static_argnums=(1, 2))


LECUN_NORMAL = traced_once(nn.initializers.lecun_normal())


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
  """Computes attention of queries to keys, its softmax in float32.

  Masks combine: a query attends to a key where `mask`, `causal` and the
  segments all allow it. A query that attends to no key gives zeros. With a
  `policy` the softmax is LaVIT's (`attention.forms.policy_softmax`), and only
  `causal` may be combined with it.

  Rows without a mask, with a mask of keys ([B, 1, 1, M]) and causal rows,
  packed or not, are computed by a kernel on the platform of the current mesh.
  It never holds the logits, float32[B, H, L, M]:

    tpu  `attention.tpu`, splash kernel   L and M from 128, Dh 32 ... 512
    gpu  `attention.gpu`, cuDNN's kernel  L and M from 128, Dh to 128 in steps
                                          of 8, bfloat16 or float16
    cpu  none: einsums, by row or block if the logits are large

  Other shapes, policies and other masks (such as a cache's) are computed by
  einsums. Where the mesh splits L over `context`, each device gathers keys and
  values for the kernels and for causal rows.

  Args:
    query: float[B, L, H, Dh].
    key: float[B, M, G, Dh]; G divides H, each key head serves H / G heads.
    value: float[B, M, G, Dh].
    mask: bool, broadcastable to [B, H, L, M], False for masked keys.
    policy: float, broadcastable to [B, H, L, M], factor of each weight.
    policy_eps: the eps of `policy_softmax`.
    causal: whether query i attends to keys 0 ... i + M - L only.
    segment_ids: int[B, L], at least 0; L = M, and a query attends to the keys
      of its own segment.

  Returns:
    float[B, L, H, Dh] of the query's dtype.

  Raises:
    ValueError: heads do not divide, or a policy is combined with a mask.
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
  if policy is None and forms.is_key_mask(mask, causal, segment_ids):
    segments = forms.segments(query, key, mask, segment_ids)
    if attend := _partitioned(query, key, causal):
      return attend(query, key, value, segments)
  mask = forms.combined_mask(query, key, mask, causal, segment_ids)
  with forms.scope(causal, key.shape[1]):
    return forms.attend(query, key, value, mask, policy, policy_eps)


def _partitioned(query, key, causal):
  """Returns attention by a kernel or by shards; None if neither applies."""
  platform = mesh.platform()
  kernel = _KERNELS.get(platform)
  if kernel and kernel.fits(query, key, causal=causal):
    return functools.partial(kernel.attend, causal=causal)
  # A single row on a mesh that splits rows only initializes parameters.
  is_init = query.shape[0] == 1 < mesh.ways()[0]
  if kernel and not is_init and min(query.shape[1], key.shape[1]) >= _LONG:
    shapes = (query.shape, key.shape, query.dtype.name)
    _warn_of_einsums(platform, *shapes, mesh.ways())
  split = max(mesh.ways()) > 1
  if causal and split and mesh.fits(query, key):
    return functools.partial(mesh.attend, mesh.einsums, causal=True)
  return None


@functools.cache  # once for each shape
def _warn_of_einsums(platform, query, key, dtype, ways):
  """Logs that long rows use no kernel: slow, and large in memory."""
  _LOG.warning(
    "Attention of queries %s over keys %s in %s uses no kernel on this %s, but"
    " einsums that hold all logits: the docstring of layers.attention lists"
    " the shapes that kernels support. The mesh splits rows, positions and"
    " heads %d, %d and %d ways, which must divide them.",
    query,
    key,
    dtype,
    platform,
    *ways,
  )


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Returns x / norm over the last axis; 0 with gradient 0 for norms <= eps."""
  square = jnp.square(x).sum(-1, keepdims=True)
  small = square <= eps * eps
  inverse = jax.lax.rsqrt(jnp.where(small, 1.0, square))
  return x * jnp.where(small, 0.0, inverse)


def rotary(
  x: jax.Array, positions: jax.Array, theta: float = 10000.0
) -> jax.Array:
  """Applies rotary position embeddings to pairs (i, i + Dh / 2).

  Su et al., arXiv 2104.09864, with the pairs of Hugging Face's LLaMA.

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
  """Returns the block with a policy of `REMAT`, for use under `nn.scan`."""
  if name not in REMAT:
    raise ValueError(f"remat={name!r} is unknown; use one of {sorted(REMAT)}.")
  if name == "none":
    return block
  return nn.remat(block, policy=REMAT[name], prevent_cse=False)


def stack(
  parent: nn.Module,
  block: type[nn.Module],
  depth: int,
  remat_name: str,
  unroll: int = 1,
) -> type[nn.Module]:
  """Returns `depth` blocks as one scan over stacked parameters.

  Args:
    parent: module that has the stack, initializing or applied.
    block: maps (carry, context) to (carry, output). The context, one pytree,
      is the same for all layers.
    depth: number of layers; parameters get it as a first axis, "layers".
    remat_name: see `remat`.
    unroll: layers per scan step.
  """
  return nn.scan(
    remat(block, remat_name),
    variable_axes={"params": 0, "lora": 0},
    split_rngs={"params": True},
    in_axes=nn.broadcast,
    length=depth,
    unroll=unroll,
    metadata_params={nn.PARTITION_NAME: "layers"},
    # The check traces the body once more, for outputs that depend on no layer:
    # there are none. Without it, though, a seed draws other parameters
    # (findings/flax_scan_constancy.sh), so it stays while they are drawn.
    check_constancy_invariants=parent.is_initializing(),
  )


def stack_params(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Stacks the arrays of modules `name_0`, `name_1`, ... under `name`.

  A single module stays as it is: `stack` is for several.

  Args:
    params: nested dicts of NumPy or JAX arrays, unboxed.
    name: of the modules, at any depth of the tree.

  Returns:
    The parameters of the same network with its layers in a `stack`.
  """
  layer = re.compile(re.escape(name) + r"_(\d+)")
  flat = traverse_util.flatten_dict(dict(params))
  stacked: dict[tuple[str, ...], Any] = {}
  groups: dict[tuple[str, ...], dict[int, tuple[str, ...]]] = {}
  for path, leaf in flat.items():
    matches = [
      (i, m) for i, key in enumerate(path) if (m := layer.fullmatch(key))
    ]
    if not matches:
      stacked[path] = leaf
      continue
    (i, match), *_ = matches
    target = (*path[:i], name, *path[i + 1 :])
    groups.setdefault(target, {})[int(match[1])] = path
  for target, paths in groups.items():
    leaves = [flat[paths[i]] for i in range(len(paths))]
    if len(leaves) == 1:
      stacked[paths[0]] = leaves[0]
    else:
      is_numpy = isinstance(leaves[0], np.ndarray)
      stacked[target] = (np if is_numpy else jnp).stack(leaves)
  return traverse_util.unflatten_dict(stacked)


def unstack_params(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Reverses `stack_params`; returns arrays under `name_0`, `name_1`, ...."""
  unstacked = {}
  for path, leaf in traverse_util.flatten_dict(dict(params)).items():
    if name not in path:
      unstacked[path] = leaf
      continue
    i = path.index(name)
    for number, layer in enumerate(leaf):
      unstacked[*path[:i], f"{name}_{number}", *path[i + 1 :]] = layer
  return traverse_util.unflatten_dict(unstacked)


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
  """Maps [B, H, W, C] to [B, H / patch, W / patch, patch * patch * C]."""
  return einops.rearrange(
    x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch
  )


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
  """Maps [B, h, w, patch * patch * C] to [B, h * patch, w * patch, C]."""
  return einops.rearrange(
    x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch
  )


def partitioned(
  init: Callable[..., Any], axes: Sequence[str | None]
) -> Callable[..., Any]:
  """Returns an initializer whose parameters have logical axes."""
  return nn.with_logical_partitioning(init, tuple(axes))


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  use_bias: bool = True,
  dtype: Any = "float32",
  kernel_init: Callable[..., Any] = LECUN_NORMAL,
  name: str | None = None,
) -> nn.Dense:
  """Returns an `nn.Dense` whose kernel has logical axes, its bias the last."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=jnp.dtype(dtype),
    kernel_init=partitioned(kernel_init, axes),
    bias_init=partitioned(nn.initializers.zeros, axes[-1:]),
    dot_general=matmul.dot_general,
    name=name,
  )


def _constant(value, *axes):
  return partitioned(nn.initializers.constant(value), axes)


class RMSNorm(nn.Module):
  """Computes x / sqrt(mean x² + eps) * scale in float32, then `dtype`."""

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
  """LayerNorm in float32, with the variance of the centred values."""

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
  """Two linear layers with the exact GELU between them."""

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
