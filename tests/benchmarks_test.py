"""The comparison with PyTorch runs end to end, and notices differences."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch", reason="one of the sides that are compared")
pytest.importorskip("transformers", reason="one of the sides")
pytest.importorskip("safetensors", reason="reads what was exported")

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def ran(script, *arguments):
  """What a script prints, as a toy."""
  command = [sys.executable, FOLDER / script, "--small", *arguments]
  # One device, as a user has it; conftest.py asks for eight.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done


@pytest.mark.slow
def test_both_sides_agree_in_every_case_and_are_timed(tmp_path):
  out = tmp_path / "out.json"
  done = ran(
    *("pytorch_side_by_side.py", "--batch", 2, "--repeats", 1, "--out", out)
  )
  cases = {
    "caption": "ids of the best beam equal (2 rows)",
    "vqa": "ids of the best beam equal (2 rows)",
    "draw": "greedy guided ids equal (2 rows)",
    "tokenize_reference": "keep masks equal",
    "tokenize_compact": "keep masks equal",
    "first_token_caption": "ids of the best beam equal (2 rows)",
    "first_token_draw": "greedy guided ids equal (2 rows)",
  }
  for name, agreement in cases.items():
    assert f"{name}, batch 2: {agreement}" in done.stdout
    assert f"\n| {name} | 2 | " in done.stdout
  report = json.loads((tmp_path / "out.json").read_text())
  assert [row["case"] for row in report["rows"]] == list(cases)
  for row in report["rows"]:
    assert {"torch", "ours"} < set(row)
    assert row["ours"]["compile_s"] > 0


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


@pytest.mark.parametrize(
  ("script", "case"),
  [
    ("pretrain_step.py", "pretrain step"),
    ("tokenizer_step.py", "tokenizer step"),
  ],
)
def test_training_steps_have_the_losses_of_pytorch(script, case):
  # One thread: two of PyTorch's wait for one another where others work, too.
  done = ran(script, "--repeats", 1, "--threads", 1, "--json")
  report = json.loads(done.stdout)
  losses = report["losses"]
  assert losses["ours"] == pytest.approx(losses["torch"], abs=1e-4)
  assert len(losses["ours"]) == 4
  assert losses["ours"][-1] < losses["ours"][0]
  (row,) = report["rows"]
  assert row["case"] == case
  assert row["torch"]["median_s"] > 0
  assert row["ours"]["median_s"] > 0


def test_packed_rows_hold_more_and_mean_the_same():
  report = json.loads(ran("packing.py", "--repeats", 2, "--json").stdout)
  assert report["loss_apart"] < 1e-4
  ways = report["ways"]
  assert ways["packed"]["fill"] > 0.9
  assert 0.3 < ways["padded"]["fill"] < ways["longest"]["fill"] < 0.9
  assert ways["padded"]["rows"] == [4, 256]
  assert ways["padded"]["ratio"] == 1.0
