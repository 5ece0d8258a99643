"""The time of a run by activity, useful FLOPs, and traces of chosen steps."""

import dataclasses

import jax
import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.cost import chips
from lavit_jax.train import loop, objectives
from lavit_jax.train.telemetry import flops, meter, tracing, writers
from tests import micro
from tests.train import processes

pytestmark = pytest.mark.slow


class _Clock:
  """A clock that the test sets forward."""

  def __init__(self, now=1000.0):
    self.now = now

  def __call__(self):
    return self.now

  def spend(self, measured, activity, seconds):
    measured.enter(activity)
    self.now += seconds


@pytest.fixture
def clock():
  return _Clock()


def _rows(workdir):
  return writers.read_json_lines(workdir / writers.GOODPUT)


def test_every_second_belongs_to_one_activity(clock, tmp_path):
  measured = meter.Meter(tmp_path, clock=clock, num_devices=4, num_shares=2)
  clock.spend(measured, "start", 10)
  clock.spend(measured, "compile", 5)
  for _ in range(4):
    clock.spend(measured, "data_wait", 1)
    clock.spend(measured, "step", 2)
    measured.count({}, 30)
  found = measured.rates()
  assert found["time/step_s"] == 2
  assert found["time/data_wait_s"] == 1
  assert found["time/compile_s"] == 5
  assert "time/evaluation_s" not in found
  assert found["tokens_per_second"] == 4 * 2 * 30 / 12
  assert found["tokens_per_second_per_chip"] == 4 * 2 * 30 / 12 / 4
  assert found["goodput"] == pytest.approx(8 / 27)
  assert "mfu" not in found  # no chip is known
  assert found["memory/host_gb"] > 0.05
  assert measured.rates() == {}
  clock.spend(measured, "evaluation", 7)
  clock.spend(measured, "step", 3)
  measured.count({}, 30)
  found = measured.rates()
  assert (found["time/evaluation_s"], found["time/step_s"]) == (7, 3)
  with pytest.raises(KeyError):
    measured.enter("lunch")


def test_mfu_is_of_all_devices_and_rates_are_of_a_chip(clock, tmp_path):
  """Eight devices of TPU7x are four chips."""
  chip = chips.CHIPS["tpu7x"]
  measured = meter.Meter(tmp_path, clock=clock, chip=chip, num_devices=8)
  measured._useful = lambda batch: 2307e12  # a chip's second
  clock.spend(measured, "step", 2)
  measured.count({}, 400)
  found = measured.rates()
  assert found["mfu"] == pytest.approx(1 / 2 / 4)
  assert found["tokens_per_second_per_chip"] == 400 / 2 / 4


def test_goodput_leaves_out_what_a_kill_lost(clock, tmp_path):
  first = meter.Meter(tmp_path, clock=clock)
  clock.spend(first, "step", 30)
  first.saved(10)
  clock.spend(first, "step", 20)
  first.saved(15)
  clock.spend(first, "step", 25)  # lost: the run is killed here
  clock.now += 25
  again = meter.Meter(tmp_path, resume_step=15, clock=clock)
  assert again.goodput == pytest.approx(50 / 100)
  clock.spend(again, "step", 100)
  assert again.goodput == pytest.approx(150 / 200)
  again.saved(20)
  again.close()
  row = _rows(tmp_path)[-1]
  assert (row["step"], row["kept_s"], row["starts"]) == (20, 150.0, 2)
  assert row["first_start"] == 1000.0
  # The checkpoint of step 15 is damaged: all after step 10 is done again.
  older = meter.Meter(tmp_path, resume_step=10, clock=clock)
  assert older.goodput == pytest.approx(30 / 200)
  older.close()
  assert _rows(tmp_path)[-1]["starts"] == 3


def test_only_one_process_writes(clock, tmp_path):
  meter.Meter(tmp_path, clock=clock, write=False).saved(3)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def one_device():
  with micro.one_device():
    yield


@pytest.mark.usefixtures("one_device")
def test_padding_is_not_useful(micro_codes):
  objective = objectives.build(micro.config("pretrain", micro_codes))
  phase, batch = objective.last_phase, next(objective.batches(0))
  count = meter.useful_flops(objective, phase)
  used = batch["segments"] > 0
  lengths = [
    (row == segment).sum()
    for row in batch["segments"]
    for segment in np.unique(row[row > 0])
  ]
  segment = sum(n * n for n in lengths) / sum(lengths)  # mean over tokens
  parts = flops.of_step(objective, phase, segment=segment)
  tokens, images = used.mean(), batch["keep"].any(-1).mean()
  assert 0.3 < tokens < 1
  assert 0 < images < 1
  by_hand = sum(
    value * (tokens if name in ("llm", "head") else images)
    for name, value in parts.items()
  )
  assert count(batch) == pytest.approx(by_hand)
  empty = batch | {
    "segments": np.zeros_like(batch["segments"]),
    "keep": np.zeros_like(batch["keep"]),
  }
  assert count(empty) == 0


@pytest.mark.usefixtures("one_device")
def test_a_run_writes_its_rates_and_goodput(micro_codes, tmp_path, monkeypatch):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  chip = dataclasses.replace(chips.CHIPS["v5e"], flops=1e12)
  monkeypatch.setattr(chips, "of_device", lambda _: chip)
  cfg = micro.config("pretrain", root, phases__train__steps=6)
  workdir = root / "pretrain"
  loop.train(cfg, workdir, stop_at=4, quiet=True)
  loop.train(cfg, workdir, quiet=True)
  rows = [
    row
    for row in writers.read_json_lines(workdir / "metrics.jsonl")
    if "time/step_s" in row
  ]
  assert [row["step"] for row in rows] == [2, 4, 6]
  for row in rows:
    assert 0 < row["mfu"] < 1
    assert 0 < row["goodput"] < 1
    assert row["tokens_per_second_per_chip"] == row["tokens_per_second"]
    assert row["memory/host_gb"] > 0
    assert 0 < row["learning_rate"] < 1.001 * cfg.phases.train.lr
  assert rows[0]["time/compile_s"] > 0
  kept = _rows(workdir)[-1]
  assert (kept["step"], kept["starts"]) == (6, 2)
  assert kept["kept_s"] > 0


def test_chosen_steps_are_traced(micro_codes, tmp_path):
  """In a process of its own: the profiler would ask a libtpu loaded here."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  steps = {"phases__train__steps": 4, "log__profile": (2, 3)}
  config = processes.write_config(root / "config.py", "pretrain", root, **steps)
  processes.run(1, config, root / "run")
  folder = root / "run" / tracing.FOLDER
  traces = [path for path in folder.rglob("*") if path.is_file()]
  assert any(path.name.endswith(".xplane.pb") for path in traces)


def test_a_trace_needs_two_steps_in_order(tmp_path):
  cfg = micro.config("encoder", tmp_path)
  cfg.log.profile = (5, 3)
  with pytest.raises(errors.ConfigError, match=r"log\.profile=\(5, 3\)"):
    tracing.Tracer(cfg, tmp_path)
  cfg.log.profile = ()
  tracer = tracing.Tracer(cfg, tmp_path)
  tracer.before(0)
  tracer.after(0, jax.numpy.zeros(()))
  tracer.close()
  assert not list(tmp_path.iterdir())
