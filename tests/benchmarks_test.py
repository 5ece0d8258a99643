"""The comparison with PyTorch notices where the two sides differ.

The benchmarks themselves are run by hand: each takes minutes, and those that
compare two sides end with status 1 where these disagree.
"""

import pathlib

import numpy as np
import pytest

pytest.importorskip("torch", reason="one of the sides that are compared")
pytest.importorskip("transformers", reason="one of the sides")
pytest.importorskip("safetensors", reason="reads what was exported")

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def sides(monkeypatch):
  """(cases, compare) of the benchmark."""
  monkeypatch.syspath_prepend(FOLDER)
  from side_by_side import cases, compare

  return cases, compare


def beams(case, batch):
  ids = np.arange(10, 10 + batch * case.new_tokens)
  ids = ids.reshape(batch, case.new_tokens)
  return {"ids": ids, "scores": np.zeros(batch, np.float32)}


def written(sides, change):
  """Whether first calls agree that are the same but for `change(ours)`."""
  cases, compare = sides
  (case,) = cases.chosen(["caption"], small=True)
  found = {"torch": beams(case, 2), "ours": beams(case, 2)}
  change(found["ours"])
  return compare.first_calls(case, 2, cases.SMALL, found, found)


def test_equal_beams_agree(sides):
  assert written(sides, lambda ours: None)[0]


@pytest.mark.parametrize(
  ("name", "index", "value", "said"),
  [
    ("ids", (1, 3), 99, "first in row 1 at token 3"),
    ("ids", (0, 0), 310, "suppressed ids such as 310"),
    ("ids", (0, 5), 2, "suppressed ids such as 2"),
    ("scores", 1, 0.1, "scores 1e-01"),
  ],
)
def test_one_other_id_or_score_is_a_disagreement(
  sides, name, index, value, said
):
  def change(ours):
    ours[name][index] = value

  good, text = written(sides, change)
  assert not good
  assert said in text


def test_another_patch_kept_or_many_other_codes_are_a_disagreement(sides):
  cases, compare = sides
  (case,) = cases.chosen(["tokenize_compact"], small=False)

  def agree(keep, codes):
    theirs = {"keep": np.eye(4) > 0, "codes": np.arange(100)}
    found = {"torch": theirs, "ours": {"keep": keep, "codes": codes}}
    return compare.first_calls(case, 4, cases.FULL, found, {})[0]

  keep, codes = np.eye(4) > 0, np.arange(100)
  assert agree(keep, codes)
  assert agree(keep, np.where(codes < 2, -1, codes))
  assert not agree(keep, np.where(codes < 3, -1, codes))
  assert not agree(keep[:, ::-1], codes)


def test_rows_of_another_length_are_a_disagreement(sides):
  def shorter(ours):
    ours["ids"] = ours["ids"][:, :-1]

  good, text = written(sides, shorter)
  assert not good
  assert "ours wrote ids of shape (2, 5), not (2, 6)" in text
