"""The loop: resume, kill, guards; every stage, at width 16."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.plugins.hparams import metadata as hparams

from lavit_jax.core import averages, errors, vocabulary
from lavit_jax.core.storage import checkpoints
from lavit_jax.train import loop, objectives
from lavit_jax.train import phases as phases_lib
from lavit_jax.train.objectives import evaluation
from lavit_jax.train.resilience import run_checkpoints
from lavit_jax.train.telemetry import batch_log, writers
from tests import micro
from tests.train import processes, sharding_test

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("shared_programs"),
]

_ROOT = pathlib.Path(__file__).parents[2]


def _crcs(workdir):
  rows = writers.read_json_lines(workdir / "batches.jsonl")
  return {row["step"]: row["crc32"] for row in rows}


def _assert_same_part(a, b, part):
  left = checkpoints.load_part(a / "model", part).params
  right = checkpoints.load_part(b / "model", part).params
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(autouse=True)
def _one_device():
  with micro.one_device():
    yield


_PART = {"tokenizer": "tokenizer", "pretrain": "llm"}


@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_resumed_equals_uninterrupted(stage, micro_codes, tmp_path):
  """Stopped at an odd step and resumed: the same weights and batches.

  Two of the tokenizer's four phases, with the seam that makes a codebook.
  """
  straight, again = micro.branch(micro_codes, tmp_path, 2)
  overrides = {
    "pretrain": {"phases__train__steps": 6},
    "tokenizer": {"schedule": ("random", "codes"), "phases__codes__steps": 4},
  }[stage]
  for root, stops in ((straight, [None]), (again, [3, None])):
    for stop in stops:
      cfg = micro.config(stage, root, **overrides)
      loop.train(cfg, root / stage, stop_at=stop, quiet=True)
  _assert_same_part(straight, again, _PART[stage])
  assert _crcs(straight / stage) == _crcs(again / stage)
  assert len(_crcs(straight / stage)) >= 6


@pytest.mark.slow
def test_sigkill_between_phases_loses_nothing(micro_codes, tmp_path):
  """A killed process, started again, ends bit-equal with the same batches.

  `kill_test.py` has more kills, of a stage with one phase.
  """
  straight, killed = micro.branch(micro_codes, tmp_path, 2)
  overrides = {
    "phases__random__steps": 40,
    "schedule": ("random", "codes"),  # two have a seam, four only take longer
  }
  log = killed / "run" / "batches.jsonl"
  with _child("tokenizer", killed, overrides) as child:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and child.poll() is None:
      if log.exists() and len(log.read_text().splitlines()) >= 11:
        break
      time.sleep(0.02)
    assert child.poll() is None, "the run ended before it could be killed"
    child.send_signal(signal.SIGKILL)
  with micro.one_device():
    for root in (killed, straight):
      cfg = micro.config("tokenizer", root, **overrides)
      loop.train(cfg, root / "run", quiet=True)
  _assert_same_part(straight, killed, "tokenizer")
  assert _crcs(straight / "run") == _crcs(killed / "run")
  assert len(_crcs(straight / "run")) >= 40


def test_sigterm_saves_the_step_it_comes_in_and_nothing_is_lost(
  micro_codes, tmp_path, monkeypatch
):
  """The notice comes between two checkpoints, as preemptions do."""
  straight, stopped = micro.branch(micro_codes, tmp_path, 2)
  overrides = {"phases__train__steps": 7, "checkpoint__every": 100}
  cfg = micro.config("pretrain", straight, **overrides)
  loop.train(cfg, straight / "run", quiet=True)
  cfg = micro.config("pretrain", stopped, **overrides)
  hashed, before = [], signal.getsignal(signal.SIGTERM)
  real = batch_log.BatchLog.add

  def notice(self, step, batch, example):
    hashed.append(step)
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    real(self, step, batch, example)

  monkeypatch.setattr(batch_log.BatchLog, "add", notice)
  with pytest.raises(errors.Preempted, match="step 3 is saved") as caught:
    loop.train(cfg, stopped / "run", quiet=True)
  assert caught.value.exit_status == 75
  assert hashed == [0, 1, 2]
  assert signal.getsignal(signal.SIGTERM) is before
  loop.train(cfg, stopped / "run", quiet=True)
  assert hashed == list(range(7))
  _assert_same_part(straight, stopped, "llm")
  assert _crcs(straight / "run") == _crcs(stopped / "run")


@contextlib.contextmanager
def _child(stage, root, overrides):
  """The same training in a process of its own, on one device; then none."""
  code = (
    "from tests import micro; from lavit_jax.train import loop;"
    f"cfg = micro.config({stage!r}, {str(root)!r}, **{overrides!r});"
    f"loop.train(cfg, {str(root / 'run')!r}, quiet=True)"
  )
  flags = {"XLA_FLAGS": processes.flags_for(1)}
  env = os.environ | {"PYTHONPATH": str(_ROOT)} | flags
  child = subprocess.Popen([sys.executable, "-c", code], cwd=_ROOT, env=env)
  try:
    yield child
  finally:
    child.kill()
    child.wait()


def test_a_finished_run_is_not_trained_again(micro_codes, tmp_path):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  cfg = micro.config("pretrain", root)
  loop.train(cfg, root / "pretrain", quiet=True)
  before = _crcs(root / "pretrain")
  metrics = loop.train(cfg, root / "pretrain", quiet=True)
  assert _crcs(root / "pretrain") == before
  assert np.isfinite(metrics["loss"])


def test_a_run_goes_on_from_the_llm_it_is_given(micro_runs, tmp_path):
  """With a learning rate of 0 it ends with the weights it started from."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  start = {"start_from": str(micro_runs / "model"), "seed": 7}
  cfg = micro.config("pretrain", root, phases__train__lr=0.0, **start)
  loop.train(cfg, root / "run", quiet=True)
  _assert_same_part(micro_runs, root, "llm")
  other = micro.config("pretrain", root, model__llm__mlp_dim=48, **start)
  with pytest.raises(errors.ConfigError, match=r"32 there, 48 here"):
    loop.train(other, root / "other", quiet=True)
  text_path = root / "model" / "tokenizer.model"
  vocabulary.TextTokenizer.train(
    ["a red ring", "a blue cross"] * 99, text_path, 280
  )
  cfg = micro.config("pretrain", root, data__text_vocab=280, **start)
  with pytest.raises(errors.CheckpointError, match="byte for byte"):
    loop.train(cfg, root / "text_path", quiet=True)


