import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.aot import executed, hlo, topology
from lavit_jax.core import sharding
from lavit_jax.models import layers
from lavit_jax.models.tokenizer import quantizer
from tests import micro
from tests.golden import load


# Compiled as a whole here and below: operation by operation takes longer.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def unit(rng, *shape):
  return layers.l2_normalize(jax.random.normal(rng, shape))


@functools.cache
def clusters(count=8, each=16, dim=6):
  """Unit vectors round `count` far apart directions; vectors, directions."""
  directions = np.asarray(unit(jax.random.key(3), 200, dim))
  picked = [0]
  for _ in range(count - 1):  # farthest first
    nearest = (directions @ directions[picked].T).max(1)
    picked.append(int(nearest.argmin()))
  centres = jnp.asarray(directions[picked])
  noise = 0.02 * jax.random.normal(jax.random.key(4), (each, count, dim))
  return layers.l2_normalize(centres + noise).reshape(-1, dim), centres


def test_quantizer_matches_the_official_one():
  golden = load.arrays("quantizer")
  model = quantizer.VectorQuantizer(load.model_config().quantizer)
  variables = load.variables("tokenizer")
  params = variables["params"]["quantizer"]
  z = model.apply({"params": params}, golden["in_features"])
  assert load.error(z, golden["out_z"]) <= 1e-5
  codes = variables["codebook"]["codes"]
  ids = quantizer.lookup(z, codes)
  np.testing.assert_array_equal(ids, golden["out_ids"])
  np.testing.assert_array_equal(codes[ids], golden["out_quantized"])


def test_lookup_normalises_z_but_not_the_codes():
  codes = jnp.array([[2.0, 0.0], [0.0, 1.0]])
  z = jnp.array([[0.6, 0.4]])
  # z at length one is (0.83, 0.55): the second code is nearer, though the
  # first has the larger cosine.
  assert quantizer.lookup(z, codes)[0] == 1
  assert quantizer.lookup(100.0 * z, codes)[0] == 1
  assert quantizer.lookup(z, layers.l2_normalize(codes))[0] == 0


def test_quantize_gives_the_code_and_the_gradient_of_z():
  codes = unit(jax.random.key(0), 5, 3)
  z = jax.random.normal(jax.random.key(1), (4, 3))
  vectors, ids = quantizer.quantize(z, codes)
  np.testing.assert_allclose(vectors, codes[ids], atol=1e-7)
  weights = jnp.arange(3.0)
  to_codes = jax.jit(
    jax.grad(lambda codes: quantizer.quantize(z, codes)[0].sum())
  )
  assert float(jnp.abs(to_codes(codes)).max()) == 0.0
  through = jax.jit(
    jax.grad(lambda z: (quantizer.quantize(z, codes)[0] @ weights).sum())
  )
  plain = jax.jit(jax.grad(lambda z: (layers.l2_normalize(z) @ weights).sum()))
  np.testing.assert_allclose(through(z), plain(z), atol=1e-6)


@jax.jit
def _moved(stats, z, ids, weights, decay=0.99):
  """Statistics after a batch."""
  batch = quantizer.assigned(z, ids, weights, len(stats["codes"]))
  return quantizer.ema_update(stats, batch, decay)


@jax.jit
def _revived(stats, z, weights, rng, threshold):
  """Statistics with what died started anew from a batch."""
  order = 1 + jax.random.permutation(rng, weights.size).reshape(weights.shape)
  fresh = quantizer.candidates(z, order, weights, len(stats["codes"]))
  return quantizer.revive_dead(stats, fresh, threshold)


def test_codes_and_statistics_get_no_gradient():
  z, _ = clusters()
  stats = quantizer.init_stats(jax.random.key(0), 8, 6)
  ids = quantizer.lookup(z, stats["codes"])

  def loss(codes, z):
    moved = _moved(stats, z, ids, jnp.ones(len(z)))
    commit = quantizer.commitment(z, codes, ids)
    return commit.sum(), moved["codes"].sum()

  gradient = jax.jit(jax.grad(lambda *a: loss(*a)[0], (0, 1)))(
    stats["codes"], z
  )
  assert float(jnp.abs(gradient[0]).max()) == 0.0
  assert float(jnp.abs(gradient[1]).max()) > 0.0
  moved = jax.jit(jax.grad(lambda z: loss(stats["codes"], z)[1]))(z)
  assert float(jnp.abs(moved).max()) == 0.0


