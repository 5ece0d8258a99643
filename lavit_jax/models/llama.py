"""LLaMA, the decoder-only language model of text and visual tokens.

Pre-norm blocks of causal attention (rotary positions, grouped keys) and
SwiGLU, one scan over the layers, embedding and head not tied (Touvron et al.,
arXiv 2302.13971 and 2307.09288). A row may mix ids and continuous embeddings:
where `use_embeds` is True the embedding of the id is replaced. This is how an
image that is a condition enters (LaVIT, arXiv 2309.04669, section 3.2).

Kernels, embedding and head may be int8 with scales beside them
(`infer/loading/quantize.py`). The parameters tell which; the config does not.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, blocks, layers, low_precision
from lavit_jax.models import matmul as matmul_lib
from lavit_jax.models.attention import context as context_lib

Params = Mapping[str, Any]  # nested dicts of arrays, unboxed

_PADDING_LOGIT = -1e9  # of rows of the head past the vocabulary
_VOCAB_MULTIPLE = 128
_LARGE = 30_000_000  # weights in layers; see `for_decoding`


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Sizes of a language model, and how it is computed.

  Attributes:
    vocab_size: ids in use; embedding and head have `padded_vocab` rows.
    width: D, of embeddings and hidden states.
    depth: number of layers.
    num_heads: heads of queries.
    num_kv_heads: heads of keys and values, a divisor of `num_heads`.
    mlp_dim: F, hidden width of the MLPs.
    rope_theta: base of the rotary wavelengths.
    norm_eps: eps of the RMSNorms.
    max_len: longest sequence meant; longer ones are computed all the same.
    dtype: of the computation; parameters are float32.
    remat: name of a policy in `layers.REMAT`.
    matmul: number format of the layers' products in training, one of
      `low_precision.FORMATS`; "" for dtype.
    unroll: layers per scan step; more run faster and compile slower.
    scan: whether the layers are one scan over stacked parameters; see
      `unstacked`.
  """

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int
  mlp_dim: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  max_len: int = 4096
  dtype: str = "float32"
  remat: str = "none"
  matmul: str = ""
  unroll: int = 1
  scan: bool = True

  def __post_init__(self):
    if self.width % self.num_heads or self.head_dim % 2:
      raise errors.ConfigError(
        f"width={self.width} with num_heads={self.num_heads}: heads must be"
        " equal in width, and the width even (rotary positions act on pairs)."
        " Change one of the two."
      )
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"num_heads={self.num_heads} is not a multiple of"
        f" num_kv_heads={self.num_kv_heads}: each key head serves the same"
        " number of query heads. Change one of the two."
      )
    low_precision.check(self.matmul)

  @property
  def head_dim(self) -> int:
    """Returns Dh, the width of one head."""
    return self.width // self.num_heads

  @property
  def padded_vocab(self) -> int:
    """Returns the rows of embedding and head, a multiple of 128."""
    return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

  def served(self) -> "LlamaConfig":
    """Returns the config for inference, without training-only fields."""
    return dataclasses.replace(self, matmul="")


# Llama-2-7B with the paper's 32000 text pieces, 2 image marks, 16384 codes.
LLAMA2_7B = LlamaConfig(
  vocab_size=48386,
  width=4096,
  depth=32,
  num_heads=32,
  num_kv_heads=32,
  mlp_dim=11008,
  dtype="bfloat16",
  remat="full",
)


def init_cache(
  config: LlamaConfig, batch: int, max_len: int, dtype: Any = None
) -> context_lib.Cache:
  """Returns an empty key-value cache.

  Args:
    config: of the model.
    batch: B, rows.
    max_len: M, slots per row.
    dtype: of keys and values; None for that of the config.

  Returns:
    `k` and `v`, dtype[layers, B, G, M, Dh], zeros. Heads come before slots:
    the other way round a CPU would copy them at every token.
    `valid`, bool[B, M], the slots that may be attended to, all False.
    `index`, int32[], the next slot to write. Rows share it: prompts of
    different lengths are padded on the left.
  """
  shape = (
    config.depth,
    batch,
    config.num_kv_heads,
    max_len,
    config.head_dim,
  )
  dtype = dtype or config.dtype
  return {
    "k": jnp.zeros(shape, dtype),
    "v": jnp.zeros(shape, dtype),
    "valid": jnp.zeros((batch, max_len), bool),
    "index": jnp.zeros((), jnp.int32),
  }