def test_a_start_without_a_merger_keeps_that_of_stage_1(micro_runs, tmp_path):
  """A plain LLaMA brings nothing that reads images."""
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  llm = checkpoints.load_part(micro_runs / "model", "llm").params["llm"]
  checkpoints.save_part(tmp_path / "start", "llm", {"llm": llm}, {})
  shutil.copy(root / "model" / "tokenizer.model", tmp_path / "start")
  start = str(tmp_path / "start")
  cfg = micro.config("pretrain", root, phases__train__lr=0.0, start_from=start)
  loop.train(cfg, root / "run", quiet=True)
  made = checkpoints.load_part(root / "model", "llm").params
  stage1 = checkpoints.load_part(root / "model", "tokenizer").params["params"]
  jax.tree.map(np.testing.assert_array_equal, made["llm"], llm)
  jax.tree.map(np.testing.assert_array_equal, made["merger"], stage1["merger"])


def test_a_workdir_of_another_config_is_refused(micro_codes, tmp_path):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  loop.train(micro.config("pretrain", root), root / "run", quiet=True)
  other = micro.config("pretrain", root, phases__train__lr=0.5)
  with pytest.raises(errors.ConfigError, match=r"phases.train.lr \(0.003"):
    loop.train(other, root / "run", quiet=True)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
  micro_codes, tmp_path
):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  cfg = micro.config(
    "pretrain",
    root,
    phases__train__lr=1e30,
    phases__train__steps=30,
    optimizer__clip_norm=1e30,
  )
  with pytest.raises(errors.LavitError, match="at step") as caught:
    loop.train(cfg, root / "run", quiet=True)
  assert "learning rate" in str(caught.value)
  saved = sorted((root / "run" / "checkpoints").glob("[0-9]*"))
  for folder in saved:
    run = run_checkpoints.RunCheckpoints(root / "run" / "checkpoints")
    assert run.meta(int(folder.name))["data"]["next_batch"] == int(folder.name)
    run.close()


