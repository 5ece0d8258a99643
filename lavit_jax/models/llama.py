"""LLaMA: the decoder-only language model that reads and writes both alphabets.

Pre-norm blocks of causal attention (rotary, grouped keys) and SwiGLU, one
scan over the layers, embedding and head not tied (Touvron et al., 2023). A
row may mix ids and continuous embeddings: where `use_embeds` is True the
embedding of the id is replaced, which is how an image is read as a condition
(LaVIT, arXiv 2309.04669, section 3.2).

Kernels, embedding and head may be int8, with their scales beside them
(`infer/quantize.py`): the parameters say so, the config does not.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from lavit_jax.core import errors
from lavit_jax.models import activations, layers, low_precision
from lavit_jax.models import matmul as matmul_lib

_NO_CLASS = -1e9  # the logit of the padding rows of the head
_VOCAB_MULTIPLE = 128
_LARGE = 30_000_000  # weights in layers; see `for_decoding`


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Sizes of one network.

  Attributes:
    vocab_size: ids in use; embedding and head have `padded_vocab` rows.
    num_kv_heads: heads of keys and values, a divisor of `num_heads`.
    max_len: longest sequence meant; rotary positions have no table.
    dtype: of the computation; parameters are float32.
    remat: name of a policy in `layers.REMAT`, what backward recomputes.
    matmul: number format of the layers' products in training, of
      `narrow.FORMATS`; "" for dtype.
    unroll: layers a scan step; more is faster to run, slower to compile.
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
        f"width={self.width} over num_heads={self.num_heads}: heads must be"
        " equal and even in size (rotary turns pairs). Change one of the two."
      )
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"num_heads={self.num_heads} is not a multiple of"
        f" num_kv_heads={self.num_kv_heads}: each key head serves equally many"
        " query heads. Change one of the two."
      )
    low_precision.check(self.matmul)

  @property
  def head_dim(self) -> int:
    """Width of one head."""
    return self.width // self.num_heads

  @property
  def padded_vocab(self) -> int:
    """Rows of embedding and head, a multiple of 128."""
    return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

  def served(self) -> "LlamaConfig":
    """The same network without what is of training alone."""
    return dataclasses.replace(self, matmul="")


# Llama-2-7B with the paper's 32000 pieces, 2 marks and 16384 codes.
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
# The embedded default: a few million parameters, minutes on a CPU.
TINY = LlamaConfig(
  vocab_size=1026,
  width=256,
  depth=6,
  num_heads=4,
  num_kv_heads=4,
  mlp_dim=688,
  max_len=512,
)


def init_cache(
  config: LlamaConfig, batch: int, max_len: int, dtype: Any = None
) -> dict[str, jax.Array]:
  """An empty key-value cache of `max_len` slots a row.

  Returns:
    k, v: dtype[layers, B, G, M, Dh], zeros (heads before slots: the other
    way round a CPU would copy them at every token); valid: bool[B, M], False,
    the slots that may be attended; index: int32[], the next slot to write.
    Rows share the index: prompts of different length are padded on the left.
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


def unstacked(model: "Llama", params) -> tuple["Llama", dict]:
  """The same network with the parameters of every layer apart.

  For decoding on a CPU: there a scan copies the weights of each layer before
  it uses them, half the time of a step. Longer to compile.

  Args:
    model: with `scan`.
    params: its parameters, unboxed; what is stacked is taken out of them.

  Returns:
    (model, params) under `layers_0`, `layers_1`, ….
  """
  depth = model.config.depth
  params = dict(params)
  split = [{} for _ in range(depth)]
  flat = flax.traverse_util.flatten_dict(params.pop("layers"))
  while flat:  # one array after the other, so that memory holds one twice
    path, array = flat.popitem()
    for i in range(depth):
      split[i][path] = array[i]
  for i, layer in enumerate(split):
    params[f"layers_{i}"] = flax.traverse_util.unflatten_dict(layer)
  return Llama(dataclasses.replace(model.config, scan=False)), params


def for_decoding(model: "Llama", params) -> tuple["Llama", dict]:
  """The form in which the default backend decodes fastest.

  `unstacked` on a CPU, if the weights are more than its caches hold and float:
  without a scan, int8 ones would all be cast back at once.
  """
  weights = jax.tree.leaves(params["layers"])
  large = sum(x.size for x in weights) >= _LARGE
  floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in weights)
  if jax.default_backend() == "cpu" and large and floats:
    return unstacked(model, params)
  return model, params


def positions_of(mask=None, segment_ids=None):
  """Positions int32[B, L] that count valid tokens and restart a segment.

  mask [0, 0, 1, 1, 1] gives [0, 0, 0, 1, 2]; segment_ids [1, 1, 2, 2, 2]
  gives [0, 1, 0, 1, 2].
  """
  if segment_ids is not None:
    place = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    return place - start
  return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


