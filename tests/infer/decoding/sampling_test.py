import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.infer.decoding import scoring

torch = pytest.importorskip("torch", reason="transformers is the judge here")
transformers = pytest.importorskip("transformers", reason="it is the judge")

VOCAB, ROWS = 40, 6


def _logits(seed=0, spread=3.0):
  """Log-probabilities float32[ROWS, VOCAB], none equal to another."""
  scores = np.random.default_rng(seed).normal(0, spread, (ROWS, VOCAB))
  return np.asarray(jax.nn.log_softmax(jnp.float32(scores)))


def _theirs(scores, temperature=1.0, top_k=0, top_p=1.0):
  """Scores float32[B, V] after the filters in the order of `generate`."""
  filters = []
  if temperature != 1:
    filters.append(transformers.TemperatureLogitsWarper(temperature))
  if top_k:
    filters.append(transformers.TopKLogitsWarper(top_k))
  if top_p < 1:
    filters.append(transformers.TopPLogitsWarper(top_p))
  filters = transformers.LogitsProcessorList(filters)
  return filters(None, torch.tensor(scores)).numpy()


def _ours(scores, temperature=1.0, top_k=0, top_p=1.0):
  """The same by `scoring.candidates`, as `decode.generate` calls it."""
  scores = jnp.asarray(scores) / jnp.float32(temperature)
  top_k = min(top_k, scores.shape[1])
  nucleus = jnp.float32(top_p) if top_p < 1 else None
  kept, ids = scoring.candidates(scores, top_k, nucleus)
  out = np.full(scores.shape, -np.inf, np.float32)
  np.put_along_axis(out, np.asarray(ids), np.asarray(kept), axis=1)
  return out


def _softmax(scores):
  return np.asarray(jax.nn.softmax(jnp.asarray(scores)))


def _draws(scores, count=20000, seed=0, **filters):
  """Shares float[V] of the ids that `scoring.sample` draws."""
  temperature = filters.pop("temperature", 1.0)
  rows = jnp.tile(jnp.asarray(scores) / temperature, (count, 1))
  keys = jax.random.split(jax.random.key(seed), count)
  ids = np.asarray(scoring.sample(keys, 3, rows, **filters))
  return np.bincount(ids, minlength=len(scores))


def test_transformers_applies_the_filters_in_the_order_used_here():
  config = transformers.LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
  )
  model = transformers.LlamaForCausalLM(config)
  settings = transformers.GenerationConfig(
    do_sample=True, temperature=0.7, top_k=5, top_p=0.9
  )
  filters = model._get_logits_processor(
    settings, input_ids_seq_length=1, logits_processor=[]
  )
  assert [type(x).__name__ for x in filters] == [
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
  ]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 5.0])
def test_filtered_distributions_are_those_of_transformers(temperature):
  scores = _logits()
  cut = set()
  for top_k, top_p in itertools.product(
    (0, 1, 7, 39, 40, 1000), (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0)
  ):
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours, theirs = _ours(scores, **filters), _theirs(scores, **filters)
    kept = np.isfinite(theirs)
    np.testing.assert_array_equal(np.isfinite(ours), kept, err_msg=str(filters))
    np.testing.assert_allclose(_softmax(ours), _softmax(theirs), atol=1e-6)
    np.testing.assert_allclose(ours[kept], theirs[kept], rtol=1e-6)
    cut |= set(kept.sum(1))
  assert {1, 7, 40} <= cut  # they do cut, more and less


@pytest.mark.parametrize(
  ("top_k", "top_p"), [(0, 1.0), (2, 1.0), (6, 1.0), (0, 0.75), (6, 0.65)]
)
def test_ties_inside_and_outside_the_cut_are_as_in_transformers(top_k, top_p):
  # Two of 0.3, then four of 0.1, the rest equal and next to impossible.
  probs = np.full((1, VOCAB), 1e-7, np.float32)
  probs[0, [3, 30]], probs[0, [1, 8, 20, 39]] = 0.3, 0.1
  scores = np.log(probs)
  ours = _softmax(_ours(scores, top_k=top_k, top_p=top_p))
  theirs = _softmax(_theirs(scores, top_k=top_k, top_p=top_p))
  # Which of equal ids top-p cuts is the sort's choice there: how many, not.
  np.testing.assert_allclose(np.sort(ours), np.sort(theirs), atol=1e-6)
  if top_p == 1:
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_tie_at_the_last_place_of_top_k_keeps_k_here_and_all_there():
  scores = np.log(np.float32([[0.4, 0.2, 0.2, 0.2]]))
  ours, theirs = (
    np.isfinite(f(scores, top_k=2))[0].tolist() for f in (_ours, _theirs)
  )
  assert ours == [True, True, False, False]  # k at most: static shapes
  assert theirs == [True, True, True, True]


def test_all_equal_scores_stay_a_uniform_distribution():
  scores = np.full((1, VOCAB), -5.0, np.float32)
  for filters in ({}, {"temperature": 0.1}, {"top_k": VOCAB}):
    for f in (_ours, _theirs):
      probs = _softmax(f(scores, **filters))
      np.testing.assert_allclose(probs, 1 / VOCAB, rtol=1e-5)


def test_ids_ruled_out_before_the_filters_stay_out():
  scores = np.array(_logits())
  scores[:, ::2] = -np.inf
  for filters in ({"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.999}):
    ours, theirs = _ours(scores, **filters), _theirs(scores, **filters)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(_softmax(ours), _softmax(theirs), atol=1e-6)
    assert not np.isfinite(ours[:, ::2]).any()


@pytest.mark.parametrize(
  "filters",
  [
    {},
    {"temperature": 2.0},
    {"top_k": 8},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.9},
  ],
)
def test_draws_follow_the_distribution_of_transformers(filters):
  scores = _logits(seed=1, spread=1.0)[:1]
  expected = _softmax(_theirs(scores, **filters))[0]
  counts = _draws(scores[0], **filters)
  assert not counts[expected == 0].any()
  kept = expected > 0
  mean = expected[kept] * counts.sum()
  chi_square = ((counts[kept] - mean) ** 2 / mean).sum()
  freedom = kept.sum() - 1
  # Five standard deviations of chi-square; another distribution fails it.
  limit = freedom + 5 * np.sqrt(2 * freedom)
  assert chi_square < limit
  wrong = np.roll(expected[kept], 1) * counts.sum()
  assert ((counts[kept] - wrong) ** 2 / wrong).sum() > limit
