"""Runs whose workdir is in Google Cloud Storage: one of this process."""

import jax
import numpy as np
import pytest
from etils import epath

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.evaluate.report import run_page
from lavit_jax.train import loop
from lavit_jax.train.resilience import run_checkpoints, workdir
from lavit_jax.train.telemetry import writers
from tests import micro
from tests.train import fake_gcs

pytestmark = [
  pytest.mark.slow,
  pytest.mark.usefixtures("shared_programs"),
]


@pytest.fixture
def store(monkeypatch):
  with fake_gcs.serving(monkeypatch) as fs:
    yield fs


def _checkpoints(folder):
  return run_checkpoints.RunCheckpoints(folder, keep=2)


def _objects(store, folder):
  """Contents of all objects below a folder, by their names there."""
  start = "/" + folder.removeprefix("gs://") + "/"
  return {
    name.removeprefix(start): store.cat(name)
    for name in store.store
    if name.startswith(start)
  }


def test_checkpoints_are_saved_checked_and_restored(store):
  folder = "gs://bucket/run/checkpoints"
  run = _checkpoints(folder)
  for step in (1, 2, 3):
    state = {"w": np.full(8, step, "float32")}
    run.save(step, state, {"data": step}, {"loss": 1.0 / step})
  run.close()
  aside = "gs://bucket/run/damaged"
  assert not store.exists(aside)
  names = {p.name for p in epath.Path(folder).iterdir()}
  assert names == {"2", "3"}
  damaged = epath.Path(folder) / "3" / "meta" / "metadata"
  damaged.write_bytes(b"")
  before = _objects(store, f"{folder}/3")
  run = _checkpoints(folder)
  found = run.restore_newest(lambda step: {"w": np.zeros(8, "float32")})
  assert (found.step, found.meta) == (2, {"data": 2})
  np.testing.assert_array_equal(found.state["w"], np.full(8, 2.0))
  run.save(3, {"w": np.full(8, 33.0, "float32")}, {"data": 33})
  run.close()
  assert _checkpoints(folder).meta(3) == {"data": 33}
  (moved,) = (p for p in epath.Path(aside).iterdir() if p.is_dir())
  assert _objects(store, str(moved)) == before


def test_a_run_in_the_store_is_the_run_on_a_disk(
  store, micro_codes, tmp_path, monkeypatch
):
  """Its model directory and code caches too."""
  monkeypatch.setenv("LAVIT_FETCHED", str(tmp_path / "fetched"))
  here, there = micro.branch(micro_codes, tmp_path, 2)
  work, away = "gs://bucket/runs/one", "gs://bucket/there"
  fake_gcs.upload(store, there, away)
  with micro.one_device():
    cfg = micro.config("pretrain", here)
    loop.train(cfg, here / "run", quiet=True)
    for stop in (1, None):
      cfg = micro.config("pretrain", there)
      cfg.model_dir = f"{away}/model"
      cfg.data.cache_dir = f"{away}/codes/train"
      cfg.data.held_out_cache_dir = f"{away}/codes/held_out"
      loop.train(cfg, work, stop_at=stop, quiet=True)
  crcs = [
    {row["step"]: row["crc32"] for row in writers.read_json_lines(path)}
    for path in (here / "run/batches.jsonl", f"{work}/batches.jsonl")
  ]
  assert crcs[0] == crcs[1]
  assert len(crcs[0]) == 2
  assert store.exists(f"{work}/config.json")
  assert len(store.glob(f"{work}/events.out.tfevents*")) == 2
  losses = [
    [
      row["held_out/loss"]
      for row in writers.read_json_lines(path)
      if len(row) and "held_out/loss" in row
    ]
    for path in (here / "run/metrics.jsonl", f"{work}/metrics.jsonl")
  ]
  assert losses[0] == losses[1][-1:]
  remote = checkpoints.load_part(f"{away}/model", "llm")
  local = checkpoints.load_part(here / "model", "llm")
  assert remote.meta["step"] == local.meta["step"]
  jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)
  found = run_page.report(epath.Path(work))  # `lavit report gs://…`
  assert found.facts["step"] == 2
  assert {"Checkpoints", "Config"} <= {s.title for s in found.sections}


def test_other_stores_and_missing_packages_are_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  cfg = micro.config("encoder", "unused")
  with pytest.raises(errors.ConfigError, match=r"s3://bucket/run.*gs://BUCKET"):
    workdir.check(cfg, "s3://bucket/run")

  def missing(self):
    raise ImportError("gcsfs")

  monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", missing)
  with pytest.raises(errors.ConfigError, match=r"lavit_jax\[gcs\]"):
    workdir.check(cfg, "gs://bucket/run")
  assert not list(tmp_path.iterdir())