def test_ema_moves_codes_to_their_vectors_and_keeps_them_unit():
  z, centres = clusters()
  start = layers.l2_normalize(
    centres + 0.1 * jax.random.normal(jax.random.key(5), centres.shape)
  )
  stats = quantizer.init_stats(jax.random.key(0), 8, 6)
  stats |= {"codes": start, "sums": start}
  lookup = jax.jit(quantizer.lookup)
  for _ in range(40):
    ids = lookup(z, stats["codes"])
    stats = _moved(stats, z, ids, jnp.ones(len(z)), 0.9)
  np.testing.assert_allclose(
    jnp.linalg.norm(stats["codes"], axis=-1), 1.0, rtol=1e-5
  )
  assert float((stats["codes"] * centres).sum(-1).min()) > 0.999
  np.testing.assert_allclose(stats["counts"], 16.0, rtol=0.05)


def test_padding_does_not_move_a_code():
  stats = quantizer.init_stats(jax.random.key(0), 4, 3)
  z = unit(jax.random.key(1), 6, 3)
  ids, weights = jnp.array([0, 0, 1, 1, 2, 3]), jnp.array([1.0, 0, 1, 0, 0, 0])
  padded = _moved(stats, z, ids, weights)
  kept = np.array([0, 2])
  alone = _moved(stats, z[kept], ids[kept], jnp.ones(2))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), padded, alone
  )
  # Nobody chose codes 2 and 3.
  np.testing.assert_array_equal(padded["codes"][2:], stats["codes"][2:])


def test_statistics_are_those_of_the_whole_batch_on_eight_devices():
  stats = quantizer.init_stats(jax.random.key(0), 16, 4)
  z = unit(jax.random.key(1), 8, 5, 4)
  weights = jax.random.bernoulli(jax.random.key(2), 0.7, (8, 5)) * 1.0

  @jax.jit
  def update(stats, z, weights, rng):
    ids = quantizer.lookup(z, stats["codes"])
    stats = _moved(stats, z, ids, weights)
    stats, revived = _revived(stats, z, weights, rng, 0.995)
    return stats | {"revived": revived}

  one = update(stats, z, weights, jax.random.key(3))
  assert 0 < float(one["revived"]) < 16
  mesh = sharding.make_mesh({"data": 8})
  with sharding.use(mesh):
    put = functools.partial(
      jax.device_put, device=sharding.batch_sharding(mesh)
    )
    eight = update(stats, put(z), put(weights), jax.random.key(3))
  assert len(put(z).sharding.device_set) == 8
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight
  )


def test_kmeans_recovers_clusters():
  z, centres = clusters()
  noise = unit(jax.random.key(9), 64, 6)  # of weight zero
  vectors = jnp.concatenate([noise, z])
  weights = jnp.concatenate([jnp.zeros(64), jnp.ones(len(z))])
  run = jax.jit(lambda *args: quantizer.kmeans_init(*args, 8, 10))
  stats = run(jax.random.key(0), vectors, weights)
  nearest = (centres @ stats["codes"].T).max(1)
  assert float(nearest.min()) > 0.995
  np.testing.assert_allclose(stats["counts"], 1.0, rtol=1e-5)
  np.testing.assert_allclose(stats["sums"], stats["codes"], rtol=1e-5)


def _kmeans_in_numpy(rng, z, weights, num_codes, iters):
  """Spherical k-means of float[M, dim] as one writes it down; (codes, counts).

  Every distance at once, one-hot rows of what was chosen; only the random
  numbers are drawn by JAX.
  """
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1), 1e-12)[:, None]

  def draw(key, weights, shape):
    edges = np.cumsum(weights, dtype=np.float32)
    point = np.asarray(jax.random.uniform(key, shape)) * edges[-1]
    return np.clip(np.searchsorted(edges, point, "right"), 0, len(z) - 1)

  def assigned(codes):
    distance = np.square(z[:, None] - codes[None]).sum(-1)  # [M, Kc]
    chosen = np.eye(num_codes)[distance.argmin(-1)] * weights[:, None]
    return chosen.sum(0), chosen.T @ z

  z = unit(np.asarray(z, np.float32))
  seed_rng, rng = jax.random.split(rng)
  away, codes = np.full(len(z), 4.0, np.float32), []
  for key in jax.random.split(seed_rng, num_codes):
    codes.append(z[draw(key, away * weights, ())])
    away = np.minimum(away, np.square(z - codes[-1]).sum(-1))
  codes = np.stack(codes)
  for key in jax.random.split(rng, iters):
    counts, sums = assigned(codes)
    again = z[draw(key, weights, (num_codes,))]
    codes = np.where(counts[:, None] > 0, unit(sums), again)
  counts, _ = assigned(codes)
  return codes, counts / counts.mean()


