import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.models.tokenizer import selector
from tests.golden import load


def log_probs(keep):
  """float[B, N, 2] from p(keep) float[B, N]."""
  keep = jnp.asarray(keep)
  return jnp.log(jnp.stack([keep, 1.0 - keep], axis=-1))


def test_selector_matches_the_official_one():
  golden = load.arrays("selector")
  model = selector.TokenSelector(load.model_config().selector)
  params = load.variables("tokenizer")["params"]["selector"]
  out = model.apply({"params": params}, golden["in_features"])
  assert load.error(out, golden["out_logprobs"]) <= 1e-5
  mask = selector.mask_from_noise(out, golden["in_gumbel"])
  np.testing.assert_array_equal(mask, golden["out_keep"])


def test_mask_is_exactly_zero_or_one_and_passes_gradient():
  scores = jax.nn.log_softmax(
    jax.random.normal(jax.random.key(0), (64, 36, 2)) * 5
  )
  noise = jax.random.gumbel(jax.random.key(1), scores.shape)
  mask = selector.mask_from_noise(scores, noise, 0.7)
  assert set(np.unique(mask)) == {0.0, 1.0}

  def soft(scores):
    return jax.nn.softmax((scores + noise) / 0.7, axis=-1)[..., 0].sum()

  def hard(scores):
    return selector.mask_from_noise(scores, noise, 0.7).sum()

  gradient = jax.grad(hard)(scores)
  np.testing.assert_allclose(gradient, jax.grad(soft)(scores), atol=1e-6)
  assert bool((gradient[mask == 0] != 0.0).mean() > 0.99)  # dropped ones too


def test_sampled_masks_keep_patches_with_their_probability():
  keep = jnp.broadcast_to(jnp.array([0.1, 0.5, 0.8]), (4000, 3))
  noise = selector.gumbel(jax.random.key(0), keep.shape)
  mask = selector.mask_from_noise(log_probs(keep), noise)
  np.testing.assert_allclose(mask.mean(0), keep[0], atol=0.03)


def test_expected_count_keeps_the_most_likely():
  keep = [[0.9, 0.2, 0.7, 0.3], [0.01, 0.02, 0.03, 0.04], [0.99] * 4]
  mask = selector.expected_count_mask(log_probs(keep))
  np.testing.assert_array_equal(
    mask, np.array([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
  )


def test_expected_count_is_argmax_where_probabilities_are_decided():
  keep = jax.random.bernoulli(jax.random.key(0), 0.3, (8, 36)) * 0.998 + 0.001
  np.testing.assert_array_equal(
    selector.expected_count_mask(log_probs(keep)), keep > 0.5
  )


def test_budget_breaks_ties_in_raster_order():
  mask = selector.budget_mask(log_probs(jnp.full((3, 4), 0.4)), [1, 2, 4])
  np.testing.assert_array_equal(mask.sum(1), [1, 2, 4])
  np.testing.assert_array_equal(mask[1], [True, True, False, False])
  mask = selector.budget_mask(log_probs([[0.2, 0.9, 0.2]]), 2)
  np.testing.assert_array_equal(mask[0], [True, True, False])


def test_random_masks_keep_the_requested_share():
  share = jnp.array([0.0, 0.25, 0.5, 1.0])
  mask = selector.random_mask(jax.random.key(0), (4, 36), share)
  np.testing.assert_array_equal(mask.sum(1), [1, 9, 18, 36])
  other = selector.random_mask(jax.random.key(1), (4, 36), share)
  assert bool((mask[2] != other[2]).any())


def test_width_must_be_a_multiple_of_four():
  with pytest.raises(errors.ConfigError, match=r"selector\.width=6"):
    selector.SelectorConfig(width=6)
