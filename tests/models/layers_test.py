import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.models import layers
from lavit_jax.models.attention import forms


def qkv(heads=4, groups=4, length=5, keys=5, dim=6):
  rngs = jax.random.split(jax.random.key(0), 3)
  return (
    jax.random.normal(rngs[0], (2, length, heads, dim)),
    jax.random.normal(rngs[1], (2, keys, groups, dim)),
    jax.random.normal(rngs[2], (2, keys, groups, dim)),
  )


def by_hand(query, key, value, seen):
  """Softmax attention with loops over heads, numpy float64."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  repeat = query.shape[2] // key.shape[2]
  out = np.zeros_like(query)
  for b, i, h in np.ndindex(*query.shape[:3]):
    logits = key[b, :, h // repeat] @ query[b, i, h] / query.shape[-1] ** 0.5
    weights = np.exp(logits) * seen[b, i]
    out[b, i, h] = weights / weights.sum() @ value[b, :, h // repeat]
  return out


def test_attention_is_softmax_over_unmasked_keys():
  query, key, value = qkv(heads=4, groups=2)
  seen = np.array(jax.random.bernoulli(jax.random.key(1), 0.5, (2, 5, 5)))
  seen |= np.eye(5, dtype=bool)
  out = layers.attention(query, key, value, mask=jnp.asarray(seen)[:, None])
  np.testing.assert_allclose(
    out, by_hand(query, key, value, seen), rtol=2e-5, atol=2e-6
  )


def test_causal_queries_are_the_last_ones():
  query, key, value = qkv(length=2, keys=5)
  seen = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)[None].repeat(2, 0)
  out = layers.attention(query, key, value, causal=True)
  np.testing.assert_allclose(
    out, by_hand(query, key, value, seen), rtol=2e-5, atol=2e-6
  )


def test_masks_combine_and_a_fully_masked_query_gives_zeros():
  query, key, value = qkv()
  segments = jnp.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]])
  mask = jnp.ones((2, 1, 1, 5), bool).at[0, 0, 0, 2].set(False)
  out = layers.attention(
    query, key, value, mask=mask, causal=True, segment_ids=segments
  )
  same = np.equal(segments[:, :, None], segments[:, None])
  seen = same & np.tril(np.ones((5, 5), bool)) & np.asarray(mask[:, 0])
  assert not seen[0, 2].any()  # the claim's blind query
  seen[0, 2] = True
  expected = by_hand(query, key, value, seen)
  expected[0, 2] = 0.0
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


def test_nothing_crosses_a_segment():
  query, key, value = qkv()
  segments = jnp.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]])

  def first_segment(value):
    out = layers.attention(query, key, value, segment_ids=segments)
    return out[0, :2].sum() + out[1, :1].sum()

  gradient = np.abs(jax.grad(first_segment)(value)).sum((2, 3))
  np.testing.assert_array_equal(gradient > 0, np.asarray(segments) == 1)


def test_policy_of_zeros_and_ones_is_a_mask():
  query, key, value = qkv()
  keep = jnp.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]])[:, None, None]
  soft = layers.attention(query, key, value, policy=keep.astype(jnp.float32))
  hard = layers.attention(query, key, value, mask=keep > 0)
  np.testing.assert_allclose(soft, hard, rtol=1e-5, atol=1e-6)


def test_policy_without_any_key_is_the_mean_and_has_finite_gradient():
  query, key, value = qkv()

  def attend(policy, query):
    return layers.attention(query, key, value, policy=policy)

  zeros = jnp.zeros((2, 1, 1, 5))
  mean = jnp.broadcast_to(value.mean(1, keepdims=True), value.shape)
  np.testing.assert_allclose(attend(zeros, query), mean, rtol=1e-5, atol=1e-6)
  grads = jax.grad(lambda *a: attend(*a).sum(), (0, 1))(zeros, query)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_policy_eps_is_the_official_formula():
  logits = jnp.array([[1.0, 3.0, 2.0]])
  policy = jnp.array([[1.0, 0.0, 1.0]])
  weights = np.exp([-2.0, 0.0, -1.0]) * [1, 0, 1]  # max over all, masked too
  expected = (weights + 0.1 / 3) / (weights.sum() + 0.1)
  out = forms.policy_softmax(logits, policy, 0.1)
  np.testing.assert_allclose(out[0], expected, rtol=1e-6)


@pytest.mark.parametrize("other", ["mask", "segment_ids"])
def test_a_policy_and_a_mask_are_refused(other):
  arrays = {"mask": jnp.ones((2, 1, 1, 5), bool)}
  arrays["segment_ids"] = jnp.ones((2, 5), jnp.int32)
  with pytest.raises(ValueError, match="policy"):
    layers.attention(
      *qkv(), policy=jnp.ones((2, 1, 1, 5)), **{other: arrays[other]}
    )


def test_attention_refuses_heads_that_do_not_divide():
  with pytest.raises(ValueError, match="divide"):
    layers.attention(*qkv(heads=4, groups=3))


def test_rotary_turns_the_pairs_i_and_i_plus_half():
  x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
  out = layers.rotary(x, jnp.array([[3]]), theta=100.0)[0, 0, 0]
  a, b = np.array([1 + 3j, 2 + 4j]) * np.exp(1j * 3 * np.array([1.0, 0.1]))
  expected = [a.real, b.real, a.imag, b.imag]
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_rotary_products_depend_on_distance_alone():
  a, b = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def product(i, j):
    x, y = (layers.rotary(x, jnp.array([[p]])) for x, p in ((a, i), (b, j)))
    return (x * y).sum()

  near, far = product(2, 5), product(902, 905)
  np.testing.assert_allclose(near, far, rtol=1e-4)


def test_layer_norm_keeps_precision_far_from_zero():
  x = jax.random.normal(jax.random.key(0), (4, 64)) + 3000.0
  out = layers.LayerNorm(1e-5).init_with_output(jax.random.key(0), x)[0]
  exact = np.asarray(x, np.float64)
  exact -= exact.mean(-1, keepdims=True)
  exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(out, exact, atol=2e-3)


def test_rms_norm_divides_by_the_root_mean_square():
  x = jnp.array([[3.0, 4.0]])
  out = layers.RMSNorm(0.0).init_with_output(jax.random.key(0), x)[0]
  np.testing.assert_allclose(out, x / np.sqrt(12.5), rtol=1e-6)


def test_l2_normalize_is_safe_at_zero():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(
    layers.l2_normalize(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6
  )
  gradient = jax.grad(lambda x: layers.l2_normalize(x)[:, 0].sum())(x)
  np.testing.assert_allclose(gradient, [[0.128, -0.096], [0.0, 0.0]], rtol=1e-5)


def test_space_to_depth_keeps_a_patch_at_one_position():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  folded = layers.space_to_depth(x, 2)
  assert folded.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
  np.testing.assert_array_equal(layers.depth_to_space(folded, 2), x)


def test_stacked_parameters_come_back_and_single_layers_are_left_alone():
  array = lambda seed: np.full((2, 3), seed)
  params = {
    "down": {f"block_{i}": {"fc": {"kernel": array(i)}} for i in range(11)},
    "up": {"block_0": {"fc": {"kernel": array(7)}}},
    "norm": {"scale": array(9)},
  }
  stacked = layers.stack_params(params, "block")
  kernels = stacked["down"]["block"]["fc"]["kernel"]
  assert isinstance(kernels, np.ndarray)  # no device is involved
  np.testing.assert_array_equal(kernels[:, 0, 0], np.arange(11))
  assert set(stacked["up"]) == {"block_0"}
  again = layers.unstack_params(stacked, "block")
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_unknown_remat_policy_is_named():
  with pytest.raises(ValueError, match=r"'some'.*full"):
    layers.remat(layers.Mlp, "some")


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
  "kind", ["none", "keys", "blind", "causal", "segments"]
)
def test_attention_in_blocks_is_attention(monkeypatch, kind, groups):
  keys = jax.random.split(jax.random.key(4), 3)
  query = jax.random.normal(keys[0], (2, 11, 4, 8))
  key = jax.random.normal(keys[1], (2, 11, groups, 8))
  value = jax.random.normal(keys[2], (2, 11, groups, 8))
  options = {
    "none": {},
    "keys": {"mask": (jnp.arange(11) < 7)[None, None, None]},
    "blind": {"mask": jnp.arange(11)[None, None, :, None] % 3 > 0},
    "causal": {"causal": True},
    "segments": {"segment_ids": jnp.array([[0] * 5 + [1] * 6, [2] * 11])},
  }[kind]

  def loss(query, key, value):
    out = layers.attention(query, key, value, **options)
    return jnp.sin(out).sum(), out

  def run(*inputs):  # traced anew
    slopes = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(lambda *inputs: slopes(*inputs))(*inputs)

  (_, whole), gradients = run(query, key, value)
  # Three queries at a time.
  monkeypatch.setattr(forms, "_LARGE_LOGITS", 4 * 11 * 3)
  (_, blocks), again = run(query, key, value)
  np.testing.assert_allclose(blocks, whole, atol=1e-6)
  for a, b in zip(again, gradients, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  text = str(jax.make_jaxpr(loss)(query, key, value))
  assert "scan" in text  # that it did go in blocks


class _Residual(nn.Module):
  """The smallest block that `layers.stack` takes."""

  @nn.compact
  def __call__(self, x, unused):
    _TRACED.append(x)
    return x + nn.Dense(3, use_bias=False)(x), None


_TRACED = []


class _Stacked(nn.Module):
  """A stack in a network."""

  def setup(self):
    self.blocks = layers.stack(self, _Residual, 2, "none")()

  def __call__(self, x):
    return self.blocks(x, None)[0]


def test_a_stack_is_traced_once_where_it_is_applied():
  """flax does it twice; compilation of a deep network starts with it."""
  params = _Stacked().init(jax.random.key(0), jnp.ones((1, 3)))
  _TRACED.clear()
  jax.eval_shape(_Stacked().apply, params, jnp.ones((1, 3)))
  assert len(_TRACED) == 1


def test_a_stack_draws_of_a_seed_what_it_always_drew():
  """How its layers are traced decides which keys they get."""
  net = _Stacked()
  made = net.init(jax.random.key(0), jnp.ones((1, 3)))
  kernel = nn.meta.unbox(made)["params"]["blocks"]["Dense_0"]["kernel"]
  first_rows = [
    [0.00068048993, 0.38096967, -0.88983381],
    [-0.08354131, 0.51653904, 0.40282661],
  ]
  np.testing.assert_allclose(kernel[:, 0], first_rows, rtol=1e-6, atol=1e-6)
