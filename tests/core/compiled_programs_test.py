"""Where compiled programs are kept, and how many of them."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from lavit_jax.core import compiled_programs

LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def told(monkeypatch, tmp_path):
  """What JAX is told."""
  told = {}
  monkeypatch.setattr(jax.config, "update", told.__setitem__)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv(LEAST.upper(), raising=False)
  return told


def test_programs_are_kept_in_a_folder_of_the_user(told, tmp_path):
  compiled_programs.keep()
  folder = tmp_path / "caches" / "lavit_jax" / "compiled"
  assert told == {"jax_compilation_cache_dir": str(folder), LEAST: 0.0}
  assert folder.is_dir()
  told.clear()
  compiled_programs.keep(least=None)
  assert LEAST not in told


def test_what_jax_was_told_is_left(told, monkeypatch):
  monkeypatch.setenv(LEAST.upper(), "3")
  compiled_programs.keep()
  assert LEAST not in told
  told.clear()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  compiled_programs.keep()
  assert not told


def test_where_nothing_can_be_written_nothing_is_kept(told, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
  compiled_programs.keep()
  assert not told
  monkeypatch.setattr(os, "access", lambda *unused: False)
  monkeypatch.setenv("XDG_CACHE_HOME", "/tmp")
  compiled_programs.keep()
  assert not told


def test_the_folder_stays_below_its_bound(told, monkeypatch):
  compiled_programs.keep()
  folder = pathlib.Path(told["jax_compilation_cache_dir"])
  for i in range(6):
    for end in ("-cache", "-atime"):
      path = folder / f"jit_f-{i}{end}"
      path.write_bytes(b"x" * (100 if end == "-cache" else 8))
      os.utime(path, (1000 + i, 1000 + i))
  (folder / "other").write_bytes(b"x" * 1000)
  monkeypatch.setattr(compiled_programs, "LIMIT", 350)
  compiled_programs.keep()
  left = sorted(path.name for path in folder.iterdir())
  kept = [f"jit_f-{i}{end}" for i in (3, 4, 5) for end in ("-atime", "-cache")]
  assert left == [*kept, "other"]


def test_a_second_process_compiles_nothing(tmp_path):
  program = """
import jax, jax.numpy as jnp
from lavit_jax.core import compiled_programs
compiled_programs.keep(least=0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name))
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()))
print(sum(name.endswith("cache_hits") for name in hits))
"""
  env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
  for name in (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
  ):
    env.pop(name, None)
  said = [
    subprocess.run(
      [sys.executable, "-c", program],
      env=env,
      check=True,
      capture_output=True,
      text=True,
    ).stdout.split()
    for _ in range(2)
  ]
  assert said[0][0] == said[1][0]
  assert (int(said[0][1]), int(said[1][1]) > 0) == (0, True)
