"""`benchmarks/kill.py`, shorter: SIGKILLs, in a save too, change nothing."""

import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_two_kills_leave_parameters_and_batches_as_they_were(
  micro_codes, tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(FOLDER)
  import kill

  found = kill.compare(micro_codes, tmp_path, kills=2, steps=16)
  assert found["same_parameters"]
  assert found["same_batches"]
  assert found["kills_in_saves"]
  starts = list((tmp_path / "branch1" / "run.logs").iterdir())
  assert len(starts) == 3
