"""The semantic decoder: maps code vectors to all N features of the encoder.

LaVIT, arXiv 2309.04669, section 3.1. N learned queries attend to the codes.
Codes have positions in kept order (0, 1, 2 ...), not in the raster. The
official release has a decoder of its own for each of its two U-Nets:
`LowresDecoder` and `HighresDecoder`.
"""

import dataclasses
import functools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import blocks, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of the decoder.

  Attributes:
    width: D, of the blocks.
    depth: number of blocks.
    num_heads: H, of both attentions.
    mlp_dim: hidden width of the MLPs.
    num_patches: N, learned queries, and positions for as many codes.
    code_dim: width of a code.
    out_dim: width of the reconstructed features, the encoder's.
    dtype: of the computation; parameters and norms are float32.
    remat: name of a policy in `layers.REMAT`.
    unroll: blocks per scan step; more run faster and compile slower.
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
class _CodeContext:
  """Codes that all blocks attend to: a pytree, broadcast over the scan."""

  keys: jax.Array  # float[B, K, D]
  mask: jax.Array | None  # bool[B, 1, 1, K]
  policy: jax.Array | None = None  # float[B, 1, 1, K]


jax.tree_util.register_dataclass(
  _CodeContext, data_fields=["keys", "mask", "policy"], meta_fields=[]
)


class Block(nn.Module):
  """Self-attention of the queries, cross-attention to the codes, MLP."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x: jax.Array, codes: _CodeContext
  ) -> tuple[jax.Array, None]:
    """Maps float[B, N, D] to (float[B, N, D], None)."""
    c = self.config
    norm = functools.partial(layers.LayerNorm, 1e-5, c.dtype)
    self_attention = blocks.SelfAttention(
      c.num_heads, dtype=c.dtype, name="self_attn"
    )
    cross_attention = blocks.CrossAttention(
      c.num_heads, dtype=c.dtype, name="cross_attn"
    )
    x = x + self_attention(norm(name="norm0")(x))
    x = x + cross_attention(
      norm(name="norm1")(x), codes.keys, mask=codes.mask, policy=codes.policy
    )
    x = x + layers.Mlp(c.mlp_dim, c.dtype, name="mlp")(norm(name="norm2")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return x, None


class SemanticDecoder(nn.Module):
  """Maps codes to reconstructed features; `soft` has the same parameters."""

  config: DecoderConfig

  def setup(self) -> None:
    c = self.config
    # Unit scale: with the usual 0.02 the first attentions cannot tell queries,
    # or keys, apart, and training takes long to match patches and codes.
    boxed, unit = layers.partitioned, nn.initializers.normal(1.0)
    axes, shape = (None, "position", "embed"), (1, c.num_patches, c.width)
    self.in_proj = layers.dense(
      c.width, ("code_dim", "embed"), dtype=c.dtype, kernel_init=unit
    )
    half = nn.initializers.normal(0.5)
    self.pos_embed = self.param("pos_embed", boxed(half, axes), shape)
    self.query_embed = self.param("query_embed", boxed(unit, axes), shape)
    self.blocks = layers.stack(self, Block, c.depth, c.remat, c.unroll)(c)
    self.norm = layers.LayerNorm(1e-5, c.dtype)
    self.fc1 = layers.dense(c.width, ("embed", "mlp"), dtype=c.dtype)
    self.fc2 = layers.dense(c.out_dim, ("mlp", "embed"), dtype=c.dtype)

  def __call__(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """Reconstructs features from the codes of kept patches.

    Args:
      vectors: float[B, K, code_dim] in raster order, K at most num_patches.
      valid: bool[B, K], False for padding, which comes last.

    Returns:
      float[B, N, out_dim].

    Raises:
      ValueError: more codes than positions.
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
    # The official mask adds -10000 to the logits of padding: without any valid
    # code, attention is to all padding alike.
    mask = valid | ~valid.any(1, keepdims=True)
    return self._decode(_CodeContext(keys, mask[:, None, None, :]))

  def soft(self, vectors: jax.Array, mask: jax.Array) -> jax.Array:
    """Reconstructs features from all positions; differentiable in the mask.

    Args:
      vectors: float[B, N, code_dim], of kept and dropped patches.
      mask: float[B, N], 1 for kept patches, 0 for dropped ones.

    Returns:
      float[B, N, out_dim].
    """
    kept = jax.lax.stop_gradient(mask) > 0.5
    order = jnp.maximum(jnp.cumsum(kept, axis=1) - 1, 0)  # int[B, N]
    keys = self.in_proj(vectors)
    positions = jnp.take(self.pos_embed[0].astype(keys.dtype), order, axis=0)
    policy = mask.astype(jnp.float32)[:, None, None, :]
    return self._decode(_CodeContext(keys + positions, None, policy))

  def _decode(self, codes):
    query = self.query_embed.astype(codes.keys.dtype)
    query = jnp.broadcast_to(query, (codes.keys.shape[0], *query.shape[1:]))
    x, _ = self.blocks(query, codes)
    return self.fc2(jnp.tanh(self.fc1(self.norm(x))))


