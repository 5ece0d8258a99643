import collections
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lavit_jax.core import errors
from lavit_jax.data.batching import packing

_SETTINGS = hypothesis.settings(
  max_examples=60, deadline=None, derandomize=True
)
_SIZES = st.lists(
  st.tuples(st.integers(-1, 20), st.integers(0, 3)), min_size=1, max_size=60
)


@_SETTINGS
@hypothesis.given(_SIZES)
def test_first_fit_packs_each_document_once_within_the_limits(sizes):
  rows = packing.first_fit(sizes, 20, 3)
  placed = sorted(i for row in rows for i in row)
  assert placed == [i for i, size in enumerate(sizes) if size[0] >= 0]
  for row in rows:
    assert row
    assert sum(sizes[i][0] for i in row) <= 20
    assert sum(sizes[i][1] for i in row) <= 3


@_SETTINGS
@hypothesis.given(_SIZES)
def test_first_fit_opens_a_row_only_where_no_earlier_one_had_room(sizes):
  rows = packing.first_fit(sizes, 20, 3)
  for later in range(1, len(rows)):
    first = sizes[rows[later][0]]
    for row in rows[:later]:
      length = sum(sizes[i][0] for i in row)
      images = sum(sizes[i][1] for i in row)
      assert length + first[0] > 20 or images + first[1] > 3


def test_a_document_that_fits_no_row_is_an_error():
  with pytest.raises(ValueError, match=r"document 1 of size \[9, 0\]"):
    packing.first_fit([[1, 0], [9, 0]], 8, 1)


def _sizes_of(seed, bad=0.1):
  def sizes(start, stop):
    out = np.empty((stop - start, 2), np.int64)
    for g in range(start, stop):
      rng = np.random.default_rng([seed, g])
      out[g - start] = rng.integers(1, 17), rng.integers(0, 3)
      if rng.random() < bad:
        out[g - start] = -1
    return out

  return sizes


@_SETTINGS
@hypothesis.given(st.integers(0, 1000), st.integers(1, 40))
def test_every_usable_document_of_a_window_is_in_exactly_one_row(seed, window):
  sizes = _sizes_of(seed)
  plan = packing.PackingPlan(sizes, limits=(16, 4), window=window, seed=seed)
  placed = collections.Counter()
  row = 0
  while not placed or max(placed) < 3 * window:
    placed.update(plan.row(row))
    row += 1
  usable = np.flatnonzero(sizes(0, 3 * window)[:, 0] >= 0)
  assert [g for g in sorted(placed) if g < 3 * window] == usable.tolist()
  assert set(placed.values()) == {1}


def test_a_row_does_not_depend_on_earlier_accesses():
  make = lambda: packing.PackingPlan(
    _sizes_of(3), limits=(16, 4), window=20, seed=1
  )
  forward = make()
  rows = [forward.row(r) for r in range(60)]
  backward = make()
  assert [backward.row(r) for r in reversed(range(60))] == rows[::-1]


def test_the_order_of_rows_depends_on_the_seed():
  order = [
    packing.PackingPlan(
      _sizes_of(3, bad=0), limits=(16, 9), window=50, seed=seed
    )
    for seed in (1, 2)
  ]
  count = len(packing.first_fit(_sizes_of(3, bad=0)(0, 50), 16, 9))
  first, second = ([plan.row(r) for r in range(count)] for plan in order)
  assert first != second
  assert sorted(first) == sorted(second)


def test_pieces_of_a_document_are_packed_separately():
  """Document 1 has two pieces, which need not stand in one row."""
  sizes = lambda start, stop: [
    np.array([[16, 0], [6, 1]]) if g % 2 else [9, 0] for g in range(start, stop)
  ]
  plan = packing.PackingPlan(sizes, limits=(16, 4), window=4)
  rows = [plan.row(r) for r in range(4)]
  assert sorted(rows, key=repr) == [
    ((1, 0),),
    ((3, 0),),
    (0, (1, 1)),
    (2, (3, 1)),
  ]


def test_threads_see_one_plan():
  plan = packing.PackingPlan(_sizes_of(5), limits=(16, 4), window=16)
  again = packing.PackingPlan(_sizes_of(5), limits=(16, 4), window=16)
  rows = {}

  def read(part):
    for r in range(part, 80, 4):
      rows[r] = plan.row(r)

  threads = [threading.Thread(target=read, args=(p,)) for p in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert rows == {r: again.row(r) for r in range(80)}


def test_a_stream_without_one_usable_document_is_an_error():
  plan = packing.PackingPlan(
    lambda start, stop: np.full((stop - start, 2), -1),
    limits=(16, 4),
    window=8,
  )
  with pytest.raises(errors.DataError, match="longer than 16 positions"):
    plan.row(0)


def _counted(seed):
  asked = []

  def sizes(start, stop):
    asked.append(start)
    return _sizes_of(seed)(start, stop)

  return sizes, asked


def test_a_plan_with_a_memo_packs_only_the_window_it_needs(tmp_path):
  memo = tmp_path / "plans" / "a.npy"
  settings = dict(limits=(16, 4), window=16, memo=memo)
  expected = packing.PackingPlan(_sizes_of(5), **settings).row(150)
  sizes, asked = _counted(5)
  assert packing.PackingPlan(sizes, **settings).row(150) == expected
  assert len(asked) <= 5  # of about 16 windows


def test_a_memo_of_other_data_is_not_used(tmp_path):
  memo = tmp_path / "plans" / "a.npy"
  settings = dict(limits=(16, 4), window=16)
  packing.PackingPlan(_sizes_of(5), memo=memo, **settings).row(150)
  expected = packing.PackingPlan(_sizes_of(6), **settings).row(150)
  assert (
    packing.PackingPlan(_sizes_of(6), memo=memo, **settings).row(150)
    == expected
  )


@pytest.mark.parametrize("spoil", [b"no array", b""])
def test_a_damaged_memo_is_ignored(tmp_path, spoil):
  memo = tmp_path / "a.npy"
  memo.write_bytes(spoil)
  settings = dict(limits=(16, 4), window=16)
  expected = packing.PackingPlan(_sizes_of(5), **settings).row(9)
  assert (
    packing.PackingPlan(_sizes_of(5), memo=memo, **settings).row(9) == expected
  )