def unstacked(model: "Llama", params: Params) -> tuple["Llama", Params]:
  """Returns the same network with separate parameters for each layer.

  Meant for decoding on a CPU, where a scan copies the weights of each layer
  before it uses them: half the time of a step. It takes longer to compile.

  Args:
    model: with `scan`.
    params: its parameters.

  Returns:
    The model without `scan`, and its parameters: those of the layers are under
    `layers_0`, `layers_1`, ….
  """
  config = dataclasses.replace(model.config, scan=False)
  return Llama(config), layers.unstack_params(params, "layers")


def for_decoding(model: "Llama", params: Params) -> tuple["Llama", Params]:
  """Returns the model in the form that decodes fastest on this backend.

  On a CPU that is `unstacked`, for float weights that exceed its caches;
  without a scan all int8 weights would be cast to floats at once.
  """
  weights = jax.tree.leaves(params["layers"])
  large = sum(x.size for x in weights) >= _LARGE
  floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in weights)
  if jax.default_backend() == "cpu" and large and floats:
    return unstacked(model, params)
  return model, params


class Attention(nn.Module):
  """Causal self-attention with rotary positions and grouped keys."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    context: context_lib.Context,
    cache: tuple[jax.Array, ...] | None = None,
    layer: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
    """Attends within the row, or to the cache.

    Args:
      x: float[B, L, D].
      context: shared by all layers.
      cache: keys and values [layers, B, G, M, Dh] of all layers, or None.
      layer: int32[], the number of this layer in the cache.

    Returns:
      float[B, L, D], and the cache with this layer's keys and values.
    """
    c = self.config
    dense = functools.partial(blocks.Linear, dtype=c.dtype, matmul=c.matmul)
    split = functools.partial(
      einops.rearrange, pattern="b l (h d) -> b l h d", d=c.head_dim
    )
    heads, groups = c.num_heads, c.num_kv_heads
    q = split(dense(heads * c.head_dim, ("embed", "heads"), name="query")(x))
    k = split(dense(groups * c.head_dim, ("embed", "kv"), name="key")(x))
    v = split(dense(groups * c.head_dim, ("embed", "kv"), name="value")(x))
    q = layers.rotary(q, context.positions, c.rope_theta)
    k = layers.rotary(k, context.positions, c.rope_theta)
    if cache is not None:
      cache, (k, v) = context_lib.update_cache(
        cache, (k, v), layer, context.index
      )
    out = layers.attention(
      q,
      k.astype(q.dtype),
      v.astype(q.dtype),
      mask=context.mask,
      causal=cache is None,
      segment_ids=context.segment_ids,
    )
    out = einops.rearrange(out, "b l h d -> b l (h d)")
    project = dense(
      c.width, ("heads", "embed"), saved_as="projection", name="out"
    )
    return project(out), cache


class Mlp(nn.Module):
  """SwiGLU MLP: (silu(x gate) * (x up)) down."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] to float[B, L, D]."""
    c = self.config
    dense = functools.partial(blocks.Linear, dtype=c.dtype, matmul=c.matmul)
    up, down = ("embed", "mlp"), ("mlp", "embed")
    gate = activations.silu(dense(c.mlp_dim, up, name="gate")(x))
    h = gate * dense(c.mlp_dim, up, name="up")(x)  # [B, L, F]
    h = nn.with_logical_constraint(h, ("act_batch", "act_len", "act_mlp"))
    return dense(c.width, down, name="down")(h)


class Block(nn.Module):
  """One layer, in the form that `nn.scan` expects."""

  config: LlamaConfig

  @nn.compact
  def __call__(
    self, carry: tuple[Any, Any, Any], context: context_lib.Context
  ) -> tuple[tuple[Any, Any, Any], None]:
    """Maps (x, cache or None, layer) to ((x, cache, layer + 1), None)."""
    c = self.config
    x, cache, layer = carry
    norm = functools.partial(layers.RMSNorm, c.norm_eps, dtype=c.dtype)
    attention = Attention(c, name="attention")
    y, cache = attention(norm(name="attention_norm")(x), context, cache, layer)
    x = x + y
    x = x + Mlp(c, name="mlp")(norm(name="mlp_norm")(x))
    x = nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))
    return (x, cache, layer + 1), None


