"""Keeps compiled programs between commands, in a cache folder of the user.

Compiling the programs of an image or a training step takes seconds to minutes,
and gives the same result at every call. Old programs are removed when a command
starts. JAX's own limit, `jax_compilation_cache_max_size`, is not used: it needs
the package filelock, and fails on entries that were written without it.
"""

import os
import pathlib

from etils import epy

from lavit_jax.core.storage import files

with epy.lazy_imports():
  import jax

LIMIT = 1 << 30  # bytes; a starting command removes what exceeds them
MIN_SECONDS = 0.0  # compile time from which on inference keeps a program
HELP = """\
Compiled programs are kept in ~/.cache/lavit_jax/compiled (at most about 1 GB;
XDG_CACHE_HOME moves it), or where JAX_COMPILATION_CACHE_DIR says;
JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
"""
_PROGRAM, _LAST_USE = "-cache", "-atime"  # suffixes of JAX's file names
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def user_folder() -> pathlib.Path:
  """Returns the folder of the user's programs."""
  return files.user_cache("compiled")


def keep(least: float | None = MIN_SECONDS) -> None:
  """Keeps the programs that this process compiles.

  Environment variables of JAX that configure its cache take precedence. No
  programs are kept if the folder is not writable, as in a read-only home.

  Args:
    least: seconds of compilation from which on a program is kept; None leaves
      it to JAX (1).
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = user_folder()
  if not _is_writable(folder):
    return
  _prune(folder, LIMIT)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if least is not None and _MIN_SECONDS.upper() not in os.environ:
    jax.config.update(_MIN_SECONDS, least)


def keep_none() -> None:
  """Keeps no program of this process, and reads none that was kept."""
  jax.config.update("jax_enable_compilation_cache", False)


def compile_quickly() -> None:
  """Compiles with few optimizations from here on, on a CPU.

  It takes two fifths of the time, and programs run a third as fast: for little
  work (docs/benchmarks.md). JAX_DISABLE_MOST_OPTIMIZATIONS takes precedence.
  """
  if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
    return
  if jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)


def _is_writable(folder) -> bool:
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError:
    return False
  return os.access(folder, os.W_OK | os.X_OK)


def _prune(folder, limit) -> None:
  """Removes the least recently used programs until `limit` bytes are left."""
  programs = []
  for path in folder.glob(f"*{_PROGRAM}"):
    try:
      stat = path.stat()
    except OSError:  # another command has just removed it
      continue
    programs.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  total = sum(size for _, size, _ in programs)
  for _, size, path in sorted(programs):
    if total <= limit:
      return
    try:
      path.unlink(missing_ok=True)
      last_use = path.name.removesuffix(_PROGRAM) + _LAST_USE
      path.with_name(last_use).unlink(missing_ok=True)
    except OSError:  # a file of another user
      continue
    total -= size
