"""Runs that go on elsewhere: other meshes and batches, bad steps left out."""

import logging

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lavit_jax.core import errors
from lavit_jax.train import loop, objectives, optimizer, phases
from lavit_jax.train.resilience import data_position, nonfinite, run_checkpoints
from lavit_jax.train.telemetry import batch_log, writers
from tests import micro

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("shared_programs"),
]


@pytest.fixture
def restored(monkeypatch):
  """States as they were restored in the test, with their checkpoints."""
  found = []
  real = run_checkpoints.RunCheckpoints.restore_newest

  def restore(self, *args):
    made = real(self, *args)
    if made is not None:
      host = jax.tree.map(np.asarray, made.state)
      layout = jax.tree.map(lambda x: x.sharding, made.state)
      found.append((made.step, host, layout))
    return made

  monkeypatch.setattr(run_checkpoints.RunCheckpoints, "restore_newest", restore)
  return found


def _rows(workdir):
  rows = writers.read_json_lines(workdir / "batches.jsonl")
  return {row["step"]: (row["crc32"], row["example"]) for row in rows}


def _metrics(workdir, name="loss"):
  rows = writers.read_json_lines(workdir / "metrics.jsonl")
  return {row["step"]: row[name] for row in rows if name in row}


_MESHES = (
  (8, {"data": 2, "fsdp": 2, "tensor": 2}),
  (4, {"fsdp": 2, "context": 2}),
  (1, {"data": -1}),
)


def test_a_run_moves_from_8_devices_to_4_to_1(micro_codes, tmp_path, restored):
  """Bit for bit what was saved, laid out for the new mesh; it learns on."""
  straight, moved = micro.branch(micro_codes, tmp_path, 2)
  common = {"phases__train__steps": 6, "log__every": 1}
  with micro.devices(1):
    cfg = micro.config("pretrain", straight, **common)
    loop.train(cfg, straight / "run", quiet=True)
  work = moved / "run"
  for number, (count, sizes) in enumerate(_MESHES, 1):
    cfg = micro.config("pretrain", moved, **common)
    cfg.mesh = sizes
    with micro.devices(count):
      loop.train(cfg, work, stop_at=2 * number, quiet=True)
    if number == 1:
      continue
    step, state, layout = restored[-1]
    assert step == 2 * (number - 1)
    kept = work / "checkpoints" / str(step) / "state"
    on_disk = ocp.StandardCheckpointer().restore(kept.absolute())
    left, right = (
      jax.tree.leaves(x) for x in (state.params, on_disk["params"])
    )
    for a, b in zip(left, right, strict=True):
      assert a.tobytes() == np.asarray(b).tobytes()
    assert {s.mesh.size for s in jax.tree.leaves(layout)} == {count}
  assert _rows(work) == _rows(straight / "run")
  metrics, expected = _metrics(work), _metrics(straight / "run")
  for step in range(1, 7):
    assert metrics[step] == pytest.approx(expected[step], abs=1e-4)


def test_another_batch_size_goes_on_with_the_next_example(
  micro_codes, tmp_path
):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  common = {"phases__train__steps": 6}
  with micro.devices(1):
    cfg = micro.config("pretrain", root, **common)
    loop.train(cfg, root / "run", stop_at=3, quiet=True)
    cfg = micro.config("pretrain", root, batch_size=4, **common)
    loop.train(cfg, root / "run", stop_at=4, quiet=True)
    cfg = micro.config("pretrain", root, batch_size=16, **common)
    loop.train(cfg, root / "run", quiet=True)
  rows = _rows(root / "run")
  first = [example for _, (_, example) in sorted(rows.items())]
  assert first == [0, 8, 16, 24, 28, 44]
  cfg = micro.config("pretrain", root, batch_size=4)
  batch = next(objectives.build(cfg).batches(6))  # examples 24 to 27
  assert rows[3][0] == batch_log.digests(batch).sum(dtype=np.uint32)


def test_rows_that_depend_on_their_batch_keep_its_size():
  meta = {"data": {"next_example": 80, "batch_size": 8}}
  same = data_position.resume(meta, 7, 8, batch_size_may_change=False)
  assert same.example(7) == 80
  assert (
    data_position.resume(meta, 7, 5, batch_size_may_change=True).example(8)
    == 85
  )
  with pytest.raises(errors.ConfigError, match=r"batch_size=5.*batches of 8"):
    data_position.resume(meta, 7, 5, batch_size_may_change=False)
  old = data_position.resume(
    {"data": {"next_batch": 7}}, 7, 8, batch_size_may_change=True
  )
  assert old.example(7) == 56


