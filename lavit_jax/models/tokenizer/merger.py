"""The token merger: compresses dropped patches into the kept ones.

LaVIT, arXiv 2309.04669, section 3.1. Each block is causal self-attention
among kept patches (in raster order), cross-attention to dropped patches, and
an MLP. One network is computed in two ways, with the same parameters:

  all positions  `__call__`: N queries; the mask is a differentiable factor in
                 both softmaxes. Form "reference" has the official eps, with
                 which masked and later positions leak a little; form "soft"
                 has eps 0.
  compact        `compact`: only kept patches are queries and self-attention
                 keys, at a fixed capacity. It equals "soft" on kept patches,
                 and is faster.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers

FORMS = {"reference": 1e-6, "soft": 0.0}  # eps of the policy softmax
# Rows [B, K, ...], valid bool[B, K], index int32[B, K] of the patches.
Gathered = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergerConfig:
  """Sizes of the merger.

  Attributes:
    width: D, the encoder's.
    depth: number of blocks.
    num_heads: H, of both attentions.
    mlp_dim: hidden width of the MLPs.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`.
    unroll: blocks per scan step; more run faster and compile slower.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1

  def __post_init__(self):
    if self.width % self.num_heads:
      raise errors.ConfigError(
        f"merger.width={self.width} is not a multiple of"
        f" num_heads={self.num_heads}: heads must be equal in size."
        " Change merger.num_heads or the encoder's width."
      )


LAVIT_7B = MergerConfig(
  width=1408,
  depth=12,
  num_heads=16,
  mlp_dim=6144,
  dtype="bfloat16",
  remat="full",
)
TINY = MergerConfig(width=96, depth=2, num_heads=4, mlp_dim=384)


@dataclasses.dataclass(frozen=True)
class _MergerContext:
  """Patches and masks that all blocks share: a pytree, broadcast by the scan.

  Attributes:
    patches: float[B, N, D], normed features: keys of the cross-attention.
    kept: which keys self-attention uses. All positions: float[B, 1, N, N], a
      policy. Compact: int[B, K], segments of causal rows.
    dropped: which patches cross-attention uses, [B, 1, 1, N]. All positions:
      a float policy. Compact: a bool mask.
    all_kept: bool[B], compact only: images without a dropped patch.
    eps: of the policy softmax; None: compact.
  """

  patches: jax.Array
  kept: jax.Array
  dropped: jax.Array
  all_kept: jax.Array | None = None
  eps: float | None = None


jax.tree_util.register_dataclass(
  _MergerContext,
  data_fields=["patches", "kept", "dropped", "all_kept"],
  meta_fields=["eps"],
)


class Block(nn.Module):
  """Self-attention among kept, cross-attention to dropped patches, MLP."""

  config: MergerConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, context: _MergerContext
  ) -> tuple[jax.Array, None]:
    """Maps float[B, L, D] to (float[B, L, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, 1e-5, c.dtype)
    self_attention = blocks.SelfAttention(
      c.num_heads, dtype=c.dtype, name="token_causal_attn"
    )
    cross_attention = blocks.CrossAttention(
      c.num_heads, dtype=c.dtype, name="token_cross_attn"
    )
    to_kept: dict[str, Any]
    to_dropped: dict[str, Any]
    if context.eps is None:
      to_kept = {"causal": True, "segment_ids": context.kept}
      to_dropped = {"mask": context.dropped, "use_mean": context.all_kept}
    else:
      to_kept = {"policy": context.kept, "policy_eps": context.eps}
      to_dropped = {"policy": context.dropped, "policy_eps": context.eps}
    x = x + self_attention(norm(name="norm0")(x), **to_kept)
    h = norm(name="norm1")(x)
    x = x + cross_attention(h, context.patches, **to_dropped)
    x = x + layers.Mlp(c.mlp_dim, c.dtype, name="mlp")(norm(name="norm2")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return x, None


class TokenMerger(nn.Module):
  """Maps features and a mask of kept patches to merged tokens."""

  config: MergerConfig

  def setup(self) -> None:
    c = self.config
    self.ln_vision = layers.LayerNorm(1e-5, c.dtype)
    self.blocks = layers.stack(self, Block, c.depth, c.remat, c.unroll)(c)
    self.norm = layers.LayerNorm(1e-5, c.dtype)

  def __call__(
    self, features: jax.Array, mask: jax.Array, *, form: str = "reference"
  ) -> jax.Array:
    """Merges at all positions; differentiable in the mask.

    Args:
      features: float[B, N, D] of the encoder.
      mask: float[B, N], 1 for kept patches, 0 for dropped ones.
      form: "reference" (official numbers) or "soft".

    Returns:
      float[B, N, D]; rows of dropped patches have no meaning.

    Raises:
      ValueError: another form.
    """
    if form not in FORMS:
      raise ValueError(f"form={form!r}: expected one of {sorted(FORMS)}.")
    mask = mask.astype(jnp.float32)
    num = mask.shape[1]
    eye, causal = jnp.eye(num), jnp.tril(jnp.ones((num, num)))
    kept = mask[:, None, None, :]
    context = _MergerContext(
      patches=self.ln_vision(features),
      kept=(kept + (1.0 - kept) * eye) * causal,  # [B, 1, N, N]
      dropped=1.0 - kept,
      eps=FORMS[form],
    )
    x, _ = self.blocks(features.astype(self.config.dtype), context)
    return self.norm(x)

  def compact(
    self, features: jax.Array, keep: jax.Array, capacity: int
  ) -> Gathered:
    """Merges at kept patches only, in raster order, at a fixed capacity.

    Args:
      features: float[B, N, D] of the encoder.
      keep: bool[B, N], True for kept patches.
      capacity: K, tokens per image; kept patches beyond it are cut.

    Returns:
      (tokens float[B, K, D], valid bool[B, K], index int32[B, K]); tokens
      that are not valid are zero.
    """
    keep = keep.astype(bool)
    x, valid, index = gather_kept(features, keep, capacity)
    context = _MergerContext(
      patches=self.ln_vision(features),
      kept=valid.astype(jnp.int32),
      dropped=~keep[:, None, None, :],
      all_kept=keep.all(1),
    )
    x, _ = self.blocks(x.astype(self.config.dtype), context)
    return jnp.where(valid[..., None], self.norm(x), 0.0), valid, index

  def merge_kept(
    self, features: jax.Array, keep: jax.Array, capacity: int, *, form: str
  ) -> Gathered:
    """Returns the tokens of kept patches, computed in either way.

    Args:
      features: float[B, N, D] of the encoder.
      keep: bool[B, N], True for kept patches.
      capacity: K, tokens per image; kept patches beyond it are cut.
      form: "compact", or a form of `__call__`.

    Returns:
      As `compact`.
    """
    if form == "compact":
      return self.compact(features, keep, capacity)
    merged = self(features, keep.astype(jnp.float32), form=form)
    return gather_kept(merged, keep.astype(bool), capacity)


def gather_kept(x: jax.Array, keep: jax.Array, capacity: int) -> Gathered:
  """Gathers the kept rows of each image, in raster order, padded with zeros.

  keep [0, 1, 0, 1] with capacity 3 gives rows [1, 3, -] and index [1, 3, 0].

  Args:
    x: [B, N, ...].
    keep: bool[B, N].
    capacity: K, at most N; kept rows beyond it are cut.

  Returns:
    (x[B, K, ...] zero where not valid, valid bool[B, K], index int32[B, K]).

  Raises:
    ValueError: the capacity is not in 1 ... N.
  """
  num = keep.shape[1]
  if not 0 < capacity <= num:
    raise ValueError(
      f"capacity={capacity} must lie in 1 ... {num}, the number of patches."
    )
  order = jnp.argsort(~keep, axis=1, stable=True)[:, :capacity]
  valid = jnp.arange(capacity) < keep.sum(1, keepdims=True)
  index = jnp.where(valid, order, 0).astype(jnp.int32)
  shape = (*index.shape, *(1,) * (x.ndim - 2))
  rows = jnp.take_along_axis(x, index.reshape(shape), axis=1)
  zero = jnp.zeros((), x.dtype)
  return jnp.where(valid.reshape(shape), rows, zero), valid, index
