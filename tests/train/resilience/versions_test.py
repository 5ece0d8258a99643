"""Which libraries a run began with, and what is said when others go on."""

import logging
from importlib import metadata

import pytest
from lavit_jax.configs.lavit_7b import pretrain

from lavit_jax.core.storage import files
from lavit_jax.train.resilience import versions, workdir
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
    path = workdir.claim(cfg, folder) / "versions.txt"
    workdir.claim(cfg, folder)
  assert not caplog.records
  kept = path.read_text()
  assert "\njax==0.10.2\nlibtpu==0.0.52\ntorch==2.13\n" in kept
  later = {"jax": "0.12.0", "libtpu": "0.0.52", "orbax": "1"}
  monkeypatch.setattr(versions, "installed", lambda: later)
  monkeypatch.setattr(versions, "_python", lambda: "3.99")
  for _ in range(2):  # every time, not only the first
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      workdir.claim(cfg, folder)
    (record,) = caplog.records
    assert "jax 0.10.2, here 0.12.0" in record.getMessage()
    assert "here 3.99" in record.getMessage()
    assert str(path) in record.getMessage()
    way = f"pip install -c {path} "
    if files.is_remote(path):  # which pip cannot read
      way = f"gcloud storage cp {path} . && pip install -c versions.txt "
    assert way in record.getMessage()
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
  assert "lavit-jax" in versions.unpinned()
  for name, version in found.items():
    assert versions._LINE.fullmatch(f"{name}=={version}"), (name, version)


_SOURCES = {  # as PEP 610 has them in direct_url.json
  "plain": "",
  "conda": '{"url": "file:///home/feedstock_root/work", "dir_info": {}}',
  "wheel": '{"url": "https://x/wheel-1-py3-none-any.whl", "archive_info": {}}',
  "editable": '{"url": "file:///home/me", "dir_info": {"editable": true}}',
  "git": '{"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "0"}}',
  "broken": "{",
}


@pytest.fixture
def forget():
  """Forgets what was found installed, which a process looks for once."""
  yield versions._distributions.cache_clear
  versions._distributions.cache_clear()


def test_only_what_no_index_has_is_kept_from_pip(tmp_path, monkeypatch, forget):
  """But all is noted and compared."""

  def put(version):
    for name, text in [*_SOURCES.items(), ("Lavit_JAX", "")]:
      info = tmp_path / "site" / f"{name}.dist-info"
      info.mkdir(parents=True, exist_ok=True)
      (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
      )
      if text:
        (info / "direct_url.json").write_text(text)
    forget()

  found = lambda: metadata.MetadataPathFinder.find_distributions(
    metadata.DistributionFinder.Context(path=[str(tmp_path / "site")])
  )
  monkeypatch.setattr(versions.metadata, "distributions", found)
  put("1.0+local")
  assert versions.check(tmp_path) == []
  lines = (tmp_path / "versions.txt").read_text().splitlines()
  pinned = {line for line in lines if not line.startswith("#")}
  assert pinned == {"plain==1.0", "conda==1.0", "wheel==1.0"}
  put("2.0")
  wanted = {*_SOURCES, "lavit-jax"}
  changed = {f"{name} 1.0, here 2.0" for name in wanted}
  assert set(versions.check(tmp_path)) == changed
