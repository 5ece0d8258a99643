"""Commands that train: where programs are kept, and CPU devices."""

import jax
import pytest

from lavit_jax.commands import train


@pytest.fixture
def caches(monkeypatch, tmp_path):
  """Where programs are kept, as JAX is told."""
  told = []
  monkeypatch.setattr(jax.config, "update", lambda *given: told.append(given))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  for name in (
    "JAX_COMPILATION_CACHE_DIR",
    "LAVIT_DISTRIBUTED",
    "LAVIT_COORDINATOR",
  ):
    monkeypatch.delenv(name, raising=False)
  return told


def test_programs_are_kept_in_the_cache_of_the_user(caches, tmp_path):
  train.keep_compiled("runs/one")
  folder = str(tmp_path / "lavit_jax" / "compiled")
  assert caches == [("jax_compilation_cache_dir", folder)]


@pytest.mark.parametrize(
  "told", [("LAVIT_DISTRIBUTED", "1"), ("LAVIT_COORDINATOR", "host:1")]
)
def test_several_hosts_share_programs_in_the_workdir(caches, monkeypatch, told):
  monkeypatch.setenv(*told)
  train.keep_compiled("gs://bucket/run/")
  assert caches == [("jax_compilation_cache_dir", "gs://bucket/run/compiled")]


def test_a_cache_that_jax_was_told_of_is_used(caches, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  train.keep_compiled("runs/one")
  assert not caches


def test_help_says_where_programs_are_kept(capsys):
  assert train.train(["--help"]) == 0
  said = capsys.readouterr().out
  assert "JAX_COMPILATION_CACHE_DIR" in said
  assert "~/.cache/lavit_jax/compiled" in said
