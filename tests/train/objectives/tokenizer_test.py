"""Each term of stage `tokenizer` against NumPy, and what phases switch on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import averages, errors
from lavit_jax.models.tokenizer import quantizer
from lavit_jax.train import losses
from tests.train import outlines, stubs

_VALID = np.array([1, 0, 1, 1], np.float32)
_KEPT = np.flatnonzero(_VALID)
_SELECT = dict(
  mask="gumbel",
  temperature=0.7,
  rate=0.4,
  rate_weight=30.0,
  entropy_weight=0.5,
  quantize=False,
)
_CODES = dict(
  quantize=True, commitment=0.25, revive_below=0.05, keep_range=(0.2, 0.6)
)


def _features(seed=0, shape=(4, 9, 5)):
  return np.random.default_rng(seed).normal(0.5, 1.0, shape).astype(np.float32)


def test_reconstruction_is_one_minus_the_cosine_of_every_patch():
  x, made = _features(), _features(1)
  sums = losses.reconstruction_sums(x, made, _VALID)
  sums |= {"images": _VALID.sum(), "variance": 1.0}
  a, b = x[_KEPT].astype(np.float64), made[_KEPT].astype(np.float64)
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  expected = (1 - (a * b).sum(-1) / norms).mean()
  loss = losses.reconstruction_loss(sums, 0.0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_detail_is_the_squared_error_over_the_variance():
  x, made, usual = _features(), _features(1), _features(2, (9, 5))
  sums = losses.reconstruction_sums(x, made, _VALID)
  variance = np.square(x - usual).mean((1, 2)) @ _VALID
  sums |= {"images": _VALID.sum(), "variance": variance}
  a, b = x[_KEPT].astype(np.float64), made[_KEPT].astype(np.float64)
  expected = np.square(a - b).mean() / np.square(a - usual).mean()
  detail = losses.reconstruction_loss(sums, 3.0)
  detail -= losses.reconstruction_loss(sums, 0.0)
  np.testing.assert_allclose(detail, 3 * expected, rtol=1e-4)


def test_both_terms_are_of_float32_whatever_the_features_are_in():
  """Far from zero, where bfloat16 has few digits for a difference."""
  x, made = (jnp.bfloat16(8.0 + 0.2 * _features(seed)) for seed in (0, 1))
  sums = losses.reconstruction_sums(x, made, _VALID)
  wide = lambda x: np.asarray(x, np.float64)[_KEPT]
  error = np.square(wide(x) - wide(made)).mean((1, 2)).sum()
  assert sums["error"].dtype == sums["cosine"].dtype == jnp.float32
  np.testing.assert_allclose(sums["error"], error, rtol=1e-6)


def test_nothing_valid_is_no_loss():
  x, none = _features(), np.zeros(4, np.float32)
  sums = losses.reconstruction_sums(x, x + 1, none)
  sums |= {"images": none.sum(), "variance": none.sum()}
  assert losses.reconstruction_loss(sums, 3.0) == 0


def _log_probs(seed=0):
  logits = np.random.default_rng(seed).normal(0, 2, (4, 9, 2))
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_rate_is_the_squared_distance_of_the_kept_share():
  sums = losses.selection_sums(jnp.asarray(_log_probs()), _VALID)
  masks = np.random.default_rng(0).random((4, 9)) < 0.3
  sums |= {"images": _VALID.sum(), "kept": masks.mean(1) @ _VALID}
  settings = {"rate_weight": 2.0, "rate": 1 / 3, "entropy_weight": 0.0}
  expected = 2.0 * (1 / 3 - masks[_KEPT].mean()) ** 2
  loss = losses.selection_loss(sums, **settings)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_entropy_is_that_of_keep_and_drop():
  log_probs = _log_probs()
  sums = losses.selection_sums(jnp.asarray(log_probs), _VALID)
  sums |= {"images": _VALID.sum(), "kept": 0.0}
  settings = {"rate_weight": 0.0, "rate": 0.0, "entropy_weight": 0.5}
  p = np.exp(log_probs[_KEPT])
  expected = -0.5 * (p * np.log(p)).sum(-1).mean()
  loss = losses.selection_loss(sums, **settings)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  spread = averages.value(losses.p_keep_std(sums))
  np.testing.assert_allclose(spread, p[..., 0].std(), rtol=1e-4)


@pytest.fixture(scope="module")
def case():
  return outlines.Case(stubs.tokenizer(data__capacity=12))


def _run(case, batch=None, **settings):
  """((loss, (state, metrics)), gradients) of a phase with these settings."""
  run = _compiled(case.objective, tuple(sorted(settings.items())))
  args = case.args if batch is None else (*case.args[:3], batch)
  return jax.device_get(run(*args))


@functools.cache
def _compiled(objective, settings):
  phase = outlines.phase_of(objective, "codes", **dict(settings))

  def loss(params, *args):
    return objective.loss(phase, params, *args, jax.random.key(0))

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _draws(case, **settings):
  phase = outlines.phase_of(case.objective, "codes", **settings)
  return case.objective.draws(phase, case.batch, jax.random.key(0))


def _inputs(case):
  """(features float64[B, N, D], valid) of the case."""
  made = case.objective._features(case.frozen["encoder"], case.batch["image"])
  return np.asarray(made, np.float64), case.batch["valid"]


def test_gradient_of_the_hard_mask_is_that_of_the_soft_one(case):
  """Straight through: of the rate term, for which it can be written down."""
  only = {"entropy_weight": 0.0, "detail_weight": 0.0}
  rated = _SELECT | only
  (_, (_, metrics)), with_rate = _run(case, **rated)
  _, without = _run(case, **rated | {"rate_weight": 0.0})
  gradient = with_rate["selector"] - without["selector"]
  x, valid = _inputs(case)
  noise = np.asarray(_draws(case, **rated)["gumbel"], np.float64)
  margin = x @ case.params["selector"] + noise
  margin = margin[..., 0] - margin[..., 1]
  count, patches = valid.sum(), x.shape[1]
  kept = ((margin >= 0).mean(1) * valid).sum() / count
  found = averages.value(metrics["kept_share"])
  np.testing.assert_allclose(found, kept, rtol=1e-5)
  soft = 1 / (1 + np.exp(-margin / 0.7))
  slope = soft * (1 - soft) / 0.7 * valid[:, None] / (count * patches)
  along = np.einsum("bn,bnd->d", slope, x) * -2 * 30.0 * (0.4 - kept)
  expected = np.stack([along, -along], axis=-1)
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
  assert np.abs(without["selector"]).max() > 1e-4  # the reconstruction's


def test_commitment_and_codebook_are_of_kept_tokens_of_valid_images(case):
  """By NumPy: every token, its nearest code, the sums that move it."""
  settings = _CODES | {"mask": "random", "revive_below": 0.0}
  (_, (state, metrics)), _ = _run(case, **settings)
  x, valid = _inputs(case)
  kept = np.asarray(_draws(case, **settings)["mask"], np.float64)
  around = (x * kept[..., None]).mean(1, keepdims=True)
  z = (x + around) @ case.params["merger"] @ case.params["quantizer"]
  z = z / np.linalg.norm(z, axis=-1, keepdims=True)
  codes = case.extra["codebook"]["codes"].astype(np.float64)
  used, distance = [], 0.0
  counts, sums = np.zeros(len(codes)), np.zeros_like(codes)
  for row in np.flatnonzero(valid):
    for position in np.flatnonzero(kept[row])[:12]:  # the capacity
      one = z[row, position]
      nearest = (codes @ one).argmax()
      distance += np.square(one - codes[nearest]).sum()
      counts[nearest] += 1
      sums[nearest] += one
      used.append(nearest)
  found = metrics["commitment"]
  assert found.count == len(used)
  np.testing.assert_allclose(found.compute(), distance / len(used), rtol=1e-5)
  old, new = case.extra["codebook"], state["codebook"]
  decay = case.objective.model_config.quantizer.decay
  mix = lambda a, b: decay * a + (1 - decay) * b
  np.testing.assert_allclose(
    new["counts"], mix(old["counts"], counts), rtol=1e-4
  )
  np.testing.assert_allclose(
    new["sums"], mix(old["sums"], sums), rtol=1e-4, atol=1e-5
  )
  p = counts[counts > 0] / counts.sum()
  perplexity = averages.value(metrics["perplexity_in_batch"])
  np.testing.assert_allclose(
    perplexity, np.exp(-(p * np.log(p)).sum()), rtol=1e-4
  )


def test_dead_codes_take_vectors_of_the_batch_each_another_one(case):
  settings = _CODES | {"mask": "sampled"}
  (_, (state, metrics)), _ = _run(case, **settings)
  dead = case.extra["codebook"]["counts"] < 0.5
  new = state["codebook"]["codes"]
  revived = np.isclose(state["codebook"]["counts"], 0.1)
  assert metrics["codes_revived"].total == revived.sum() > 3
  assert (revived <= dead).all()
  between = new[revived] @ new[revived].T
  assert (between - np.eye(len(between)) * 2).max() < 1 - 1e-6
  np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, rtol=1e-5)


_PHASES = {
  "random": (_CODES | {"mask": "random", "quantize": False}, set()),
  "select": (_SELECT, {"entropy", "p_keep_std"}),
  "codes": (
    _CODES | {"mask": "sampled"},
    {"commitment", "codes_in_batch", "perplexity_in_batch", "codes_revived"},
  ),
  "all": (
    _SELECT | _CODES,
    {
      *("entropy", "p_keep_std", "commitment", "codes_in_batch"),
      *("perplexity_in_batch", "codes_revived"),
    },
  ),
}


@pytest.mark.parametrize("name", _PHASES)
def test_a_phase_switches_its_terms_on(name, case):
  """Only these; an invalid image is as if it were not there in each."""
  settings, more = _PHASES[name]
  (loss, (state, metrics)), gradient = _run(case, **settings)
  assert set(metrics) == {"loss", "recon_loss", "kept_share"} | more
  found = {k: averages.value(x) for k, x in metrics.items()}
  expected = found["recon_loss"]
  if "entropy" in more:
    kept = (settings["rate"] - found["kept_share"]) ** 2
    expected += 30.0 * kept + 0.5 * found["entropy"]
  if "commitment" in more:
    expected += 0.25 * found["commitment"]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  moved = (state["codebook"]["codes"] != case.extra["codebook"]["codes"]).any()
  assert moved == ("commitment" in more)
  assert (np.abs(gradient["selector"]).max() > 0) == ("entropy" in more)
  other = {k: x.copy() for k, x in case.batch.items()}
  other["image"][other["valid"] == 0] = 255
  again = _run(case, other, **settings)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    again,
    ((loss, (state, metrics)), gradient),
  )


def test_held_out_gains_are_those_of_all_valid_images(case):
  """However they are cut into batches."""
  objective = case.objective
  run = jax.jit(objective.held_out_metrics)
  cut = lambda rows: {k: x[rows] for k, x in case.batch.items()}
  rows = [slice(0, 8)], [slice(0, 2), slice(2, 8)]
  whole, parts = (
    averages.merged([run(*case.args[:3], cut(part)) for part in some])
    for some in rows
  )
  for name, value in whole.items():
    np.testing.assert_allclose(parts[name], value, rtol=1e-4, err_msg=name)
  assert set(whole) == {
    *("kept_share", "cos_mean", "p_keep_std", "gain_no_codes", "recon_gain")
  }


def test_an_unknown_mask_is_an_error(case):
  with pytest.raises(errors.ConfigError, match="mask='most'"):
    _run(case, **_CODES | {"mask": "most"})


def test_candidates_of_parts_are_those_of_the_whole():
  """Fewer than codes or more; padding is never drawn."""
  rng = np.random.default_rng(0)
  z = rng.normal(size=(4, 5, 3)).astype(np.float32)
  order = 1 + rng.permutation(20).reshape(4, 5)
  weights = (rng.random((4, 5)) < 0.6).astype(np.float32)
  for count in (4, 9, 30):
    pick = lambda rows, count=count: quantizer.candidates(
      z[rows], order[rows], weights[rows], count
    )
    whole = pick(slice(0, 4))
    parts = quantizer.merge_candidates(pick([0, 2]), pick([1, 3]))
    there = min(count, int(weights.sum()))
    assert (np.asarray(whole["order"]) > 0).sum() == there
    np.testing.assert_array_equal(whole["order"], parts["order"])
    np.testing.assert_array_equal(
      whole["vectors"][:there], parts["vectors"][:there]
    )