def test_a_digest_does_not_depend_on_how_rows_are_shared():
  rng = np.random.default_rng(0)
  batch = {"a": rng.integers(9, size=(8, 3)), "b": rng.normal(size=(8, 2))}
  part = lambda i, n: {k: v[i : i + n] for k, v in batch.items()}
  whole = batch_log.digests(batch)
  shared = [batch_log.digests(part(i, 2), [i, i + 1]) for i in range(0, 8, 2)]
  np.testing.assert_array_equal(whole, np.concatenate(shared))
  swapped = {k: v[[1, 0, *range(2, 8)]] for k, v in batch.items()}
  total = lambda x: batch_log.digests(x).sum(dtype=np.uint32)
  assert total(swapped) != total(batch)


_EIGHT = {"phases__train__steps": 8, "log__every": 1}


@pytest.fixture
def poisoned(monkeypatch):
  """Makes losses NaN where a batch has one of the rows that are set."""
  bad: set[int] = set()
  real = loop._Run._put

  def put(self, batch):
    hit = np.isin(batch["row"], sorted(bad))
    weights = np.where(hit[:, None], np.float32(np.nan), batch["weights"])
    return real(self, batch | {"weights": weights})

  monkeypatch.setattr(loop._Run, "_put", put)
  return bad


def _train(root, name, **nonfinite_fields):
  cfg = micro.config("pretrain", root, **_EIGHT)
  if nonfinite_fields:
    cfg.nonfinite = nonfinite_fields
  with micro.devices(1):
    loop.train(cfg, root / name, quiet=True)
  return root / name


def _params(workdir, step):
  folder = (workdir / "checkpoints" / str(step) / "state").absolute()
  return ocp.StandardCheckpointer().restore(folder)


def test_a_bad_step_is_skipped_and_counted(micro_codes, tmp_path, poisoned):
  """Parameters, moments and the rest stay; the step is left behind."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  poisoned.update({40, 50})  # of steps 5 and 6
  work = _train(root, "run", policy="skip", limit=2)
  skipped = _metrics(work, "skipped")
  assert [step for step, count in skipped.items() if count] == [6, 7]
  losses = _metrics(work)
  assert losses[6] is None
  rates = list(_metrics(work, "learning_rate").values())
  (phase,) = phases.phases_of(micro.config("pretrain", root, **_EIGHT))
  used = optimizer.lr_schedule(phase)(np.array([0, 1, 2, 3, 4, 5, 5, 5]))
  np.testing.assert_allclose(rates, used, rtol=1e-5)
  assert np.isfinite(losses[8])
  before, after = _params(work, 6), _params(work, 8)
  leaves = jax.tree.leaves(after)
  assert all(np.isfinite(x).all() for x in leaves)
  assert before["step"] == 6
  poisoned.clear()
  same = _train(root, "again", policy="skip", limit=2)
  assert not any(_metrics(same, "skipped").values())


def test_a_skipped_step_changes_nothing_but_the_count(
  micro_codes, tmp_path, poisoned
):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  poisoned.update({48, 56})  # of steps 6 and 7
  work = _train(root, "run", policy="skip", limit=2)
  before, after = _params(work, 6), _params(work, 8)
  assert (before.pop("step"), after.pop("step")) == (6, 8)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_too_many_bad_steps_in_a_row_stop_the_run(
  micro_codes, tmp_path, poisoned
):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  poisoned.update(range(24, 64))
  with pytest.raises(errors.LavitError, match="2 steps in a row") as caught:
    _train(root, "run", policy="skip", limit=1)
  assert "step 4" in str(caught.value)


def test_a_bad_step_rolls_the_run_back_and_its_batch_is_left_out(
  micro_codes, tmp_path, poisoned, caplog
):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  poisoned.add(43)  # of step 5; checkpoints come every 2 steps
  with caplog.at_level(logging.WARNING):
    work = _train(root, "run", policy="roll_back", limit=1)
  assert "not finite at step 5: it goes back to step 4" in caplog.text
  first = [example for _, (_, example) in sorted(_rows(work).items())]
  assert first == [0, 8, 16, 24, 48, 56, 64, 72]
  losses = _metrics(work)
  assert sorted(losses) == list(range(1, 9))
  assert all(np.isfinite(list(losses.values())))
  saved = run_checkpoints.RunCheckpoints(work / "checkpoints")
  assert saved.meta(8)["data"]["next_example"] == 80
  saved.close()


def test_rolling_back_has_a_limit(micro_codes, tmp_path, poisoned):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  poisoned.update(range(40, 400))
  with pytest.raises(errors.LavitError, match="later batches 2 times"):
    _train(root, "run", policy="roll_back", limit=2)


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"policy": "hope"}, "policy='hope'"),
    ({"policy": "skip"}, "limit=0"),
    ({"policy": "skip", "limit": -1}, "limit=-1"),
    ({"polcy": "skip"}, "polcy"),
  ],
)
def test_an_unknown_policy_is_refused(fields, says):
  with pytest.raises(errors.ConfigError, match=says):
    nonfinite.policy_of({"nonfinite": fields})
