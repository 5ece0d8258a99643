"""Which libraries a run began with, and what is said when others go on."""

import logging

import pytest
from lavit_jax.configs.lavit_7b import pretrain

from lavit_jax.train import versions, workdir
from tests.train import fake_gcs


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
  if request.param == "disk":
    yield tmp_path / "run"
    return
  with fake_gcs.serving(monkeypatch):
    yield "gs://bucket/run"


def test_a_run_that_goes_on_with_other_versions_is_warned(
  folder, tmp_path, monkeypatch, caplog
):
  cfg = pretrain.get_config()
  cfg.model_dir = str(tmp_path / "model")
  first = {"jax": "0.10.2", "libtpu": "0.0.52", "torch": "2.13"}
  monkeypatch.setattr(versions, "installed", lambda: first)
  with caplog.at_level(logging.WARNING):
    path = workdir.check(cfg, folder) / "versions.txt"
    workdir.check(cfg, folder)
  assert not caplog.records
  kept = path.read_text()
  assert "\njax==0.10.2\nlibtpu==0.0.52\ntorch==2.13\n" in kept
  later = {"jax": "0.12.0", "libtpu": "0.0.52", "orbax": "1"}
  monkeypatch.setattr(versions, "installed", lambda: later)
  monkeypatch.setattr(versions, "_python", lambda: "3.99")
  for _ in range(2):  # every time, not only the first
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      workdir.check(cfg, folder)
    (record,) = caplog.records
    assert "jax 0.10.2, here 0.12.0" in record.getMessage()
    assert "here 3.99" in record.getMessage()
    assert str(path) in record.getMessage()
    for same in ("libtpu", "torch", "orbax"):
      assert f"{same} " not in record.getMessage()
  assert path.read_text() == kept


def test_a_file_of_another_form_ends_no_run(tmp_path, caplog):
  (tmp_path / "versions.txt").write_bytes(b"\xff==1\n-r x\n\njax==0.0.1\n")
  with caplog.at_level(logging.WARNING):
    (found,) = versions.check(tmp_path)
  assert found.startswith("jax 0.0.1, here ")


def test_what_is_installed_from_an_index_is_listed_without_paths():
  found = versions.installed()
  assert {"jax", "flax", "orbax-checkpoint", "numpy"} <= set(found)
  assert "lavit-jax" not in found
  for name, version in found.items():
    assert versions._LINE.fullmatch(f"{name}=={version}"), (name, version)