class LowresDecoder(nn.Module):
  """Decoder and projection to the condition of Stable Diffusion's U-Net."""

  config: DecoderConfig
  condition_dim: int = 768

  def setup(self) -> None:
    self.decoder = SemanticDecoder(self.config)
    self.unet_proj = layers.dense(
      self.condition_dim, ("embed", None), dtype=self.config.dtype
    )

  def __call__(self, vectors: jax.Array, valid: jax.Array) -> jax.Array:
    """Maps [B, K, code_dim], valid bool[B, K] to [B, N, condition_dim]."""
    return self.unet_proj(self.decoder(vectors, valid))


class HighresDecoder(nn.Module):
  """Decoder, two projections and pooling: the condition of SDXL's U-Net."""

  config: DecoderConfig
  condition_dims: tuple[int, int] = (768, 1280)
  pooled_dim: int = 1280

  def setup(self) -> None:
    c = self.config
    self.decoder = SemanticDecoder(c)
    first, second = self.condition_dims
    axes = ("embed", None)
    self.unet_proj_1 = layers.dense(first, axes, dtype=c.dtype)
    self.unet_proj_2 = layers.dense(second, axes, dtype=c.dtype)
    self.unet_attnpool = AttentionPool(c.num_heads, self.pooled_dim, c.dtype)

  def __call__(
    self, vectors: jax.Array, valid: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Maps float[B, K, code_dim] and bool[B, K] to a condition.

    Returns:
      Tokens float[B, N, sum(condition_dims)], pooled float[B, pooled_dim].
    """
    x = self.decoder(vectors, valid)
    tokens = jnp.concatenate(
      [self.unet_proj_1(x), self.unet_proj_2(x)], axis=-1
    )
    return tokens, self.unet_attnpool(x)


class AttentionPool(nn.Module):
  """CLIP's attention pooling: the mean attends to itself and the features."""

  num_heads: int
  out_dim: int
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, N, D] to float[B, out_dim]."""
    batch, num, width = x.shape
    init = layers.partitioned(
      nn.initializers.normal(width**-0.5), ("position", "embed")
    )
    positions = self.param("positional_embedding", init, (num + 1, width))
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    x = x + positions.astype(x.dtype)
    dense = functools.partial(
      layers.dense, width, ("embed", "heads"), dtype=self.dtype
    )
    split = functools.partial(
      einops.rearrange, pattern="b l (h d) -> b l h d", h=self.num_heads
    )
    query = split(dense(name="q_proj")(x[:, :1]))
    key, value = (split(dense(name=f"{n}_proj")(x)) for n in "kv")
    out = layers.attention(query, key, value).reshape(batch, width)
    project = layers.dense(
      self.out_dim, ("heads", None), dtype=self.dtype, name="c_proj"
    )
    return project(out)