@dataclasses.dataclass(frozen=True)
class _Context:
  """What every layer shares: a pytree, broadcast over the scan."""

  positions: jax.Array  # int32[B, L]
  mask: jax.Array | None  # bool[B, 1, 1 | L, M]
  segment_ids: jax.Array | None  # int32[B, L]
  index: jax.Array | None  # int32[]: decoding, the first slot to write


jax.tree_util.register_dataclass(
  _Context,
  data_fields=["positions", "mask", "segment_ids", "index"],
  meta_fields=[],
)


class Linear(nn.Module):
  """x kernel, no bias. A kernel int8[D, F] has `scale` float32[F] beside it.

  What a collection "lora" has under its name, `a` float[D, R] and `b`
  float[R, F], changes it by x a b.
  """

  features: int
  axes: tuple[str, str]
  dtype: str
  matmul: str = ""

  @nn.compact
  def __call__(self, x):
    """Maps float[..., D] to dtype[..., F]."""
    init = nn.initializers.lecun_normal()
    init = nn.with_logical_partitioning(init, self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    scale = self.get_variable("params", "scale")
    x = x.astype(self.dtype)
    if scale is None and self.matmul:
      y = low_precision.linear(x, kernel.astype(self.dtype), self.matmul)
    elif scale is None:
      y = matmul_lib.linear(x, kernel.astype(self.dtype))
    else:
      y = matmul_lib.scaled(x, kernel, scale)
    a, b = (self.get_variable("lora", name) for name in ("a", "b"))
    if a is None:
      return y
    low = matmul_lib.linear(x, a.astype(self.dtype))
    return y + matmul_lib.linear(low, b.astype(self.dtype))


class Attention(nn.Module):
  """Causal self-attention with rotary positions and grouped keys."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x, context: _Context, cache=None, layer=None):
    """float[B, L, D], the whole cache (k, v) or None -> the same."""
    c = self.config
    dense = functools.partial(Linear, dtype=c.dtype, matmul=c.matmul)
    heads, groups = c.num_heads, c.num_kv_heads
    q = dense(heads * c.head_dim, ("embed", "heads"), name="query")(x)
    k = dense(groups * c.head_dim, ("embed", "kv"), name="key")(x)
    v = dense(groups * c.head_dim, ("embed", "kv"), name="value")(x)
    q = q.reshape(*x.shape[:2], heads, c.head_dim)
    k = k.reshape(*x.shape[:2], groups, c.head_dim)
    v = v.reshape(*x.shape[:2], groups, c.head_dim)
    q = layers.rotary(q, context.positions, c.rope_theta)
    k = layers.rotary(k, context.positions, c.rope_theta)
    if cache is not None:
      cache = tuple(
        jax.lax.dynamic_update_slice(
          old,
          new.swapaxes(1, 2)[None].astype(old.dtype),
          (layer, 0, 0, context.index, 0),
        )
        for old, new in zip(cache, (k, v), strict=True)
      )
      k, v = (
        jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).swapaxes(1, 2)
        for x in cache
      )
    out = layers.attention(
      q,
      k.astype(q.dtype),
      v.astype(q.dtype),
      mask=context.mask,
      causal=cache is None,
      segment_ids=context.segment_ids,
    )
    out = out.reshape(*x.shape[:2], heads * c.head_dim)
    return dense(c.width, ("heads", "embed"), name="out")(out), cache


class Mlp(nn.Module):
  """SwiGLU: (silu(x gate) * (x up)) down."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x):
    """Maps float[B, L, D] to float[B, L, D]."""
    c = self.config
    dense = functools.partial(Linear, dtype=c.dtype, matmul=c.matmul)
    up, down = ("embed", "mlp"), ("mlp", "embed")
    gate = activations.silu(dense(c.mlp_dim, up, name="gate")(x))
    h = gate * dense(c.mlp_dim, up, name="up")(x)  # [B, L, F]
    h = nn.with_logical_constraint(h, ("act_batch", "act_len", "act_mlp"))
    return dense(c.width, down, name="down")(h)


class Block(nn.Module):
  """One layer, in the form `nn.scan` wants."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, carry, context: _Context):
    """(x, cache or None, layer) -> ((x, cache, layer + 1), None)."""
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
  """The language model. `hidden` and `head` apart let a loss be blocked."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    shape = (c.padded_vocab, c.width)
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(
        nn.initializers.normal(1.0), ("lookup", "embed")
      ),
      shape,
    )
    self.head = self.param(
      "head",
      nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("vocab", "embed")
      ),
      shape,
    )
    self.embedding_scale = self.get_variable("params", "embedding_scale")
    self.head_scale = self.get_variable("params", "head_scale")
    if c.scan:
      self.layers = layers.stack(Block, c.depth, c.remat, c.unroll)(c)
    else:
      self.layers = [layers.remat(Block, c.remat)(c) for _ in range(c.depth)]
    self.norm = layers.RMSNorm(c.norm_eps, dtype=c.dtype)

  def __call__(
    self,
    tokens,
    *,
    embeds=None,
    use_embeds=None,
    positions=None,
    segment_ids=None,
    mask=None,
    cache=None,
    return_hidden: bool = False,
  ):
    """Runs the model over whole rows, or over the next tokens of a cache.

    Args:
      tokens: int[B, L], ids below vocab_size.
      embeds: float[B, L, D] or None, continuous inputs.
      use_embeds: bool[B, L], True where `embeds` stands in for the id.
      positions: int[B, L]; by default valid tokens are counted, from 0 in
        every segment, or on from what the cache holds.
      segment_ids: int[B, L] of a packed row: attention stays inside one.
      mask: bool[B, L], False at padding, which no other token then sees.
      cache: from `init_cache` or the last call: keys and values are written
        to its next L slots, and all its valid slots are attended.
      return_hidden: give what `logits` maps to logits, float[B, L, D].

    Returns:
      float32[B, L, padded_vocab], about -inf at rows past vocab_size; with a
      cache, the pair of that and the new cache.
    """
    x = self.embed(tokens, embeds, use_embeds)
    x, cache = self.hidden(x, positions, segment_ids, mask, cache)
    x = x if return_hidden else self.logits(x)
    return x if cache is None else (x, cache)

  def embed(self, tokens, embeds=None, use_embeds=None):
    """Ids int[B, L], some replaced by `embeds`, to float[B, L, D]."""
    x = jnp.take(self.embedding, tokens, axis=0)
    if self.embedding_scale is not None:
      x = x * jnp.take(self.embedding_scale, tokens)[..., None]
    x = x.astype(self.config.dtype)
    if embeds is not None:
      x = jnp.where(use_embeds[..., None], embeds.astype(x.dtype), x)
    return nn.with_logical_constraint(x, ("act_batch", "act_len", "act_embed"))

  def hidden(self, x, positions, segment_ids, mask, cache):
    """float[B, L, D] embeddings to the normed last layer, and the cache."""
    index, held = None, None
    if cache is not None:
      context, cache = _extend(cache, x, positions, mask)
      held, index = (cache["k"], cache["v"]), context.index
    else:
      if mask is None and segment_ids is None:
        place = jnp.arange(x.shape[1], dtype=jnp.int32)
        default = jnp.broadcast_to(place, x.shape[:2])
      else:
        default = positions_of(mask, segment_ids)
      context = _Context(
        default if positions is None else positions,
        None if mask is None else mask[:, None, None, :],
        segment_ids,
        None,
      )
    carry = (x, held, jnp.zeros((), jnp.int32))
    for layer in [self.layers] if self.config.scan else self.layers:
      carry, _ = layer(carry, context)
    x, held, _ = carry
    if cache is not None:
      cache = cache | {
        "k": held[0],
        "v": held[1],
        "index": index + x.shape[1],
      }
    return self.norm(x), cache

  def logits(self, x):
    """float[B, L, D] from `hidden` to float32[B, L, padded_vocab]."""
    c = self.config
    out = project(x, self.head, self.head_scale)
    out = nn.with_logical_constraint(out, ("act_batch", "act_len", "act_vocab"))
    used = jnp.arange(c.padded_vocab) < c.vocab_size
    return jnp.where(used, out, _NO_CLASS)


def project(x, head, scale=None):
  """Hidden states by rows of the head.

  Args:
    x: float[B, L, D].
    head: float or int8[V, D], all rows or some.
    scale: float32[V], of an int8 head.

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


def _extend(cache, x, positions, mask):
  """Marks the new slots of a cache; context for tokens that go there."""
  batch, length = x.shape[:2]
  index = cache["index"]
  if mask is None:
    mask = jnp.ones((batch, length), bool)
  valid = jax.lax.dynamic_update_slice(cache["valid"], mask, (0, index))
  if positions is None:
    before = cache["valid"].sum(1, dtype=jnp.int32, keepdims=True)
    counted = jnp.cumsum(mask.astype(jnp.int32), axis=1)
    positions = jnp.maximum(before + counted - 1, 0)
  slots = jnp.arange(valid.shape[1])
  seen = slots <= index + jnp.arange(length)[:, None]  # [L, M]
  seen = seen[None, None] & valid[:, None, None]
  return _Context(positions, seen, None, index), cache | {"valid": valid}
