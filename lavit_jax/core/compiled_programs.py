"""Keeps compiled programs between commands, in a folder of the user's.

What JAX compiles for an image or a training step takes seconds to minutes and
is the same at every call. The folder is bounded by what is removed here when a
command starts: JAX's own bound, `jax_compilation_cache_max_size`, needs the
package filelock, and fails on entries that were written without it.
"""

import os
import pathlib

LIMIT = 1 << 30  # bytes that a command leaves there when it starts
LEAST = 0.0  # seconds of compilation from which on inference keeps a program
HELP = """\
Compiled programs are kept in ~/.cache/lavit_jax/compiled (at most about 1 GB;
XDG_CACHE_HOME moves it), or where JAX_COMPILATION_CACHE_DIR says;
JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
"""
_CACHE, _USED = "-cache", "-atime"  # ends of JAX's file names
_LEAST = "jax_persistent_cache_min_compile_time_secs"


def user_folder() -> pathlib.Path:
  """Where the programs of one user are."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches) / "lavit_jax" / "compiled"


def keep(least: float | None = LEAST) -> None:
  """Keeps the programs of this process, unless JAX was told where or not.

  Without a place to write, as in a home that is read-only, none are kept.

  Args:
    least: seconds that the compilation of a program must take for it to be
      kept; None leaves it to JAX (1).
  """
  import jax

  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = user_folder()
  if not _is_writable(folder):
    return
  _prune(folder, LIMIT)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if least is not None and _LEAST.upper() not in os.environ:
    jax.config.update(_LEAST, least)


def _is_writable(folder) -> bool:
  try:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError:
    return False
  return os.access(folder, os.W_OK | os.X_OK)


def _prune(folder, limit) -> None:
  """Removes the programs that were not used for longest, down to `limit`."""
  found = []
  for path in folder.glob(f"*{_CACHE}"):
    try:
      stat = path.stat()
    except OSError:  # another command removes it
      continue
    found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  total = sum(size for _, size, _ in found)
  for _, size, path in sorted(found):
    if total <= limit:
      return
    try:
      path.unlink(missing_ok=True)
      used = path.name.removesuffix(_CACHE) + _USED
      path.with_name(used).unlink(missing_ok=True)
    except OSError:  # of another user: it stays
      continue
    total -= size