@pytest.mark.parametrize("batches", [1, 3])
def test_kmeans_in_blocks_is_the_plain_one(monkeypatch, batches):
  """Seeds, every step and empty clusters, codes in several blocks."""
  monkeypatch.setattr(quantizer, "_BLOCK", 8)  # 20 codes: three, one unfilled
  z = jax.random.normal(jax.random.key(1), (batches, 96 // batches, 5))
  weights = jax.random.bernoulli(jax.random.key(2), 0.8, z.shape[:-1]) * 1.0
  run = jax.jit(lambda *args: quantizer.kmeans_init(*args, 20, 4))
  found = run(jax.random.key(3), z, weights)
  codes, counts = _kmeans_in_numpy(
    jax.random.key(3), z.reshape(-1, 5), np.asarray(weights).ravel(), 20, 4
  )
  np.testing.assert_allclose(found["codes"], codes, atol=1e-5)
  np.testing.assert_allclose(found["counts"], counts, atol=1e-5)


def test_codes_are_looked_up_in_blocks_and_the_first_of_equals_is_taken(
  monkeypatch,
):
  codes = unit(jax.random.key(0), 11, 4)
  codes = jnp.concatenate([codes, codes[2:5]])  # 14 codes, three of them twice
  z = unit(jax.random.key(1), 6, 7, 4)
  z = z.at[0, :3].set(codes[2:5])
  plain = jnp.square(z[..., None, :] - codes).sum(-1).argmin(-1)
  monkeypatch.setattr(quantizer, "_BLOCK", 4)
  found = jax.jit(quantizer.lookup)(z, codes)
  np.testing.assert_array_equal(found, plain)
  np.testing.assert_array_equal(plain[0, :3], [2, 3, 4])


def _kmeans_on_eight(monkeypatch):
  """(jitted k-means, its arguments on eight devices, the mesh)."""
  monkeypatch.setattr(quantizer, "_BLOCK", 16)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  rows = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
  z = jax.random.normal(jax.random.key(1), (3, 48, 5))
  weights = jax.random.bernoulli(jax.random.key(2), 0.8, z.shape[:-1]) * 1.0
  run = jax.jit(lambda *args: quantizer.kmeans_init(*args, 64, 4))
  args = jax.random.key(3), z, weights
  return run, (args[0], *jax.device_put(args[1:], rows)), args, mesh


@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x4", "tpu7x:2x2x1"])
def test_codes_that_chips_share_are_looked_up(name):
  """libtpu 0.0.42.1 could not cut a split vector into blocks for v7x."""
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh({"fsdp": 8}, topology.devices(name))
  rows = sharding.batch_sharding(mesh)
  z = jax.ShapeDtypeStruct((8, 256, 32), jnp.float32, sharding=rows)
  codes = jax.ShapeDtypeStruct((16384, 32), jnp.float32, sharding=rows)
  with sharding.use(mesh):
    made = jax.jit(quantizer.lookup).lower(z, codes).compile()
  assert 16384 not in {
    side
    for _, shape in executed.arrays(hlo.read(made.as_text()))
    for side in shape[-1:]
  }  # not all distances at once


def test_kmeans_on_eight_devices_is_that_on_one(monkeypatch):
  run, spread, whole, mesh = _kmeans_on_eight(monkeypatch)
  one = run(*whole)
  with sharding.use(mesh):
    eight = run(*spread)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight
  )


def test_a_device_holds_its_shard_of_vectors_and_a_block_of_distances(
  monkeypatch,
):
  """Of XLA's program for eight devices, not of what was asked for."""
  run, spread, _, mesh = _kmeans_on_eight(monkeypatch)
  with sharding.use(mesh):
    program = hlo.read(run.lower(*spread).compile().as_text())
  found = [dims for dtype, dims in executed.arrays(program) if dtype == "f32"]
  own = 48 // 8
  assert (own, 16) in found, "the distances of a block"
  largest = max(math.prod(dims) for dims in found)
  assert largest == 65 * 5, "all codes; no distances to all, not all vectors"


def test_candidates_do_not_copy_the_batch_to_every_device():
  """A step's candidates: no device gets all vectors of the batch."""
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
  z = unit(jax.random.key(1), 96, 5)
  order = jax.random.permutation(jax.random.key(2), 96) + 1
  weights = jax.random.bernoulli(jax.random.key(3), 0.8, (96,)) * 1.0
  run = jax.jit(lambda *args: quantizer.candidates(*args, 7))
  spread = jax.device_put((z, order, weights), rows)
  with sharding.use(mesh):
    made = run.lower(*spread).compile()
    found = made(*spread)
  picked = np.argsort(-np.asarray(order * weights))[:7]
  np.testing.assert_allclose(found["vectors"], z[picked], rtol=1e-6)
  arrays = executed.arrays(hlo.read(made.as_text()))
  largest = max(math.prod(dims) for kind, dims in arrays if kind == "f32")
  assert largest < 96 * 5


def test_no_array_of_kmeans_at_full_size_is_vectors_by_codes():
  """Four batches of 2,048 images, 192 words each, and 16,384 codes."""
  config = quantizer.LAVIT_7B
  batches, vectors = 4, 2048 * 192
  z = jax.ShapeDtypeStruct((batches, vectors, config.code_dim), jnp.float32)
  weights = jax.ShapeDtypeStruct(z.shape[:-1], jnp.float32)
  run = lambda z, weights: quantizer.kmeans_init(
    jax.random.key(0), z, weights, config.num_codes, 15
  )
  largest = micro.largest_array(jax.make_jaxpr(run)(z, weights))
  assert largest == vectors * quantizer._BLOCK


def test_no_array_of_a_steps_sums_is_vectors_by_codes():
  """Of 2,048 images looked up and summed by their codes, 16,384."""
  config = quantizer.LAVIT_7B
  vectors = 2048 * 192

  def run(codes, z, weights):
    ids = quantizer.lookup(z, codes)
    return quantizer._assigned(z, ids, weights, config.num_codes)

  shapes = (config.num_codes, config.code_dim), (vectors, config.code_dim)
  given = [
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*shapes, (vectors,))
  ]
  largest = micro.largest_array(jax.make_jaxpr(run)(*given))
  assert largest == vectors * quantizer._BLOCK


