"""The token merger: kept patches take up what the dropped ones hold.

LaVIT, arXiv 2309.04669, section 3.1. Each block is causal self-attention
among kept patches (raster order), cross-attention to dropped patches, and an
MLP. Two forms of one network, with the same parameters:

  all positions  `__call__`: N queries, the mask a differentiable factor in
                 both softmaxes. form "reference" has the official eps, with
                 which masked and future positions leak a little; form "soft"
                 has eps 0.
  compact        only kept patches are queries and self-attention keys, in a
                 fixed capacity; equals "soft" on kept patches, and is faster.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers

FORMS = {"reference": 1e-6, "soft": 0.0}  # the eps of the policy softmax


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergerConfig:
  """Sizes of the merger.

  Attributes:
    width: D, the encoder's.
    mlp_dim: hidden width of the MLPs.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`.
    unroll: layers a scan step; more is faster to run, slower to compile.
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
class _Sight:
  """What the tokens of a form may see, the same in every block."""

  origin: jax.Array  # float[B, N, D], keys of the cross-attention
  # float[B, 1, L, L], a policy; compact int[B, L], segments of causal rows.
  among: jax.Array
  dropped: jax.Array  # [B, 1, 1, N]: float policy; compact a bool mask
  all_kept: jax.Array | None = None  # bool[B], compact only
  eps: float | None = None  # None: compact


jax.tree_util.register_dataclass(
  _Sight,
  data_fields=["origin", "among", "dropped", "all_kept"],
  meta_fields=["eps"],
)


class Block(nn.Module):
  """Self-attention among kept, cross-attention to dropped, MLP."""

  config: MergerConfig

  @nn.compact
  def __call__(self, x: jax.Array, sight: _Sight):
    """float[B, L, D] -> (float[B, L, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, 1e-5, c.dtype)
    among = blocks.SelfAttention(
      c.num_heads, dtype=c.dtype, name="token_causal_attn"
    )
    dropped = blocks.CrossAttention(
      c.num_heads, dtype=c.dtype, name="token_cross_attn"
    )
    if sight.eps is None:
      see_kept = {"causal": True, "segment_ids": sight.among}
      see_dropped = {"mask": sight.dropped, "mean_if_none": sight.all_kept}
    else:
      see_kept = {"policy": sight.among, "policy_eps": sight.eps}
      see_dropped = {"policy": sight.dropped, "policy_eps": sight.eps}
    x = x + among(norm(name="norm0")(x), **see_kept)
    x = x + dropped(norm(name="norm1")(x), sight.origin, **see_dropped)
    x = x + layers.Mlp(c.mlp_dim, c.dtype, name="mlp")(norm(name="norm2")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return x, None


class TokenMerger(nn.Module):
  """Features and a mask to merged tokens."""

  config: MergerConfig

  def setup(self):
    c = self.config
    self.ln_vision = layers.LayerNorm(1e-5, c.dtype)
    self.blocks = layers.stack(Block, c.depth, c.remat, c.unroll)(c)
    self.norm = layers.LayerNorm(1e-5, c.dtype)

  def __call__(
    self, features: jax.Array, mask: jax.Array, *, form: str = "reference"
  ) -> jax.Array:
    """The all-positions form; differentiable in the mask.

    Args:
      features: float[B, N, D] of the encoder.
      mask: float[B, N], 1 for a kept patch.
      form: "reference" (official numbers) or "soft".

    Returns:
      float[B, N, D]; rows of dropped patches are not meant to be used.
    """
    if form not in FORMS:
      raise ValueError(f"form={form!r}: expected one of {sorted(FORMS)}.")
    mask = mask.astype(jnp.float32)
    num = mask.shape[1]
    eye, causal = jnp.eye(num), jnp.tril(jnp.ones((num, num)))
    kept = mask[:, None, None, :]
    sight = _Sight(
      origin=self.ln_vision(features),
      among=(kept + (1.0 - kept) * eye) * causal,  # [B, 1, N, N]
      dropped=1.0 - kept,
      eps=FORMS[form],
    )
    x, _ = self.blocks(features.astype(self.config.dtype), sight)
    return self.norm(x)

  def compact(self, features: jax.Array, keep: jax.Array, capacity: int):
    """Only kept patches, in raster order, at a fixed capacity.

    Args:
      features: float[B, N, D] of the encoder.
      keep: bool[B, N].
      capacity: K, tokens an image; kept patches beyond it are cut.

    Returns:
      (tokens float[B, K, D], valid bool[B, K], index int32[B, K]); tokens
      that are not valid are zero.
    """
    keep = keep.astype(bool)
    x, valid, index = gather_kept(features, keep, capacity)
    sight = _Sight(
      origin=self.ln_vision(features),
      among=valid.astype(jnp.int32),
      dropped=~keep[:, None, None, :],
      all_kept=keep.all(1),
    )
    x, _ = self.blocks(x.astype(self.config.dtype), sight)
    return jnp.where(valid[..., None], self.norm(x), 0.0), valid, index


def gather_kept(x: jax.Array, keep: jax.Array, capacity: int):
  """Kept rows of each image, in raster order, padded with zeros.

  keep [0, 1, 0, 1] with capacity 3 gives rows [1, 3, -] and index [1, 3, 0].

  Args:
    x: [B, N, ...].
    keep: bool[B, N].
    capacity: K, at most N; kept rows beyond it are cut.

  Returns:
    (x[B, K, ...] zero where not valid, valid bool[B, K], index int32[B, K]).
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
