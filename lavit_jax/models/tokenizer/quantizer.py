"""The vector quantizer: maps merged tokens to codes, and learns the codebook.

LaVIT, arXiv 2309.04669, section 3.1. Codes get no gradient. They start from
spherical k-means, follow exponential moving averages of the vectors assigned
to them (van den Oord et al., arXiv 1711.00937, appendix A.1), and are replaced
when they die. In training they have unit norm, so that the nearest code has
the highest cosine; official codes do not, and are used as stored. Sums are
over the whole batch: under `jit` with a sharded batch they are global.

The statistics of a codebook are a dict: `codes` float[Kc, dim] of unit norm,
and the moving averages `counts` float[Kc] and `sums` float[Kc, dim].
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models import layers

Arrays = dict[str, jax.Array]  # statistics of a codebook, or additions to them

_BLOCK = 1024  # codes that `lookup` compares at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
  """Sizes of projection and codebook.

  Attributes:
    width: D, the merger's.
    num_codes: Kc, size of the codebook.
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
  """The learned projection to the codes' space: Linear, tanh, Linear."""

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
  """Returns the ids int32[...] of the nearest codes.

  Distances are |z|^2 + |e|^2 - 2 z e, as in LaVIT. Codes are compared block by
  block, so that no array is larger than vectors x `_BLOCK`: 16,384 distances
  per vector would be the largest array of training. This is also three times
  faster on a CPU.

  Args:
    z: float[..., dim], normalised here.
    codes: float[Kc, dim], not normalised here.
  """
  z = layers.l2_normalize(z.astype(jnp.float32))
  size = min(_BLOCK, len(codes))
  blocks = -(-len(codes) // size)
  count = len(codes)
  codes = jnp.pad(codes, ((0, blocks * size - count), (0, 0)))
  offsets = jnp.arange(size)

  def compare(best, block):
    codes, first = block
    # |z|^2 is the same for every code, and left out. |e|^2 is computed per
    # block: libtpu cannot cut a vector of all lengths, split over chips, into
    # blocks for v7x (findings/libtpu_split_blocks.sh).
    lengths = jnp.square(codes).sum(-1)
    lengths = jnp.where(first + offsets < count, lengths, jnp.inf)
    distance = lengths - 2.0 * jnp.einsum("...d,kd->...k", z, codes)
    least = distance.min(-1)
    # The first minimum; XLA's argmin is slow on a CPU.
    offset = jnp.where(distance == least[..., None], offsets, size).min(-1)
    nearer = least < best[0]  # of equal codes the first is chosen
    ids = jnp.where(nearer, first + offset, best[1])
    return (jnp.where(nearer, least, best[0]), ids), None

  start = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
  xs = codes.reshape(blocks, size, -1), jnp.arange(blocks) * size
  (_, ids), _ = jax.lax.scan(compare, start, xs)
  return ids.astype(jnp.int32)


def quantize(z: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Replaces z by its nearest codes, with a straight-through gradient to z.

  Args:
    z: float[..., dim], normalised here.
    codes: float[Kc, dim].

  Returns:
    The codes float[..., dim], and their ids int32[...].
  """
  z = layers.l2_normalize(z)
  ids = lookup(jax.lax.stop_gradient(z), codes)
  chosen = jax.lax.stop_gradient(jnp.take(codes, ids, axis=0))
  return chosen + (z - jax.lax.stop_gradient(z)), ids


def commitment(z: jax.Array, codes: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns the commitment loss float[...]: squared distance of z to its code.

  Args:
    z: float[..., dim], normalised here.
    codes: float[Kc, dim]; they get no gradient.
    ids: int[...], the code of each vector.
  """
  chosen = jax.lax.stop_gradient(jnp.take(codes, ids, axis=0))
  return jnp.square(layers.l2_normalize(z) - chosen).sum(-1)


def init_stats(rng: jax.Array, num_codes: int, code_dim: int) -> Arrays:
  """Returns statistics of random unit codes, each with a count of one."""
  codes = jax.random.normal(rng, (num_codes, code_dim))
  return _stats(layers.l2_normalize(codes), jnp.ones((num_codes,)))


def _stats(codes, counts):
  return {"codes": codes, "counts": counts, "sums": codes * counts[:, None]}


def assigned(
  z: jax.Array, ids: jax.Array, weights: jax.Array, num_codes: int
) -> Arrays:
  """Sums the vectors of a batch by their codes.

  The result for a batch is the sum of the results for its parts.

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


def ema_update(stats: Arrays, batch: Arrays, decay: float = 0.99) -> Arrays:
  """Moves the codes towards the mean direction of their vectors.

  Args:
    stats: see the module's docstring.
    batch: sums of `assigned`.
    decay: of the moving averages.

  Returns:
    The new statistics. A code without a vector in the batch stays.
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
  """Returns directions of the sums; the old code where vectors cancel out."""
  vanished = jnp.square(sums).sum(-1, keepdims=True) < 1e-16
  return jnp.where(vanished, stats["codes"], layers.l2_normalize(sums))


def _assigned(z, ids, weights, num_codes):
  """Returns weighted counts float[Kc] and sums float[Kc, dim] by code."""
  add = lambda x: jax.ops.segment_sum(x, ids, num_segments=num_codes)
  return add(weights), add(z * weights[:, None])


def usage(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the share of codes in use, and the perplexity of their use.

  Args:
    counts: float[Kc], vectors per code.
  """
  share = jnp.mean((counts > 0).astype(jnp.float32))
  p = counts / jnp.maximum(counts.sum(), 1e-12)
  entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)))
  return share, jnp.exp(entropy)


def candidates(
  z: jax.Array, order: jax.Array, weights: jax.Array, num_codes: int
) -> Arrays:
  """Draws vectors that may replace dead codes.

  The result for a batch is `merge_candidates` of the results for its parts.

  Args:
    z: float[..., dim], normalised here; no gradient passes.
    order: int[...], a random permutation of 1, 2, ... over the whole batch.
    weights: float[...], 0 for padding, which is never drawn.
    num_codes: Kc, the number of vectors to draw.

  Returns:
    {"order": int[Kc], "vectors": float[Kc, dim]}, highest `order` first; it is
    0 where the batch had too few vectors.
  """
  z = layers.l2_normalize(jax.lax.stop_gradient(z)).reshape(-1, z.shape[-1])
  order = jnp.where(weights.reshape(-1) > 0, order.reshape(-1), 0)
  missing = max(num_codes - len(order), 0)
  pad = lambda x: jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
  return _highest({"order": pad(order), "vectors": pad(z)}, num_codes)


def merge_candidates(a: Arrays, b: Arrays) -> Arrays:
  """Returns the `candidates` of two parts of a batch together."""
  both = jax.tree.map(lambda *x: jnp.concatenate(x), a, b)
  return _highest(both, len(a["order"]))


def _highest(drawn, count):
  order, index = jax.lax.top_k(drawn["order"], count)
  return {"order": order, "vectors": jnp.take(drawn["vectors"], index, axis=0)}


def revive_dead(
  stats: Arrays, drawn: Arrays, threshold: float
) -> tuple[Arrays, jax.Array]:
  """Replaces codes whose moving count fell below a threshold.

  Each is replaced by a vector of the batch, by different ones if there are
  enough. Its count starts at twice the threshold, so that it has time to be
  chosen.

  Args:
    stats: see the module's docstring.
    drawn: of `candidates`; without any, no code is replaced.
    threshold: on `counts`, in vectors per step.

  Returns:
    The new statistics, and the number float[] of replaced codes.
  """
  num_codes = len(stats["counts"])
  available = (drawn["order"] > 0).sum()
  dead = (stats["counts"] < threshold) & (available > 0)
  index = (jnp.cumsum(dead) - 1) % jnp.maximum(available, 1)
  vectors = jnp.take(drawn["vectors"], index, axis=0)
  new = _stats(vectors, jnp.full((num_codes,), 2.0 * threshold))
  rows = {"codes": dead[:, None], "counts": dead, "sums": dead[:, None]}
  stats = jax.tree.map(jnp.where, rows, new, dict(stats))
  return stats, dead.sum().astype(jnp.float32)


def _draw(rng, weights, shape):
  """Draws indices int[shape] in proportion to weights float[M]."""
  edges = jnp.cumsum(weights)
  point = jax.random.uniform(rng, shape) * edges[-1]
  return jnp.clip(jnp.searchsorted(edges, point, "right"), 0, len(weights) - 1)


def kmeans_init(
  rng: jax.Array,
  z: jax.Array,
  weights: jax.Array,
  num_codes: int,
  iters: int,
) -> Arrays:
  """Returns statistics whose codes are the centres of spherical k-means.

  Seeds are drawn by k-means++ (Arthur & Vassilvitskii, 2007); an empty cluster
  is seeded again from the data.

  Args:
    rng: a key.
    z: float[M, dim], normalised here; or float[T, M, dim], T batches that are
      assigned to codes one after the other.
    weights: float[M] or float[T, M], 0 for padding.
    num_codes: Kc.
    iters: steps of Lloyd's algorithm.

  Returns:
    Statistics like those of `init_stats`; the mean of `counts` is one.
  """
  z = layers.l2_normalize(jax.lax.stop_gradient(z).astype(jnp.float32))
  z = z.reshape(-1, *z.shape[-2:])  # [T, M, dim]
  weights = weights.astype(jnp.float32).reshape(z.shape[:-1])
  seed_rng, rng = jax.random.split(rng)
  codes = _seeds(seed_rng, z, weights, num_codes)

  def step(codes, rng):
    counts, sums = _assign_batches(z, weights, codes)
    seeds = _rows(z, _draw(rng, weights.reshape(-1), (num_codes,)))
    centres = layers.l2_normalize(sums)
    return jnp.where(counts[:, None] > 0, centres, seeds), None

  codes, _ = jax.lax.scan(step, codes, jax.random.split(rng, iters))
  counts, _ = _assign_batches(z, weights, codes)
  return _stats(codes, counts / jnp.maximum(counts.mean(), 1e-12))


def _assign_batches(z, weights, codes):
  """Returns `_assigned` to the nearest codes for batches float[T, M, dim]."""

  def add(carry, batch):
    z, weights = batch
    new = _assigned(z, lookup(z, codes), weights, len(codes))
    return jax.tree.map(jnp.add, carry, new), None

  start = jnp.zeros(codes.shape[:1]), jnp.zeros(codes.shape)
  return jax.lax.scan(add, start, (z, weights))[0]


def _rows(z, index):
  """Gathers vectors [Kc, dim] of z by their indices int[Kc] in T x M.

  Each is sent by the device that holds it, by a sum over segments: for a
  gather, XLA would copy all of z to every device.

  Args:
    z: float[T, M, dim].
    index: int[Kc]; indices may repeat.
  """
  count = len(index)
  numbers = jnp.arange(count, dtype=jnp.int32)
  unused = jnp.full(z.shape[0] * z.shape[1], count, jnp.int32)
  target = unused.at[index].min(numbers)  # the first row that has a vector

  def send(rows, batch):
    z, target = batch
    return rows + jax.ops.segment_sum(z, target, num_segments=count + 1), None

  start = jnp.zeros((count + 1, z.shape[-1]))
  rows, _ = jax.lax.scan(send, start, (z, target.reshape(z.shape[:-1])))
  return rows[target[index]]


def _row(z, index):
  """Gathers one vector [dim] of z, as `_rows` does several."""
  numbers = jnp.arange(z.shape[0] * z.shape[1]).reshape(z.shape[:-1])
  return jnp.where((numbers == index)[..., None], z, 0.0).sum((0, 1))


def _seeds(rng, z, weights, num_codes):
  """Draws num_codes vectors of z, each by its distance to those before it."""

  def step(distance, rng):
    index = _draw(rng, (distance * weights).reshape(-1), ())
    seed = _row(z, index)
    to_seed = jnp.maximum(2.0 - 2.0 * (z @ seed), 0.0)  # |a - b|^2, unit norm
    return jnp.minimum(distance, to_seed), seed

  start = jnp.full(weights.shape, 4.0)
  return jax.lax.scan(step, start, jax.random.split(rng, num_codes))[1]