def test_dead_codes_are_replaced_by_vectors_of_the_batch():
  z, _ = clusters()
  stats = quantizer.init_stats(jax.random.key(0), 8, 6)
  stats["counts"] = jnp.array([0.01, 5, 5, 5, 5, 5, 5, 0.02])
  weights = jnp.zeros(len(z)).at[3].set(1.0)  # only one may be drawn
  new, revived = _revived(stats, z, weights, jax.random.key(1), 0.1)
  assert float(revived) == 2
  np.testing.assert_allclose(new["codes"][jnp.array([0, 7])], [z[3]] * 2)
  np.testing.assert_array_equal(new["codes"][1:7], stats["codes"][1:7])
  assert float(new["counts"][0]) > 0.1  # alive for some steps to come
  np.testing.assert_allclose(
    new["sums"][0], new["codes"][0] * new["counts"][0], rtol=1e-6
  )


def test_nothing_is_revived_from_padding():
  stats = quantizer.init_stats(jax.random.key(0), 4, 6)
  z, _ = clusters()
  new, revived = _revived(stats, z, jnp.zeros(len(z)), jax.random.key(1), 2.0)
  assert float(revived) == 0
  np.testing.assert_array_equal(new["codes"], stats["codes"])


def test_usage_counts_codes_and_their_entropy():
  ids = jnp.array([[0, 0, 2], [2, 5, 7]])
  weights, z = jnp.array([[1.0, 1, 1], [1, 0, 0]]), jnp.ones((2, 3, 4))
  counts = quantizer.assigned(z, ids, weights, 8)["counts"]
  np.testing.assert_array_equal(counts, [2, 0, 2, 0, 0, 0, 0, 0])
  share, perplexity = quantizer.usage(counts)
  assert float(share) == 0.25
  np.testing.assert_allclose(perplexity, 2.0, rtol=1e-6)
  assert [float(x) for x in quantizer.usage(jnp.zeros(4))] == [0.0, 1.0]
