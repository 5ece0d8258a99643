"""Endless orders: every item once an epoch, whatever their number."""

import numpy as np
import pytest

from lavit_jax.data.batching import orders


@pytest.mark.parametrize("count", [1, 2, 1000, 65_536, 70_001, 131_073])
def test_an_epoch_holds_every_item_once(count):
  order = orders.Permutation(count, seed=5)
  first = order.take(np.arange(count))
  np.testing.assert_array_equal(np.sort(first), np.arange(count))
  both = order.take(np.arange(2 * count))
  np.testing.assert_array_equal(both[:count], first)
  np.testing.assert_array_equal(np.sort(both[count:]), np.arange(count))
  if count > 100:
    assert (both[count:] != first).mean() > 0.9
    other = orders.Permutation(count, seed=6).take(np.arange(count))
    assert (other != first).mean() > 0.9
  for k in (0, count // 2, 2 * count - 1):
    assert order[k] == both[k]


def test_a_long_order_is_shuffled_well():
  """Neither neighbours nor halves keep together; far items are reached."""
  count = 1_000_003
  order = orders.Permutation(count, seed=1).take(np.arange(100_000)) / count
  assert abs(order.mean() - 0.5) < 0.005
  assert abs(np.std(order) - 12**-0.5) < 0.005
  assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01
  steps = np.diff(np.sort(order)) * 100_000  # gaps of random numbers
  assert abs(np.std(steps) - 1) < 0.05


def test_items_beyond_a_billion_are_ordered():
  count = 3_000_000_000
  some = orders.Permutation(count, seed=0).take(np.arange(10) + 5 * count)
  assert len(set(some.tolist())) == 10
  assert (some < count).all()
  assert some.max() > count / 2
