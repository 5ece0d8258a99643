import functools

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import sharding
from lavit_jax.models import layers, quantizer
from tests.golden import load


def unit(rng, *shape):
  return layers.l2_normalize(jax.random.normal(rng, shape))


def clusters(count=8, each=16, dim=6):
  """Unit vectors round `count` far apart directions; vectors, directions."""
  directions = unit(jax.random.key(3), 200, dim)
  picked = [0]
  for _ in range(count - 1):  # farthest first
    nearest = (directions @ directions[jnp.array(picked)].T).max(1)
    picked.append(int(nearest.argmin()))
  centres = directions[jnp.array(picked)]
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
  to_codes = jax.grad(lambda codes: quantizer.quantize(z, codes)[0].sum())
  assert float(jnp.abs(to_codes(codes)).max()) == 0.0
  through = jax.grad(
    lambda z: (quantizer.quantize(z, codes)[0] @ weights).sum()
  )
  plain = jax.grad(lambda z: (layers.l2_normalize(z) @ weights).sum())
  np.testing.assert_allclose(through(z), plain(z), atol=1e-6)


def _moved(stats, z, ids, weights, decay=0.99):
  """Statistics after a batch."""
  batch = quantizer.assigned(z, ids, weights, len(stats["codes"]))
  return quantizer.ema_update(stats, batch, decay)


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

  gradient = jax.grad(lambda *a: loss(*a)[0], (0, 1))(stats["codes"], z)
  assert float(jnp.abs(gradient[0]).max()) == 0.0
  assert float(jnp.abs(gradient[1]).max()) > 0.0
  moved = jax.grad(lambda z: loss(stats["codes"], z)[1])(z)
  assert float(jnp.abs(moved).max()) == 0.0


def test_ema_moves_codes_to_their_vectors_and_keeps_them_unit():
  z, centres = clusters()
  start = layers.l2_normalize(
    centres + 0.1 * jax.random.normal(jax.random.key(5), centres.shape)
  )
  stats = quantizer.init_stats(jax.random.key(0), 8, 6)
  stats |= {"codes": start, "sums": start}
  for _ in range(40):
    ids = quantizer.lookup(z, stats["codes"])
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
  stats = quantizer.kmeans_init(jax.random.key(0), vectors, weights, 8, 10)
  nearest = (centres @ stats["codes"].T).max(1)
  assert float(nearest.min()) > 0.995
  np.testing.assert_allclose(stats["counts"], 1.0, rtol=1e-5)
  np.testing.assert_allclose(stats["sums"], stats["codes"], rtol=1e-5)


def test_dead_codes_are_revived_from_the_batch_and_live_on():
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
