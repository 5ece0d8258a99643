"""Writes that fail or are killed lose no complete checkpoint."""

import contextlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import lavit_jax
from lavit_jax.core import errors, sharding
from lavit_jax.core.storage import checkpoints
from lavit_jax.train.resilience import run_checkpoints

# Random numbers: what compresses well would fit below the limit.
_STATE = {
  "w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)), "float32")
}


@contextlib.contextmanager
def _full_disk(limit=1 << 18):
  """Makes writes past `limit` bytes of a file fail, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path):
  run = run_checkpoints.RunCheckpoints(tmp_path)
  run.save(1, _STATE, {"data": 1})
  run.wait()
  with _full_disk():
    run.save(2, {"w": _STATE["w"] + 1}, {"data": 2})
    with pytest.raises(errors.CheckpointError, match="Make room"):
      run.wait()
  run.close()

  again = run_checkpoints.RunCheckpoints(tmp_path)
  assert again.latest_step() == 1
  assert again.meta(1) == {"data": 1}
  restored = again.restore_newest(lambda _: _STATE)
  np.testing.assert_array_equal(restored.state["w"], _STATE["w"])
  again.save(2, _STATE, {"data": 2})
  again.close()
  assert again.latest_step() == 2


def test_a_full_disk_leaves_the_old_part(tmp_path):
  checkpoints.save_part(tmp_path, "llm", _STATE, {"step": 1})
  changed = {"w": _STATE["w"] + 1}
  named = pytest.raises(errors.CheckpointError, match="could not be written")
  with _full_disk(), named:
    checkpoints.save_part(tmp_path, "llm", changed, {"step": 2})
  part = checkpoints.load_part(tmp_path, "llm")
  assert part.meta["step"] == 1
  np.testing.assert_array_equal(part.params["w"], _STATE["w"])


_PACKAGE = pathlib.Path(lavit_jax.__file__).parent


def _killing(monkeypatch, moment):
  """Each change of a file or folder by our code, and each save, may be last.

  Not those within Orbax: its threads would wait for the dead for minutes.
  """

  def watched(method):
    def call(*args, **kwargs):
      caller = sys._getframe(1).f_code.co_filename
      if pathlib.PurePath(caller).is_relative_to(_PACKAGE):
        moment()
      return method(*args, **kwargs)

    return call

  def save(self, path, *args, **kwargs):
    unfinished = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
    unfinished.mkdir()
    moment()
    unfinished.rmdir()
    return whole_save(self, path, *args, **kwargs)

  whole_save = ocp.StandardCheckpointer.save
  monkeypatch.setattr(ocp.StandardCheckpointer, "save", save)
  kind = type(epath.Path("/"))
  changes = ["rename", "replace", "rmtree", "unlink", "write_bytes", "mkdir"]
  for name in changes:
    monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
  for owner in (pathlib.Path, shutil, os):
    for name in {"write_text", *changes} & set(dir(owner)):
      monkeypatch.setattr(owner, name, watched(getattr(owner, name)))


def test_a_kill_at_any_moment_leaves_the_old_part_or_the_new_one(
  tmp_path, monkeypatch
):
  """At each moment in turn; then it is made again."""
  seen, limit = 0, 0

  def moment():
    nonlocal seen
    seen += 1
    if seen == limit:
      raise KeyboardInterrupt

  _killing(monkeypatch, moment)
  last = 0
  for limit in itertools.count():  # 0: not at all
    seen, killed = 0, False
    try:
      tree = {"w": np.full(3, limit)}
      checkpoints.save_part(tmp_path, "llm", tree, {"step": limit})
    except KeyboardInterrupt:
      killed = True
    part = checkpoints.load_part(tmp_path, "llm")
    assert part.meta["step"] in (last, limit)
    last = part.meta["step"]
    np.testing.assert_array_equal(part.params["w"], np.full(3, last))
    if limit and not killed:
      break
  assert limit > 4
  left = {path.name for path in (tmp_path / "llm").iterdir()}
  assert len(left) == 2, left  # part.json and its weights, no remains


def test_part_json_cannot_name_weights_outside_of_the_part(tmp_path):
  checkpoints.save_part(tmp_path, "llm", {"w": np.zeros(3)}, {})
  path = tmp_path / "llm" / "part.json"
  path.write_text(json.dumps({"format": 1, "weights": "../../elsewhere"}))
  with pytest.raises(errors.CheckpointError, match="expected one of weights"):
    checkpoints.load_part(tmp_path, "llm")


def _read_some(folder):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  w = jax.ShapeDtypeStruct((300, 300), np.float32, sharding=here)
  return checkpoints.load_arrays(folder, "llm", {"w": w})


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize(
  "read",
  [
    lambda folder: checkpoints.load_part(folder, "llm"),
    lambda folder: checkpoints.StoredPart(folder, "llm").read("w"),
    _read_some,
  ],
  ids=["whole", "one by one", "some"],
)
def test_truncated_and_missing_arrays_are_reported(tmp_path, damage, read):
  rng = np.random.default_rng(0)
  w = rng.standard_normal((300, 300)).astype(np.float32)
  checkpoints.save_part(tmp_path, "llm", {"w": w}, {})
  files = [x for x in (tmp_path / "llm").rglob("*") if x.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  if damage == "gone":
    largest.unlink()
  else:
    largest.write_bytes(largest.read_bytes()[:1000])
  with pytest.raises(errors.CheckpointError, match="damaged or incomplete"):
    read(tmp_path)


_DAMAGES = {
  "cut": lambda text: text[: len(text) // 2],
  "empty": lambda text: "",
  "a list": lambda text: "[]",
  "no text": lambda text: "\udcff\udcfe",
  "elsewhere": lambda text: '{"format": 1, "weights": "../../elsewhere"}',
}


@pytest.mark.parametrize("damage", _DAMAGES)
@pytest.mark.parametrize("saves", [1, 2])
def test_a_damaged_part_is_written_over(tmp_path, damage, saves):
  """Whichever of the two folders its weights are in."""
  for step in range(saves):
    checkpoints.save_part(tmp_path, "llm", {"w": np.zeros(3)}, {"step": step})
  path = tmp_path / "llm" / "part.json"
  text = _DAMAGES[damage](path.read_text())
  path.write_text(text, errors="surrogateescape")
  with pytest.raises(errors.CheckpointError, match=r"part\.json"):
    checkpoints.load_part(tmp_path, "llm")
  checkpoints.save_part(tmp_path, "llm", {"w": np.ones(3)}, {"step": 7})
  part = checkpoints.load_part(tmp_path, "llm")
  assert part.meta["step"] == 7
  np.testing.assert_array_equal(part.params["w"], np.ones(3))
  assert len(list((tmp_path / "llm").iterdir())) == 2  # no remains


@pytest.mark.parametrize("kind", [errors.CheckpointError, errors.UsageError])
def test_an_error_with_its_own_advice_is_not_called_a_full_disk(kind):
  with pytest.raises(kind) as caught, checkpoints.writing("there"):
    raise kind("Make the part again.")
  assert str(caught.value) == "Make the part again."


_LOSING = "*?[\\"


@pytest.mark.parametrize("name", ["out[1]", "[0:3]", *_LOSING])
@pytest.mark.parametrize("above", [False, True])
def test_folder_names_that_would_lose_arrays_are_refused(tmp_path, name, above):
  folder = tmp_path / name / "below" if above else tmp_path / name
  refused = pytest.raises(errors.CheckpointError, match="in its name")
  with refused:
    checkpoints.save_part(folder, "llm", {"w": np.zeros(3)}, {})
  with refused:
    run_checkpoints.RunCheckpoints(folder)
  assert not list(tmp_path.iterdir())


def test_all_other_folder_names_keep_their_arrays(tmp_path):
  """Every other sign of a keyboard; a folder of any name that is complete."""
  name = "".join(c for c in string.printable if c not in _LOSING + "/\r\n")
  folder = tmp_path / f"é 画{name}"
  arrays = {"w": np.arange(3.0, dtype="float32")}
  checkpoints.save_part(folder, "llm", arrays, {})
  for moved in (folder, tmp_path / "out[1]"):
    folder = folder.rename(moved)
    found = checkpoints.load_part(folder, "llm").params["w"]
    np.testing.assert_array_equal(found, arrays["w"])
    stored = checkpoints.StoredPart(folder, "llm")
    np.testing.assert_array_equal(stored.read("w"), arrays["w"])
  for lost in ("a\\b", "**"):
    folder = folder.rename(tmp_path / lost)
    with pytest.raises(errors.CheckpointError, match="rename this one"):
      checkpoints.load_part(folder, "llm")


def test_a_half_precision_part_is_read_within_the_mesh_of_a_run(tmp_path):
  tree = {"a": jnp.arange(6.0), "n": jnp.arange(3)}
  checkpoints.save_part(tmp_path, "llm", tree, {}, dtype=jnp.float16)
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
  with sharding.use(mesh):
    found = checkpoints.load_part(tmp_path, "llm").params
    stored = checkpoints.load_part(tmp_path, "llm", dtype=None).params
  assert found["a"].dtype == jnp.float32
  assert found["n"].dtype == stored["n"].dtype == tree["n"].dtype
  assert stored["a"].dtype == jnp.float16
  np.testing.assert_array_equal(found["a"], tree["a"])