class Llama(nn.Module):
  """The language model; losses compute `logits` of `hidden` in blocks."""

  config: LlamaConfig

  def setup(self) -> None:
    c = self.config
    shape = (c.padded_vocab, c.width)
    boxed, normal = layers.partitioned, nn.initializers.normal
    init = boxed(normal(1.0), ("lookup", "embed"))
    self.embedding = self.param("embedding", init, shape)
    init = boxed(normal(0.02), ("vocab", "embed"))
    self.head = self.param("head", init, shape)
    self.embedding_scale: Any = self.get_variable("params", "embedding_scale")
    self.head_scale: Any = self.get_variable("params", "head_scale")
    if c.scan:
      self.layers: Any = layers.stack(self, Block, c.depth, c.remat, c.unroll)(
        c
      )
    else:
      self.layers = [layers.remat(Block, c.remat)(c) for _ in range(c.depth)]
    self.norm = layers.RMSNorm(c.norm_eps, dtype=c.dtype)

  def __call__(
    self,
    tokens: jax.Array,
    *,
    embeds: jax.Array | None = None,
    use_embeds: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    cache: context_lib.Cache | None = None,
    return_hidden: bool = False,
  ) -> Any:
    """Runs the model over whole rows, or over the next tokens of a cache.

    Args:
      tokens: int[B, L], ids below vocab_size.
      embeds: float[B, L, D] or None, continuous inputs.
      use_embeds: bool[B, L], True where `embeds` replaces the id's embedding.
      positions: int[B, L]; by default valid tokens are counted, from 0 in
        every segment, or on from the tokens in the cache.
      segment_ids: int[B, L] of packed rows: attention stays within a segment.
      mask: bool[B, L], False at padding, which no other token attends to.
      cache: from `init_cache` or the last call. Keys and values are written
        to its next L slots; attention is to all its valid slots.
      return_hidden: return the input of `logits`, float[B, L, D], instead.

    Returns:
      float32[B, L, padded_vocab], -1e9 at rows past vocab_size. With a cache,
      the pair of that and the new cache.
    """
    x = self.embed(tokens, embeds, use_embeds)
    x, cache = self.hidden(x, positions, segment_ids, mask, cache)
    x = x if return_hidden else self.logits(x)
    return x if cache is None else (x, cache)

  def embed(
    self,
    tokens: jax.Array,
    embeds: jax.Array | None = None,
    use_embeds: Any = None,
  ) -> jax.Array:
    """Maps ids int[B, L], some replaced by `embeds`, to float[B, L, D]."""
    x = jnp.take(self.embedding, tokens, axis=0)
    if self.embedding_scale is not None:
      x = x * jnp.take(self.embedding_scale, tokens)[..., None]
    x = x.astype(self.config.dtype)
    if embeds is not None:
      x = jnp.where(use_embeds[..., None], embeds.astype(x.dtype), x)
    return nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))

  def hidden(
    self,
    x: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
    cache: context_lib.Cache | None,
  ) -> tuple[jax.Array, context_lib.Cache | None]:
    """Runs all layers on float[B, L, D] of `embed`; `__call__` has the rest.

    Returns:
      float[B, L, D] after the last norm, and the new cache.
    """
    arrays: Any = None  # keys and values of all layers
    if cache is None:
      context = context_lib.of_rows(x, positions, segment_ids, mask)
    else:
      context, cache = context_lib.of_cache(cache, x, positions, mask)
      arrays = (cache["k"], cache["v"])
    carry = (x, arrays, jnp.zeros((), jnp.int32))
    for layer in [self.layers] if self.config.scan else self.layers:
      carry, _ = layer(carry, context)
    x, arrays, _ = carry
    if cache is not None:
      k, v = arrays
      index = cache["index"] + x.shape[1]
      cache = cache | {"k": k, "v": v, "index": index}
    return self.norm(x), cache

  def logits(self, x: jax.Array) -> jax.Array:
    """Maps float[B, L, D] of `hidden` to float32[B, L, padded_vocab]."""
    c = self.config
    out = project(x, self.head, self.head_scale)
    out = nn.with_logical_constraint(out, ("act_batch", "act_len", "act_vocab"))
    used = jnp.arange(c.padded_vocab) < c.vocab_size
    return jnp.where(used, out, _PADDING_LOGIT)


def project(
  x: jax.Array, head: jax.Array, scale: jax.Array | None = None
) -> jax.Array:
  """Computes logits of hidden states for rows of the head.

  Args:
    x: float[B, L, D].
    head: float or int8[V, D], all rows or some of them.
    scale: float32[V] of an int8 head, or None.

  Returns:
    float32[B, L, V].
  """
  head = head.astype(x.dtype)
  if x.shape[1] > 1:
    equation = "bld,vd->blv"
    out = jnp.einsum(equation, x, head, preferred_element_type=jnp.float32)
  else:  # decoding
    out = matmul_lib.tall(x[:, 0], head)[:, None]
  return out if scale is None else out * scale
