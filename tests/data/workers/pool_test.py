"""Other processes are replaced where they end or hang, and lose nothing."""

import time

import pytest

from lavit_jax.core import errors
from lavit_jax.data.workers import pool

_MAKE = "tests.data.workers.answers:make"


@pytest.fixture(autouse=True)
def _path(monkeypatch, request):
  monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))


def _run(tmp_path, items, **kwargs):
  setup = {"root": str(tmp_path)} | kwargs.pop("setup", {})
  kwargs = {"count": 2, "timeout": 30.0} | kwargs
  return dict(pool.run(_MAKE, setup, items, **kwargs))


def test_every_item_is_answered_once(tmp_path):
  assert _run(tmp_path, list(range(50))) == {i: 2 * i for i in range(50)}
  assert 1 <= len(list(tmp_path.glob("started.*"))) <= 2


def test_what_ends_or_hangs_is_replaced(tmp_path):
  begun = time.monotonic()
  items = [1, "die a", 3, "hang b", 5, "die c"]
  found = _run(tmp_path, items, timeout=3.0)
  assert found == {0: 2, 1: "die", 2: 6, 3: "hang", 4: 10, 5: "die"}
  assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
  ("item", "said"),
  [
    ("refuse this", "^this is refused$"),
    ("always x", r"3 processes failed .*\(always x\).*status 9"),
  ],
)
def test_what_cannot_be_done_is_told(tmp_path, item, said):
  with pytest.raises(errors.DataError, match=said):
    _run(tmp_path, [1, item, 3])


def test_a_fault_of_the_function_is_no_fault_of_the_data(tmp_path):
  with pytest.raises(RuntimeError, match="ValueError: x"):
    _run(tmp_path, ["fail x"])


def test_what_cannot_begin_is_told(tmp_path):
  with pytest.raises(errors.DataError, match="the data are gone"):
    _run(tmp_path, [1], setup={"broken": True})


def test_who_stops_asking_ends_all(tmp_path):
  setup = {"root": str(tmp_path)}
  answers = pool.run(_MAKE, setup, [1, "hang a", "hang b"], count=2)
  assert next(answers) == (0, 2)
  begun = time.monotonic()
  answers.close()
  assert time.monotonic() - begun < 5
