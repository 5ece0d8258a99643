"""Damage to the newest checkpoint costs the steps since the one before."""

import logging
import shutil
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lavit_jax.core import errors
from lavit_jax.train.resilience import run_checkpoints

_ABSTRACT = {"w": jax.ShapeDtypeStruct((64, 64), np.float32)}


def _state(step):
  rng = np.random.default_rng(step)
  return {"w": rng.normal(size=(64, 64)).astype("float32")}


def _place(abstract):
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), abstract
  )


def _saved(folder, steps=(1, 2, 3)):
  run = run_checkpoints.RunCheckpoints(folder, keep=3)
  for step in steps:
    run.save(step, _state(step), {"data": step}, {"loss": 1.0 / step})
  run.close()
  return folder


def _newest(folder, **kwargs):
  run = run_checkpoints.RunCheckpoints(folder, keep=3)
  try:
    return run.restore_newest(lambda step: _place(_ABSTRACT), **kwargs)
  finally:
    run.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return _saved(tmp_path_factory.mktemp("whole") / "checkpoints")


def _files(folder):
  return sorted(
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.is_file()
  )


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
@pytest.mark.parametrize("sealed", [True, False])
def test_any_damaged_file_is_noticed(whole, tmp_path, caplog, damage, sealed):
  """Each file in turn; without the list of sizes those that are needed."""
  names = [n for n in _files(whole / "3") if n != "files.json"]
  unnoticed = []
  for number, name in enumerate(names):
    folder = tmp_path / str(number) / "checkpoints"
    shutil.copytree(whole, folder)
    victim = folder / "3" / name
    size = victim.stat().st_size
    if not size:
      continue
    if not sealed:
      (folder / "3" / "files.json").unlink()
    if damage == "gone":
      victim.unlink()
    else:
      victim.write_bytes(victim.read_bytes()[: damage == "cut" and size // 2])
    with caplog.at_level(logging.WARNING):
      found = _newest(folder)
    assert found.meta == {"data": found.step}
    want = _state(found.step)["w"]
    np.testing.assert_array_equal(found.state["w"], want)
    if found.step == 3:
      unnoticed.append(name)
      continue
    assert f"{folder / '3'} is damaged" in caplog.text
    # It is out of the way, and not deleted.
    assert not (folder / "3").exists()
    (kept,) = (folder.parent / "damaged").iterdir()
    assert kept.name.startswith("checkpoints-3-")
  assert len(unnoticed) <= (0 if sealed else len(names) - 4)


def test_a_step_that_was_damaged_is_saved_again(whole, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(whole, folder)
  (folder / "3" / "meta" / "metadata").write_text("")
  run = run_checkpoints.RunCheckpoints(folder, keep=3)
  assert run.restore_newest(lambda step: _place(_ABSTRACT)).step == 2
  run.save(3, _state(33), {"data": 33})
  run.close()
  found = _newest(folder)
  assert found.step == 3
  np.testing.assert_array_equal(found.state["w"], _state(33)["w"])


def test_where_all_are_damaged_all_are_named_and_none_is_touched(
  whole, tmp_path
):
  folder = tmp_path / "checkpoints"
  shutil.copytree(whole, folder)
  for step in (1, 2, 3):
    (folder / str(step) / "meta" / "metadata").write_text("")
  before = _files(folder)
  with pytest.raises(errors.CheckpointError, match=r"3: .*2: .*1: ") as caught:
    _newest(folder)
  assert "Nothing was deleted" in str(caught.value)
  assert _files(folder) == before
  assert not (tmp_path / "damaged").exists()


def test_another_model_is_no_damage(whole):
  run = run_checkpoints.RunCheckpoints(whole, keep=3)
  other = {"w": jax.ShapeDtypeStruct((64, 32), np.float32)}
  with pytest.raises(errors.CheckpointError, match="does not fit the model"):
    run.restore_newest(lambda step: _place(other))
  run.close()
  assert (whole / "3").exists()


_NAN = float("nan")


def _model_of_keeping(losses, keep, sign=1):
  """Which steps are to be left: the last `keep`, and the best of all so far."""
  left = []
  for step in range(1, len(losses) + 1):
    left.append(step)
    finite = [s for s in left if np.isfinite(losses[s - 1])]
    best = min(finite, key=lambda s: (sign * losses[s - 1], -s), default=None)
    left = [s for s in left if s in left[-keep:] or s == best]
  return left


@pytest.mark.parametrize(
  "losses",
  [
    [None] * 7,
    [None, 0.5, None, None, 0.4, None, None, None],
    [None, 0.3, None, None, 0.4, None, None, None],
    [1.0, _NAN, 2.0, 3.0],
    [_NAN, 1.0, _NAN, None, _NAN, None],
    [float("-inf"), 1.0, float("inf"), 2.0, None, None],
    [_NAN] * 5,
  ],
)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_last_ones_and_the_best_one_are_kept(tmp_path, losses, mode):
  """Evaluated or not, finite or not, and over a restart of the run."""

  def opened():
    folder = tmp_path / "checkpoints"
    return run_checkpoints.RunCheckpoints(folder, keep=2, best_mode=mode)

  run = opened()
  for step, loss in enumerate(losses, start=1):
    metrics = None if loss is None else {"loss": loss, "other": -step}
    run.save(step, {"w": np.zeros(2)}, {"data": {}}, metrics)
    if step % 3 == 1:
      run.close()
      run = opened()
  run.close()
  found = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  numbers = [_NAN if loss is None else loss for loss in losses]
  sign = 1 if mode == "min" else -1
  assert found == _model_of_keeping(numbers, keep=2, sign=sign)


def _as_before(folder, losses):
  """Checkpoints whose metrics Orbax kept, as earlier versions wrote them."""
  options = ocp.CheckpointManagerOptions(
    best_fn=lambda metrics: -metrics["loss"], max_to_keep=None
  )
  with ocp.CheckpointManager(
    folder, options=options, item_names=("state", "meta")
  ) as manager:
    for step, loss in enumerate(losses, start=1):
      args = ocp.args.Composite(
        state=ocp.args.StandardSave(_state(step)),
        meta=ocp.args.JsonSave({"data": step}),
      )
      manager.save(step, args=args, metrics={"loss": loss}, force=True)


@pytest.mark.parametrize("damage", [None, "gone", "[1]"])
def test_the_best_of_a_run_begun_by_an_earlier_version_is_kept(
  tmp_path, damage
):
  folder = tmp_path / "checkpoints"
  _as_before(folder, [2.0, 1.0, 3.0, 3.0])
  stored = folder / "2" / "metrics" / "metrics"
  if damage == "gone":
    shutil.rmtree(stored.parent)
  elif damage:
    stored.write_text(damage)
  run = run_checkpoints.RunCheckpoints(folder, keep=1)
  run.save(5, _state(5), {"data": 5}, {"loss": 2.5})
  run.close()
  found = sorted(int(p.name) for p in folder.iterdir())
  assert found == ([1, 5] if damage else [2, 5])


def test_training_waits_for_no_list_of_files(tmp_path, monkeypatch):
  """Sizes are asked for by a thread, and before anything is removed."""
  sizes, askers, slow = run_checkpoints.sizes, [], threading.Event()

  def asked(folder):
    askers.append(threading.current_thread())
    slow.wait(0.2)
    return sizes(folder)

  monkeypatch.setattr(run_checkpoints, "sizes", asked)
  folder = tmp_path / "checkpoints"
  run = run_checkpoints.RunCheckpoints(folder, keep=1)
  for step in (1, 2, 3):
    run.save(step, _state(step), {"data": step})
    run._manager.wait_until_finished()
    start = time.monotonic()
    run.seal()
    assert time.monotonic() - start < 0.1
  run.close()
  assert len(askers) == 3
  assert threading.main_thread() not in askers
  assert [path.name for path in folder.iterdir()] == ["3"]
  assert (folder / "3" / "files.json").exists()


@pytest.mark.parametrize(
  "error", [OSError("503"), RuntimeError("Session is closed")]
)
def test_a_list_of_files_that_cannot_be_made_ends_no_run(
  tmp_path, monkeypatch, caplog, error
):
  """A checkpoint without one is as good; loop calls `seal` at every step."""

  def refused(folder):
    raise error

  monkeypatch.setattr(run_checkpoints, "sizes", refused)
  folder = tmp_path / "checkpoints"
  run = run_checkpoints.RunCheckpoints(folder, keep=2)
  with caplog.at_level(logging.WARNING):
    run.save(1, _state(1), {"data": 1})
    run._manager.wait_until_finished()
    run.seal()
    run.save(2, _state(2), {"data": 2})
    run.wait()
    run.close()
  assert caplog.text.count(f"files.json: {type(error).__name__}: {error}") == 2
  assert not list(folder.rglob("files.json"))
  assert _newest(folder).step == 2


@pytest.mark.parametrize("keep", [0, -1])
def test_a_run_keeps_at_least_one_checkpoint(tmp_path, keep):
  with pytest.raises(errors.ConfigError, match=f"checkpoint.keep={keep}"):
    run_checkpoints.RunCheckpoints(tmp_path / "checkpoints", keep=keep)
  assert not list(tmp_path.iterdir())


def test_a_new_run_has_no_checkpoint(tmp_path):
  assert _newest(tmp_path / "checkpoints") is None
