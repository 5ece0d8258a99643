"""The stream of documents: proportions, orders, weights that change."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lavit_jax.core import errors
from lavit_jax.data.batching import mixtures

_SETTINGS = hypothesis.settings(
  max_examples=60, deadline=None, derandomize=True
)


@_SETTINGS
@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_prefix_of_the_stream_keeps_its_proportions(weights):
  mixture = mixtures.Mixture([50] * len(weights), weights, seed=0)
  shares = np.array(weights) / sum(weights)
  counts = np.zeros(len(weights))
  for g in range(150):
    counts[mixture.document(g)[0]] += 1
    assert np.abs(counts - (g + 1) * shares).max() < 1


def test_weights_with_decimals_and_zeros_are_exact():
  mixture = mixtures.Mixture([5, 5, 5], [0.5, 0.0, 1.5], seed=0)
  parts = [mixture.document(g)[0] for g in range(400)]
  assert collections.Counter(parts) == {0: 100, 2: 300}


def test_a_component_shows_each_example_once_an_epoch_in_a_new_order():
  mixture = mixtures.Mixture([7, 30], [1, 1], seed=4)
  first = [i for c, i in map(mixture.document, range(28)) if c == 0]
  assert sorted(first[:7]) == sorted(first[7:]) == list(range(7))
  assert first[:7] != first[7:]
  other = mixtures.Mixture([7, 30], [1, 1], seed=5)
  assert first != [i for c, i in map(other.document, range(28)) if c == 0]


@pytest.mark.parametrize(
  ("counts", "weights", "said"),
  [
    ([], [], "positive"),
    ([3], [0], "positive"),
    ([3, 3], [1, -1], "positive"),
    ([3, 0], [1, 1], "no examples"),
  ],
)
def test_bad_mixtures_are_named(counts, weights, said):
  with pytest.raises(errors.ConfigError, match=said):
    mixtures.Mixture(counts, weights, 0)


def test_weights_with_long_patterns_are_rounded():
  weights = [0.123456789, 1, 1e-9, 0]
  mixture = mixtures.Mixture([3, 3, 3, 3], weights, 0)
  components, _ = mixture.documents(0, 1 << 16)
  shares = np.bincount(components, minlength=4) / (1 << 16)
  wanted = np.array(weights) / sum(weights)
  assert np.abs(shares - wanted).max() < 2 / (1 << 16)
  assert shares[2] > 0  # what has a weight is seen
  assert shares[3] == 0


def test_many_documents_at_once_are_those_one_by_one():
  mixture = mixtures.Mixture([7, 100_000, 5], [1, 3, 0.5], 2, {40: [1, 0, 1]})
  components, found = mixture.documents(3, 90)
  one_by_one = [mixture.document(g) for g in range(3, 90)]
  assert list(zip(components, found, strict=True)) == one_by_one
  assert all(len(some) == 0 for some in mixture.documents(5, 5))


def test_a_component_that_is_added_later_changes_nothing_before():
  """Wherever it stands among the others."""
  names = ["a/text", "b/text", "c/text"]
  two = mixtures.Mixture([11, 13], [1, 1.5], 3, names=["a/text", "c/text"])
  three = mixtures.Mixture([11, 17, 13], [1, 0, 1.5], 3, {90: [1, 2, 0]}, names)
  components, found = three.documents(0, 90)
  np.testing.assert_array_equal(components // 2, two.documents(0, 90)[0])
  np.testing.assert_array_equal(found, two.documents(0, 90)[1])
  assert set(three.documents(90, 120)[0]) == {0, 1}
  alone = mixtures.Mixture([11, 17], [0, 1], 3, names=names[:2])
  assert set(alone.documents(0, 20)[0]) == {1}


def test_weights_change_at_a_document_and_orders_go_on():
  counts = [11, 13]
  before = mixtures.Mixture(counts, [1, 1], 3)
  changed = mixtures.Mixture(counts, [1, 1], 3, {101: [1, 3]})
  again = mixtures.Mixture(counts, [1, 1], 3, {101: [1, 3], 201: [1, 0]})
  first, second = before.documents(0, 101), changed.documents(0, 101)
  np.testing.assert_array_equal(first, second)
  components, found = changed.documents(0, 501)
  assert np.bincount(components[101:]).tolist() == [100, 300]
  for c, count in enumerate(counts):  # each epoch has each example once
    seen = found[components == c]
    for start in range(0, len(seen) - count, count):
      assert sorted(seen[start : start + count]) == list(range(count))
  np.testing.assert_array_equal(
    changed.documents(0, 201), again.documents(0, 201)
  )
  assert set(again.documents(201, 300)[0]) == {0}
  np.testing.assert_allclose(
    changed.epochs(501), np.bincount(components) / counts
  )
  with pytest.raises(errors.ConfigError, match="expected 1 or more"):
    mixtures.Mixture(counts, [1, 1], 3, {0: [1, 3]})