def test_an_unknown_phase_and_stage_are_named():
  cfg = micro.config("encoder", "unused")
  cfg.schedule = ("train", "polish")
  with pytest.raises(errors.ConfigError, match="polish"):
    phases_lib.phases_of(cfg)
  cfg.stage = "dance"
  with pytest.raises(errors.ConfigError, match="dance"):
    objectives.build(cfg)


class _Number:
  """A number on a device: notes which steps had begun when it was read."""

  def __init__(self, value, step, began, read):
    self._value, self._step = value, step
    self._began, self._read = began, read

  def __array__(self, *unused, **settings):
    self._read.setdefault(self._step, len(self._began))
    return np.asarray(self._value, np.float32)

  def __float__(self):
    return float(self.__array__())


def test_a_step_is_read_when_the_next_has_begun_and_means_are_weighted(
  micro_codes, tmp_path, monkeypatch
):
  """Of seven steps, logged by threes, with 1, 2, 3 ... targets each."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  began, read = [], {}

  def step(state, frozen, batch):
    number = len(began)
    began.append(number)
    made = lambda value: _Number(value, number, began, read)
    count = number + 1
    metrics = {
      "loss": averages.mean(made(count * 10.0 * number), made(count)),
      "grad_norm": averages.mean(made(1.0), made(1.0)),
      "tokens": averages.Sum(made(count)),
      "visual_loss": averages.mean(made(0.0), made(0.0)),
    }
    return state.replace(step=state.step + 1), metrics

  monkeypatch.setattr(loop.step_lib, "jit_step", lambda *args: step)
  cfg = micro.config("pretrain", root, phases__train__steps=9, log__every=3)
  cfg.checkpoint.every = 100
  loop.train(cfg, root / "run", stop_at=7, quiet=True)
  due = {2, 5, 6}  # logged, or the last
  assert read == {k: k + 1 if k in due else k + 2 for k in range(7)}
  rows = writers.read_json_lines(root / "run" / "metrics.jsonl")
  found = {row["step"]: row for row in rows if "loss" in row}
  mean = lambda steps: (
    sum(10 * k * (k + 1) for k in steps) / sum(k + 1 for k in steps)
  )
  assert found[3]["loss"] == pytest.approx(mean([0, 1, 2]))
  assert found[6]["loss"] == pytest.approx(mean([3, 4, 5]))
  assert [found[step]["tokens"] for step in (3, 6, 7)] == [6, 15, 7]
  assert all("visual_loss" not in row for row in rows)  # there was none


class _Killed(BaseException):
  """As SIGKILL: nothing is saved."""


@pytest.mark.parametrize("end", ["preempted", "killed"])
def test_every_step_is_in_one_row_whatever_ends_the_run(
  end, tmp_path, monkeypatch
):
  """Logged by fives and saved by threes; it ends in the midst of both."""

  def step(state, frozen, batch):
    metrics = {
      "loss": averages.mean(jnp.float32(state.step), jnp.float32(1.0)),
      "grad_norm": averages.of_step(jnp.float32(1.0)),
      "tokens": averages.Sum(jnp.float32(1.0)),
    }
    return state.replace(step=state.step + 1), metrics

  real, ends = batch_log.BatchLog.add, [7]

  def notice(self, number, batch, example):
    if number in ends:
      ends.clear()
      if end == "killed":
        raise _Killed
      os.kill(os.getpid(), signal.SIGTERM)
    real(self, number, batch, example)

  monkeypatch.setattr(loop.step_lib, "jit_step", lambda *args: step)
  monkeypatch.setattr(batch_log.BatchLog, "add", notice)
  cfg = sharding_test.stage_config("autoencoder", tmp_path)
  cfg.log.every, cfg.checkpoint.every, cfg.eval.every = 5, 3, 100
  cfg.phases.train.steps = 20
  run = lambda: loop.train(cfg, tmp_path / "run", stop_at=16, quiet=True)
  with pytest.raises(_Killed if end == "killed" else errors.Preempted):
    run()
  run()
  rows = writers.read_json_lines(tmp_path / "run" / "metrics.jsonl")
  rows = [row for row in rows if "loss" in row]
  assert sum(row["tokens"] for row in rows) == 16
  assert sum(row["tokens"] * row["loss"] for row in rows) == sum(range(16))
  assert (8 in [row["step"] for row in rows]) == (end == "preempted")


def test_unknown_model_fields_name_the_nearest(micro_codes, tmp_path):
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  cfg = micro.config("tokenizer", root)
  cfg.model.tokenizer.quantizer.num_code = 3
  with pytest.raises(errors.ConfigError, match="did you mean 'num_codes'"):
    loop.train(cfg, root / "run", quiet=True)


def test_an_unknown_policy_is_refused_before_anything_is_written(tmp_path):
  cfg = micro.config("encoder", tmp_path, nonfinite__policy="foo")
  with pytest.raises(errors.ConfigError, match="policy='foo'"):
    loop.train(cfg, tmp_path / "run", quiet=True)
  assert not list(tmp_path.iterdir())


def test_metrics_are_in_json_lines_and_events(micro_runs):
  root = micro_runs / "pretrain"
  rows = writers.read_json_lines(root / "metrics.jsonl")
  assert any("text_loss" in row and "visual_loss" in row for row in rows)
  assert any("held_out/loss" in row for row in rows)
  assert all("step" in row for row in rows)
  (path, *_) = sorted(root.glob("events.out.tfevents*"))
  loaded = event_file_loader.EventFileLoader(str(path)).Load()
  (settings,) = (
    hparams.parse_session_start_info_plugin_data(data.content).hparams
    for event in loaded
    for value in event.summary.value
    if (data := value.metadata.plugin_data).plugin_name == "hparams"
  )
  assert settings["stage"].string_value == "pretrain"
  assert settings["phases.train.train.llm"].string_value == "llm"
  stored = json.loads((root / "config.json").read_text())
  assert stored["stage"] == "pretrain"


def test_a_result_that_is_not_finite_is_not_written(
  micro_codes, tmp_path, monkeypatch
):
  """As by weights that went wrong, or a checkpoint that was damaged."""
  (root,) = micro.branch(micro_codes, tmp_path, 1)
  cfg = micro.config("pretrain", root, phases__train__steps=2)
  loop.train(cfg, root / "work", quiet=True)
  shutil.rmtree(root / "model" / "llm")
  result = evaluation.Evaluation({"loss": float("nan")})
  monkeypatch.setattr(evaluation.Evaluator, "evaluate", lambda *unused: result)
  with pytest.raises(errors.LavitError, match="held-out loss of stage 'pretr"):
    loop.train(cfg, root / "work", quiet=True)
  assert "llm" not in checkpoints.parts_in(root / "model")


def test_a_part_of_another_run_is_named_before_it_is_replaced(
  micro_runs, tmp_path, caplog
):
  (root,) = micro.branch(micro_runs, tmp_path, 1)
  cfg = micro.config("pretrain", root, seed=5)
  loop.train(cfg, root / "other", stop_at=1, quiet=True)
  assert "has a part 'llm' that is not of this run" in caplog.text
  caplog.clear()
  loop.train(cfg, root / "other", stop_at=2, quiet=True)
  assert "not of this run" not in caplog.text  # it was said
