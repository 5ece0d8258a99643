"""The vector quantizer: merged tokens to code ids, and how codes are learned.

Codes get no gradient. They move by exponential moving averages of the vectors
assigned to them (van den Oord et al., arXiv 1711.00937, appendix A.1), start
from spherical k-means, and are replaced when they die. In training they have
unit norm, so nearest is highest cosine; official codes are not unit and are
used as stored. Sums run over the whole batch: under `jit` with a sharded
batch they are global.

The statistics are a dict: `codes` float[Kc, dim] of unit norm, `counts`
float[Kc] and `sums` float[Kc, dim], the moving averages.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers

_BLOCK = 1024  # codes at once, see `lookup`


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
  """Sizes of projection and codebook.

  Attributes:
    width: D, the merger's.
    num_codes: size of the codebook.
    code_dim: width of a code.
    decay: of the moving averages.
    dtype: of the projection; distances are float32.
  """

  width: int
  num_codes: int
  code_dim: int
  decay: float = 0.99
  dtype: str = "float32"


LAVIT_7B = QuantizerConfig(width=1408, num_codes=16384, code_dim=32)
TINY = QuantizerConfig(width=96, num_codes=512, code_dim=32)


class VectorQuantizer(nn.Module):
  """The learned part: Linear, tanh, Linear to the codes' space."""

  config: QuantizerConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps float[..., D] to float32[..., code_dim], not normalised."""
    c = self.config
    fc1 = layers.dense(c.width, ("embed", "mlp"), dtype=c.dtype, name="fc1")
    axes = ("mlp", "code_dim")
    fc2 = layers.dense(c.code_dim, axes, dtype=c.dtype, name="fc2")
    return fc2(jnp.tanh(fc1(tokens))).astype(jnp.float32)


def lookup(z: jax.Array, codes: jax.Array) -> jax.Array:
  """Ids int32[...] of the nearest codes; z float[..., dim] is normalised.

  The codes float[Kc, dim] are not: |z|^2 + |e|^2 - 2 z e, as LaVIT has it. One
  block of codes is compared after the other, and no array is larger than
  vectors x `_BLOCK`: 16,384 distances of each vector of a batch would be the
  largest array of training. It is three times faster on a CPU, too.
  """
  z = layers.l2_normalize(z.astype(jnp.float32))
  size = min(_BLOCK, len(codes))
  blocks = -(-len(codes) // size)
  count = len(codes)
  codes = jnp.pad(codes, ((0, blocks * size - count), (0, 0)))
  places = jnp.arange(size)

  def look(best, block):
    codes, first = block
    # |z|^2 is the same for every code. Made here: lengths of all codes, split
    # over chips, are not cut for v7x: findings/libtpu_split_blocks.sh.
    lengths = jnp.square(codes).sum(-1)
    lengths = jnp.where(first + places < count, lengths, jnp.inf)
    distance = lengths - 2.0 * jnp.einsum("...d,kd->...k", z, codes)
    least = distance.min(-1)
    # XLA's argmin is slow on a CPU.
    place = jnp.where(distance == least[..., None], places, size).min(-1)
    nearer = least < best[0]  # of equal ones the first
    ids = jnp.where(nearer, first + place, best[1])
    return (jnp.where(nearer, least, best[0]), ids), None

  start = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
  parts = codes.reshape(blocks, size, -1), jnp.arange(blocks) * size
  (_, ids), _ = jax.lax.scan(look, start, parts)
  return ids.astype(jnp.int32)


def quantize(z: jax.Array, codes: jax.Array):
  """Codes in place of z, with z's gradient.

  Args:
    z: float[..., dim], normalised here.
    codes: float[Kc, dim].

  Returns:
    (float[..., dim] the codes, straight-through; int32[...] their ids).
  """
  z = layers.l2_normalize(z)
  ids = lookup(jax.lax.stop_gradient(z), codes)
  chosen = jax.lax.stop_gradient(jnp.take(codes, ids, axis=0))
  return chosen + (z - jax.lax.stop_gradient(z)), ids


def commitment(z: jax.Array, codes: jax.Array, ids: jax.Array) -> jax.Array:
  """Squared distance float[...] of normalised z to its code, none to codes."""
  chosen = jax.lax.stop_gradient(jnp.take(codes, ids, axis=0))
  return jnp.square(layers.l2_normalize(z) - chosen).sum(-1)


def init_stats(rng: jax.Array, num_codes: int, code_dim: int):
  """Random unit codes, each as if one vector had been assigned to it."""
  codes = jax.random.normal(rng, (num_codes, code_dim))
  return _stats(layers.l2_normalize(codes), jnp.ones((num_codes,)))


def _stats(codes, counts):
  return {"codes": codes, "counts": counts, "sums": codes * counts[:, None]}


def assigned(z, ids, weights, num_codes: int):
  """What a batch adds to the statistics; of parts of it, the sum.

  Args:
    z: float[..., dim], normalised here; no gradient passes.
    ids: int[...], the code of each vector.
    weights: float[...], 0 for padding.
    num_codes: Kc.

  Returns:
    {"counts": float[Kc], "sums": float[Kc, dim]}.
  """
  z = layers.l2_normalize(jax.lax.stop_gradient(z)).reshape(-1, z.shape[-1])
  weights = weights.reshape(-1).astype(jnp.float32)
  counts, sums = _assigned(z, ids.reshape(-1), weights, num_codes)
  return {"counts": counts, "sums": sums}


def ema_update(stats, batch, decay: float = 0.99):
  """Moves the codes towards the mean direction of what chose them.

  Args:
    stats: see the module.
    batch: of `assigned`.
    decay: of the moving averages.

  Returns:
    The new statistics; `codes` among them. A code nobody chose stays.
  """
  counts = batch["counts"]
  sums = decay * stats["sums"] + (1.0 - decay) * batch["sums"]
  codes = jnp.where(counts[:, None] > 0, _unit(sums, stats), stats["codes"])
  return {
    "codes": codes,
    "counts": decay * stats["counts"] + (1.0 - decay) * counts,
    "sums": sums,
  }


def _unit(sums, stats):
  """Directions of the sums; the old code where they cancel out."""
  vanished = jnp.square(sums).sum(-1, keepdims=True) < 1e-16
  return jnp.where(vanished, stats["codes"], layers.l2_normalize(sums))


def _assigned(z, ids, weights, num_codes):
  """Weighted counts float[Kc] and sums float[Kc, dim] of each code."""
  add = lambda x: jax.ops.segment_sum(x, ids, num_segments=num_codes)
  return add(weights), add(z * weights[:, None])


def usage(counts: jax.Array):
  """(share of codes chosen at all, exp of the entropy of their use)."""
  share = jnp.mean((counts > 0).astype(jnp.float32))
  p = counts / jnp.maximum(counts.sum(), 1e-12)
  entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)))
  return share, jnp.exp(entropy)


def candidates(z, order, weights, num_codes: int):
  """Vectors that may take the place of dead codes, by lot.

  Those of a batch are `merge_candidates` of those of its parts.

  Args:
    z: float[..., dim], normalised here; no gradient passes.
    order: int[...], a random permutation of 1, 2, ... over the whole batch.
    weights: float[...], 0 for padding, which is never drawn.
    num_codes: Kc, as many as could be needed.

  Returns:
    {"order": int[Kc], "vectors": float[Kc, dim]}, highest `order` first, 0
    where there was no vector.
  """
  z = layers.l2_normalize(jax.lax.stop_gradient(z)).reshape(-1, z.shape[-1])
  order = jnp.where(weights.reshape(-1) > 0, order.reshape(-1), 0)
  lacking = max(num_codes - len(order), 0)
  pad = lambda x: jnp.pad(x, ((0, lacking),) + ((0, 0),) * (x.ndim - 1))
  return _first({"order": pad(order), "vectors": pad(z)}, num_codes)


def merge_candidates(a, b):
  """`candidates` of two parts of a batch together."""
  both = jax.tree.map(lambda *x: jnp.concatenate(x), a, b)
  return _first(both, len(a["order"]))


def _first(found, count):
  order, index = jax.lax.top_k(found["order"], count)
  return {"order": order, "vectors": jnp.take(found["vectors"], index, axis=0)}


def revive_dead(stats, fresh, threshold: float):
  """Codes whose moving count fell below the threshold start anew.

  Each takes the place of a vector of the batch, another one as long as there
  are enough, and counts twice the threshold, so that it has time to be chosen.

  Args:
    stats: see the module.
    fresh: of `candidates`; nothing is revived where there are none.
    threshold: on `counts`, vectors a step.

  Returns:
    (the new statistics, float[] how many codes were revived).
  """
  num_codes = len(stats["counts"])
  there = (fresh["order"] > 0).sum()
  dead = (stats["counts"] < threshold) & (there > 0)
  number = (jnp.cumsum(dead) - 1) % jnp.maximum(there, 1)  # of dead ones
  drawn = jnp.take(fresh["vectors"], number, axis=0)
  new = _stats(drawn, jnp.full((num_codes,), 2.0 * threshold))
  rows = {"codes": dead[:, None], "counts": dead, "sums": dead[:, None]}
  stats = jax.tree.map(jnp.where, rows, new, dict(stats))
  return stats, dead.sum().astype(jnp.float32)


def _draw(rng, weights, shape):
  """Indices int[shape] drawn in proportion to weights float[M]."""
  edges = jnp.cumsum(weights)
  point = jax.random.uniform(rng, shape) * edges[-1]
  return jnp.clip(jnp.searchsorted(edges, point, "right"), 0, len(weights) - 1)


def kmeans_init(rng: jax.Array, z, weights, num_codes: int, iters: int):
  """Statistics whose codes are the centres of spherical k-means.

  Seeds are drawn as k-means++ does (Arthur & Vassilvitskii, 2007), far from
  those already drawn; an empty cluster is seeded again from the data.

  Args:
    rng: a key.
    z: float[M, dim], normalised here; or float[T, M, dim], T batches that are
      assigned to codes one after the other.
    weights: float[M] or float[T, M], 0 for padding.
    num_codes: Kc.
    iters: steps of Lloyd's algorithm.

  Returns:
    Statistics as `init_stats` gives; the mean of `counts` is one.
  """
  z = layers.l2_normalize(jax.lax.stop_gradient(z).astype(jnp.float32))
  z = z.reshape(-1, *z.shape[-2:])  # [T, M, dim]
  weights = weights.astype(jnp.float32).reshape(z.shape[:-1])
  seed_rng, rng = jax.random.split(rng)
  codes = _seeds(seed_rng, z, weights, num_codes)

  def step(codes, rng):
    counts, sums = _assigned_in_turn(z, weights, codes)
    again = _rows(z, _draw(rng, weights.reshape(-1), (num_codes,)))
    centres = layers.l2_normalize(sums)
    return jnp.where(counts[:, None] > 0, centres, again), None

  codes, _ = jax.lax.scan(step, codes, jax.random.split(rng, iters))
  counts, _ = _assigned_in_turn(z, weights, codes)
  return _stats(codes, counts / jnp.maximum(counts.mean(), 1e-12))


def _assigned_in_turn(z, weights, codes):
  """`_assigned` to the nearest codes, of all batches float[T, M, dim]."""

  def add(carry, batch):
    z, weights = batch
    more = _assigned(z, lookup(z, codes), weights, len(codes))
    return jax.tree.map(jnp.add, carry, more), None

  start = jnp.zeros(codes.shape[:1]), jnp.zeros(codes.shape)
  return jax.lax.scan(add, start, (z, weights))[0]


def _rows(z, index):
  """Vectors [Kc, dim] of z float[T, M, dim] by their numbers int[Kc] in T x M.

  Each is sent by who has it. To a gather, XLA brings all of z to every device.
  """
  wanting = len(index)
  numbers = jnp.arange(wanting, dtype=jnp.int32)
  nobody = jnp.full(z.shape[0] * z.shape[1], wanting, jnp.int32)
  first = nobody.at[index].min(numbers)  # who wants a vector, of several one

  def send(found, batch):
    z, to = batch
    return found + jax.ops.segment_sum(z, to, num_segments=wanting + 1), None

  start = jnp.zeros((wanting + 1, z.shape[-1]))
  found, _ = jax.lax.scan(send, start, (z, first.reshape(z.shape[:-1])))
  return found[first[index]]


def _row(z, index):
  """One vector [dim] of z, as `_rows` gives several."""
  numbers = jnp.arange(z.shape[0] * z.shape[1]).reshape(z.shape[:-1])
  return jnp.where((numbers == index)[..., None], z, 0.0).sum((0, 1))


def _seeds(rng, z, weights, num_codes):
  """num_codes vectors of z, each drawn by its distance to the others."""

  def step(distance, rng):
    index = _draw(rng, (distance * weights).reshape(-1), ())
    seed = _row(z, index)
    away = jnp.maximum(2.0 - 2.0 * (z @ seed), 0.0)  # |a - b|^2, unit norm
    return jnp.minimum(distance, away), seed

  start = jnp.full(weights.shape, 4.0)
  return jax.lax.scan(step, start, jax.random.split(rng, num_codes))[1]
