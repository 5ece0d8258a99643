"""Each term of stage `encoder` against PyTorch or NumPy, invalid rows too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.core import averages, errors
from lavit_jax.train import losses
from tests.train import outlines, stubs

_PAIRS = np.array([1, 0, 1, 1, 0, 1], np.float32)
_KEPT = np.flatnonzero(_PAIRS)


def _unit(rng, *shape):
  x = rng.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _towers(seed=0):
  rng = np.random.default_rng(seed)
  return {"image": _unit(rng, 6, 16), "text": _unit(rng, 6, 16), "scale": 14.0}


def _nll(logits, labels):
  """Mean nll by NumPy of float[M, C] for int[M]."""
  logits = logits.astype(np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -logp[np.arange(len(labels)), labels].mean()


def test_contrast_is_symmetric_cross_entropy_of_pairs_alone():
  out = _towers()
  loss, accuracy = losses.contrast_loss(**out, pairs=jnp.asarray(_PAIRS))
  logits = 14.0 * out["image"][_KEPT] @ out["text"][_KEPT].T
  labels = np.arange(len(_KEPT))
  expected = (_nll(logits, labels) + _nll(logits.T, labels)) / 2
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  hits = (logits.argmax(1) == labels).mean()
  np.testing.assert_allclose(accuracy, hits, rtol=1e-6)


@pytest.mark.parametrize("side", ["image", "text"])
def test_contrast_leaves_out_what_is_no_pair_in_both_directions(side):
  """Neither value nor gradient depends on it, nor does it get a gradient."""
  out, pairs = _towers(), jnp.asarray(_PAIRS)
  other = out | {side: out[side].copy()}
  other[side][_PAIRS == 0] = _towers(1)[side][_PAIRS == 0]
  run = jax.jit(
    jax.value_and_grad(lambda x: losses.contrast_loss(**x, pairs=pairs)[0])
  )
  (loss, one), (same, two) = run(out), run(other)
  np.testing.assert_allclose(loss, same, rtol=1e-6)
  for name in ("image", "text"):
    np.testing.assert_allclose(one[name], two[name], atol=1e-6)
    assert not np.asarray(one[name])[_PAIRS == 0].any()
    assert np.asarray(one[name])[_KEPT].any(1).all()


def test_contrast_of_nothing_is_nothing():
  loss, accuracy = losses.contrast_loss(**_towers(), pairs=jnp.zeros(6))
  assert (float(loss), float(accuracy)) == (0, 0)


def test_captions_are_scored_by_their_own_tokens():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((3, 4, 5)).astype(np.float32)
  text = rng.integers(0, 5, (3, 4))
  weights = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
  loss = losses.caption_loss(logits, text, weights)
  used = weights > 0
  expected = _nll(logits[used], text[used])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert losses.caption_loss(logits, text, 0 * weights) == 0


def test_pixels_are_the_squared_error_of_valid_images():
  rng = np.random.default_rng(0)
  made, target = rng.standard_normal((2, 6, 4, 12)).astype(np.float32)
  loss = losses.pixel_loss(made, target, _PAIRS)
  expected = np.square(made[_KEPT] - target[_KEPT]).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_whitening_is_of_covariance_and_mean_of_valid_images():
  rng = np.random.default_rng(0)
  features = rng.normal(0.3, 2.0, (6, 4, 5)).astype(np.float32)
  run = jax.jit(jax.value_and_grad(losses.whitening_loss))
  loss, gradient = run(features, _PAIRS)
  kept = features[_KEPT].astype(np.float64)
  flat = (kept - kept.mean(0)).reshape(-1, 5)
  excess = np.square(flat.T @ flat / len(flat) - np.eye(5)).sum() / 5
  expected = excess + np.square(kept.mean((0, 1))).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert not np.asarray(gradient)[_PAIRS == 0].any()
  white = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]], np.float32)[:, None]
  loss = jax.jit(losses.whitening_loss)(white, np.ones(4, np.float32))
  np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_images_of_another_size_than_the_encoder_are_refused_at_once():
  with pytest.raises(errors.ConfigError, match="Set both to the same number"):
    outlines.build("encoder", data__image_size=32)


@pytest.fixture(scope="module")
def stage():
  """(objective, case, the jitted loss and metrics of a phase's settings)."""
  objective = stubs.encoder()
  case = outlines.Case(objective)
  phase = outlines.phase_of(objective, mask_share=0.3)

  @jax.jit
  def run(batch):
    args = (*case.args[:3], batch, jax.random.key(0))
    loss = lambda params: objective.loss(phase, params, *args[1:])
    return jax.value_and_grad(loss, has_aux=True)(args[0])

  return phase, case, run


def test_the_loss_is_the_weighted_sum_of_its_terms(stage):
  phase, case, run = stage
  (loss, (_, metrics)), _ = run(case.batch)
  found = {name: averages.value(x) for name, x in metrics.items()}
  expected = (
    phase["contrast_weight"] * found["contrast"]
    + phase["caption_weight"] * found["caption"]
    + phase["pixel_weight"] * found["pixel_mse"]
    + phase["whitening_weight"] * found["whitening"]
  )
  assert min(found.values()) >= 0 < found["whitening"]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
  # Six images are valid; of these one has no caption.
  counts = {name: float(x.count) for name, x in metrics.items()}
  assert (counts["contrast"], counts["pixel_mse"]) == (5, 6)
  words = case.batch["text_mask"] * case.batch["valid"][:, None]
  assert counts["caption"] == words.sum()


def test_what_is_not_valid_and_empty_captions_change_nothing(stage):
  _, case, run = stage
  rng = np.random.default_rng(1)
  batch = {name: x.copy() for name, x in case.batch.items()}
  bad = batch["valid"] == 0
  shape = batch["image"][bad].shape
  batch["image"][bad] = rng.integers(0, 256, shape, dtype=np.uint8)
  batch["text"][bad] = rng.integers(3, 300, batch["text"][bad].shape)
  empty = ~batch["text_mask"].any(1)
  batch["text"][empty] = 3
  one, two = run(case.batch), run(batch)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    one,
    two,
  )
