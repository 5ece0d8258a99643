"""The folder of compiled programs, and its limit."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from lavit_jax.core import compiled_programs

MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """Returns the settings that JAX gets, as they are made."""
  settings = {}
  monkeypatch.setattr(jax.config, "update", settings.__setitem__)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.delenv(MIN_SECONDS.upper(), raising=False)
  return settings


def test_programs_are_kept_in_the_users_cache_folder(settings, tmp_path):
  compiled_programs.keep()
  folder = tmp_path / "caches" / "lavit_jax" / "compiled"
  assert settings == {
    "jax_compilation_cache_dir": str(folder),
    MIN_SECONDS: 0.0,
  }
  assert folder.is_dir()
  settings.clear()
  compiled_programs.keep(least=None)
  assert MIN_SECONDS not in settings


def test_settings_of_jax_in_the_environment_take_precedence(
  settings, monkeypatch
):
  monkeypatch.setenv(MIN_SECONDS.upper(), "3")
  compiled_programs.keep()
  assert MIN_SECONDS not in settings
  settings.clear()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
  compiled_programs.keep()
  assert not settings


def test_no_programs_are_kept_in_a_folder_that_is_not_writable(
  settings, monkeypatch, tmp_path
):
  monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
  compiled_programs.keep()
  assert not settings
  monkeypatch.setattr(os, "access", lambda *unused: False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  compiled_programs.keep()
  assert not settings


def test_the_folder_stays_below_its_bound(settings, monkeypatch):
  compiled_programs.keep()
  folder = pathlib.Path(settings["jax_compilation_cache_dir"])
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
  outputs = [
    subprocess.run(
      [sys.executable, "-c", program],
      env=env,
      check=True,
      capture_output=True,
      text=True,
    ).stdout.split()
    for _ in range(2)
  ]
  assert outputs[0][0] == outputs[1][0]
  assert (int(outputs[0][1]), int(outputs[1][1]) > 0) == (0, True)


def test_little_work_is_compiled_quickly_unless_the_user_says(
  settings, monkeypatch
):
  name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
  monkeypatch.setenv(name, "0")
  compiled_programs.compile_quickly()
  assert not settings
  monkeypatch.delenv(name)
  compiled_programs.compile_quickly()
  assert settings == {name.lower(): True}
  settings.clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  compiled_programs.compile_quickly()
  assert not settings
