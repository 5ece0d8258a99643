"""Several real processes on CPU devices, joined by `jax.distributed`."""

import signal
import time

import jax
import numpy as np
import pytest

from lavit_jax.core.storage import checkpoints
from lavit_jax.train import loop
from lavit_jax.train.resilience import run_checkpoints
from lavit_jax.train.telemetry import writers
from tests import micro
from tests.train import processes

pytestmark = pytest.mark.slow

_STEPS = 12
_SETTINGS = {"phases__train__steps": _STEPS, "log__every": 1}
_SPLIT = {"data": 1, "fsdp": -1, "context": 1, "tensor": 1}


def _rows(workdir):
  """The digest of the batch of each step."""
  rows = writers.read_json_lines(workdir / "batches.jsonl")
  return {row["step"]: (row["crc32"], row["example"]) for row in rows}


def _losses(workdir):
  rows = writers.read_json_lines(workdir / "metrics.jsonl")
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _held_out(workdir):
  rows = writers.read_json_lines(workdir / "metrics.jsonl")
  (row,) = [row for row in rows if "held_out/loss" in row]
  return row["held_out/loss"]


def _config(root, **overrides):
  settings = {**_SETTINGS, "mesh": _SPLIT}
  return processes.write_config(
    root / "config.py", "pretrain", root, **settings | overrides
  )


@pytest.fixture(scope="module")
def straight(micro_codes, tmp_path_factory):
  """The root of a run by one process that nothing disturbed."""
  (root,) = micro.branch(micro_codes, tmp_path_factory.mktemp("straight"), 1)
  with micro.one_device():
    cfg = micro.config("pretrain", root, **_SETTINGS)
    loop.train(cfg, root / "run", quiet=True)
  return root


def test_two_and_four_processes_with_a_kill_between_are_the_run_of_one(
  straight, micro_codes, tmp_path
):
  """Same rows to the byte and same losses to 1e-5, packed and mixed.

  Checkpoints are written by one number of processes and read by another, the
  parameters split among them.
  """
  (killed,) = micro.branch(micro_codes, tmp_path, 1)
  work = killed / "run"
  log = work / "batches.jsonl"
  config = _config(killed)
  with processes.running(2, config, work) as group:
    processes.until(log, 5, group)
  processes.run(4, config, work)
  assert _rows(work) == _rows(straight / "run")
  assert sorted(_rows(work)) == list(range(_STEPS))
  shared_losses, losses = _losses(work), _losses(straight / "run")
  assert sorted(shared_losses) == sorted(losses) == list(range(1, _STEPS + 1))
  for step, loss in shared_losses.items():
    assert loss == pytest.approx(losses[step], abs=1e-5)
  assert _held_out(work) == pytest.approx(_held_out(straight / "run"), abs=1e-5)
  assert len(list(work.glob("events.out.tfevents*"))) == 2  # one a start
  left, right = (
    checkpoints.load_part(root / "model", "llm").params
    for root in (straight, killed)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), left, right
  )


def test_processes_whose_devices_share_rows_read_the_same_ones(
  straight, micro_codes, tmp_path
):
  """A mesh whose `tensor` axis spans processes: each has all the rows."""
  (shared,) = micro.branch(micro_codes, tmp_path, 1)
  split = {"data": 1, "fsdp": 1, "context": 1, "tensor": -1}
  processes.run(2, _config(shared, mesh=split), shared / "run")
  assert _rows(shared / "run") == _rows(straight / "run")
  shared_losses, losses = _losses(shared / "run"), _losses(straight / "run")
  assert shared_losses == pytest.approx(losses, abs=1e-5)


def test_two_processes_begin_the_phases_of_a_tokenizer_as_one(
  micro_codes, tmp_path
):
  """Mean features and k-means are of whole batches, on two devices each."""
  one, two = micro.branch(micro_codes, tmp_path, 2)
  settings = {"schedule": ("random", "codes"), "log__every": 1}
  with micro.one_device():
    cfg = micro.config("tokenizer", one, **settings)
    loop.train(cfg, one / "run", quiet=True)
  config = processes.write_config(
    two / "config.py", "tokenizer", two, **settings
  )
  processes.run(2, config, two / "run", devices=2)
  assert _rows(two / "run") == _rows(one / "run")
  shared_losses, losses = _losses(two / "run"), _losses(one / "run")
  assert sorted(shared_losses) == [1, 2, 3, 4]
  for step, loss in shared_losses.items():
    assert loss == pytest.approx(losses[step], abs=1e-5)
  left, right = (
    checkpoints.load_part(root / "model", "tokenizer").params
    for root in (one, two)
  )
  np.testing.assert_allclose(
    left["feature_mean"], right["feature_mean"], atol=1e-5
  )
  np.testing.assert_allclose(
    left["codebook"]["codes"], right["codebook"]["codes"], atol=1e-3
  )


def test_a_notice_to_one_stops_all_and_a_death_of_one_ends_all(
  micro_codes, tmp_path
):
  """SIGTERM: the same step is saved by both. SIGKILL: the other says why."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  work = root / "run"
  log = work / "batches.jsonl"
  long = {"phases__train__steps": 100_000, "checkpoint__every": 100_000}
  config = _config(root, **long)
  with processes.running(2, config, work) as group:
    processes.until(log, 3, group)
    group.children[1].send_signal(signal.SIGTERM)
    assert group.wait(60) == [75, 75]
    assert "Give the same command again" in group.text(0)
  saved = run_checkpoints.RunCheckpoints(work / "checkpoints")
  step = saved.latest_step()
  assert step >= 3
  assert saved.meta(step)["data"]["next_example"] == 8 * step
  saved.close()
  assert sorted(_rows(work)) == list(range(step))
  for victim in (1, 0):
    log.unlink()
    with processes.running(2, config, work) as group:
      processes.until(log, 3, group)
      group.children[victim].kill()
      begun = time.monotonic()
      status = group.children[1 - victim].wait(60)
      assert time.monotonic() - begun < 60
      time.sleep(0.5)  # for the shell that has the last word
      last = group.text(1 - victim).strip().splitlines()[-1]
    assert status not in (0, 2, 75)
    assert "another process" in last
    assert "Give the same command" in last
