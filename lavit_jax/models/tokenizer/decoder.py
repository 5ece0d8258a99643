"""The semantic decoder: code vectors back to all N features of the encoder.

LaVIT, arXiv 2309.04669, section 3.1. N learned queries read the codes, whose
positions count in kept order (0, 1, 2 ...), never by raster place. The
official release has a whole decoder for each of its two U-Nets, with the
heads below.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of the decoder.

  Attributes:
    num_patches: N, learned queries, and positions for as many codes.
    out_dim: width of the reconstructed features, the encoder's.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`.
    unroll: layers a scan step; more is faster to run, slower to compile.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  num_patches: int
  code_dim: int
  out_dim: int
  dtype: str = "float32"
  remat: str = "none"
  unroll: int = 1

  def __post_init__(self):
    if self.width % self.num_heads:
      raise errors.ConfigError(
        f"decoder.width={self.width} is not a multiple of"
        f" num_heads={self.num_heads}: heads must be equal in size."
        " Change decoder.width or decoder.num_heads."
      )


LAVIT_7B = DecoderConfig(
  width=1408,
  depth=12,
  num_heads=16,
  mlp_dim=6144,
  num_patches=256,
  code_dim=32,
  out_dim=1408,
  dtype="bfloat16",
  remat="full",
)
TINY = DecoderConfig(
  width=96,
  depth=2,
  num_heads=4,
  mlp_dim=384,
  num_patches=36,
  code_dim=32,
  out_dim=96,
)


@dataclasses.dataclass(frozen=True)
class _Codes:
  """The codes as keys, and which of them count."""

  keys: jax.Array  # float[B, K, D]
  mask: jax.Array | None  # bool[B, 1, 1, K]
  policy: jax.Array | None = None  # float[B, 1, 1, K]


jax.tree_util.register_dataclass(
  _Codes, data_fields=["keys", "mask", "policy"], meta_fields=[]
)


class Block(nn.Module):
  """Self-attention of the queries, cross-attention to the codes, MLP."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array, codes: _Codes):
    """float[B, N, D] -> (float[B, N, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, 1e-5, c.dtype)
    own = blocks.SelfAttention(c.num_heads, dtype=c.dtype, name="self_attn")
    cross = blocks.CrossAttention(c.num_heads, dtype=c.dtype, name="cross_attn")
    x = x + own(norm(name="norm0")(x))
    x = x + cross(
      norm(name="norm1")(x), codes.keys, mask=codes.mask, policy=codes.policy
    )
    x = x + layers.Mlp(c.mlp_dim, c.dtype, name="mlp")(norm(name="norm2")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return x, None


class SemanticDecoder(nn.Module):
  """Codes to reconstructed features; two forms with the same parameters."""

  config: DecoderConfig

  def setup(self):
    c = self.config
    # Unit scale: with the usual 0.02 all queries and all keys look alike to
    # the first attentions, and it takes long until a patch finds its code.
    boxed, unit = nn.with_logical_partitioning, nn.initializers.normal(1.0)
    axes, shape = (None, "position", "embed"), (1, c.num_patches, c.width)
    self.in_proj = layers.dense(
      c.width, ("code_dim", "embed"), dtype=c.dtype, kernel_init=unit
    )
    half = nn.initializers.normal(0.5)
    self.pos_embed = self.param("pos_embed", boxed(half, axes), shape)
    self.query_embed = self.param("query_embed", boxed(unit, axes), shape)
    self.blocks = layers.stack(Block, c.depth, c.remat, c.unroll)(c)
    self.norm = layers.LayerNorm(1e-5, c.dtype)
    self.fc1 = layers.dense(c.width, ("embed", "mlp"), dtype=c.dtype)
    self.fc2 = layers.dense(c.out_dim, ("mlp", "embed"), dtype=c.dtype)

  def __call__(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """Features from the codes of kept patches, gathered in raster order.

    Args:
      vectors: float[B, K, code_dim], K at most num_patches.
      valid: bool[B, K], False for padding, which comes last.

    Returns:
      float[B, N, out_dim].
    """
    c = self.config
    if vectors.shape[1] > c.num_patches:
      raise ValueError(
        f"{vectors.shape[1]} codes an image, but the decoder has positions"
        f" for {c.num_patches}. Cut the codes to that many."
      )
    valid = valid.astype(bool)
    keys = jnp.where(valid[..., None], self.in_proj(vectors), 0.0)
    keys = keys + self.pos_embed[:, : vectors.shape[1]].astype(keys.dtype)
    # Padding is additive -10000 officially, so that with no code at all every
    # padding row is seen alike.
    mask = valid | ~valid.any(1, keepdims=True)
    return self._read(_Codes(keys, mask[:, None, None, :]))

  def soft(self, vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """The same from all positions; differentiable in the mask.

    Args:
      vectors: float[B, N, code_dim], those of dropped patches too.
      mask: float[B, N], 1 for a kept patch.

    Returns:
      float[B, N, out_dim].
    """
    kept = jax.lax.stop_gradient(mask) > 0.5
    order = jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0)  # int[B, N]
    keys = self.in_proj(vectors)
    places = jnp.take(self.pos_embed[0].astype(keys.dtype), order, axis=0)
    policy = mask.astype(jnp.float32)[:, None, None, :]
    return self._read(_Codes(keys + places, None, policy))

  def _read(self, codes):
    query = self.query_embed.astype(codes.keys.dtype)
    query = jnp.broadcast_to(query, (codes.keys.shape[0], *query.shape[1:]))
    x, _ = self.blocks(query, codes)
    return self.fc2(jnp.tanh(self.fc1(self.norm(x))))


class LowresDecoder(nn.Module):
  """Decoder and projection to the condition of Stable Diffusion's U-Net."""

  config: DecoderConfig
  condition_dim: int = 768

  def setup(self):
    self.decoder = SemanticDecoder(self.config)
    self.unet_proj = layers.dense(
      self.condition_dim, ("embed", None), dtype=self.config.dtype
    )

  def __call__(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """float[B, K, code_dim], bool[B, K] -> float[B, N, condition_dim]."""
    return self.unet_proj(self.decoder(vectors, valid))


class HighresDecoder(nn.Module):
  """Decoder, two projections and pooling: the condition of SDXL's U-Net."""

  config: DecoderConfig
  condition_dims: tuple[int, int] = (768, 1280)
  pooled_dim: int = 1280

  def setup(self):
    c = self.config
    self.decoder = SemanticDecoder(c)
    first, second = self.condition_dims
    axes = ("embed", None)
    self.unet_proj_1 = layers.dense(first, axes, dtype=c.dtype)
    self.unet_proj_2 = layers.dense(second, axes, dtype=c.dtype)
    self.unet_attnpool = AttentionPool(c.num_heads, self.pooled_dim, c.dtype)

  def __call__(self, vectors: jax.Array, valid: jax.Array):
    """float[B, K, code_dim], bool[B, K] -> condition and pooled.

    Returns:
      (float[B, N, sum(condition_dims)], float[B, pooled_dim]).
    """
    x = self.decoder(vectors, valid)
    both = jnp.concatenate([self.unet_proj_1(x), self.unet_proj_2(x)], axis=-1)
    return both, self.unet_attnpool(x)


class AttentionPool(nn.Module):
  """CLIP's attention pooling: the mean asks, mean and features answer."""

  num_heads: int
  out_dim: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, N, D] to float[B, out_dim]."""
    batch, num, width = x.shape
    init = nn.with_logical_partitioning(
      nn.initializers.normal(width**-0.5), ("position", "embed")
    )
    places = self.param("positional_embedding", init, (num + 1, width))
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    x = x + places.astype(x.dtype)
    dense = functools.partial(
      layers.dense, width, ("embed", "heads"), dtype=self.dtype
    )
    shape = (batch, -1, self.num_heads, width // self.num_heads)
    query = dense(name="q_proj")(x[:, :1]).reshape(shape)
    key, value = (dense(name=f"{n}_proj")(x).reshape(shape) for n in "kv")
    out = layers.attention(query, key, value).reshape(batch, width)
    axes = ("heads", None)
    return layers.dense(self.out_dim, axes, dtype=self.dtype, name="c_proj")(
      out
    )
