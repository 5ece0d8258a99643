"""The TPU compiler: which libtpu compiles, and which one a TPU machine has.

`pip install 'jax[tpu]'` brings the libtpu that a version of JAX was released
with. Another version lays programs out differently, and the memory it reports
is not that of a run. `TPU_LIBRARY_PATH`, which JAX and libtpu's own package
obey, names another library than the installed one.
"""

import fnmatch
import importlib.metadata
import os
import pathlib
import re

from lavit_jax.core import errors

VARIABLE = "TPU_LIBRARY_PATH"
_REQUIRED = re.compile(
  r"libtpu\s*\(?((?:[=<>!~][^;)]*)?)\)?\s*;.*extra == ['\"]tpu['\"]"
)


def use(path: str | None) -> None:
  """Has JAX load another libtpu; to be called before it has loaded one.

  Args:
    path: libtpu.so, or a folder with it or with `libtpu/libtpu.so`, as
      `pip install --target` makes one; None for `TPU_LIBRARY_PATH` or the
      installed libtpu.

  Raises:
    errors.UsageError: there is no libtpu.so, or it is no library.
  """
  if path is None:
    path = os.environ.get(VARIABLE) or None
  if path is None:
    return
  given = pathlib.Path(path)
  candidates = (given, given / "libtpu.so", given / "libtpu" / "libtpu.so")
  file = next((one for one in candidates if one.is_file()), None)
  if file is None:
    raise errors.UsageError(
      f"{path}: no libtpu.so is there. Give --libtpu (or {VARIABLE}) the file,"
      " or the folder of pip install --target FOLDER --no-deps libtpu==VERSION."
    )
  with file.open("rb") as opened:
    if opened.read(4) != b"\x7fELF":
      raise errors.UsageError(
        f"{file} is no shared library of Linux. Give --libtpu (or {VARIABLE})"
        " the file libtpu.so, or the folder that holds it."
      )
  os.environ[VARIABLE] = str(file.resolve())


def library() -> pathlib.Path:
  """Returns the libtpu.so that JAX loads.

  Raises:
    errors.UsageError: libtpu is not installed, and none is named.
  """
  named = os.environ.get(VARIABLE)
  if named and pathlib.Path(named).is_file():
    return pathlib.Path(named)
  try:
    import libtpu  # optional extra
  except ImportError as e:
    raise errors.UsageError(
      "Compiling for TPUs needs libtpu, on x86 Linux: pip install"
      " 'lavit_jax[tpu]'"
    ) from e
  return pathlib.Path(libtpu.get_library_path())


def version() -> str:
  """Returns the version of `library`, from the package metadata beside it.

  "" if there is none.
  """
  folder = library().resolve().parents[1]
  for package in importlib.metadata.distributions(path=[str(folder)]):
    if package.metadata["Name"] == "libtpu":
      return package.version
  return ""


def pinned() -> str:
  """Returns what JAX's extra "tpu" requires of libtpu, such as "==0.0.42.*".

  "" if it requires nothing.
  """
  for line in importlib.metadata.requires("jax") or ():
    if match := _REQUIRED.match(line):
      return match[1].strip()
  return ""


def versions() -> dict[str, str]:
  """Returns versions of jax, jaxlib and libtpu, and the libtpu of jax."""
  return {
    "jax": importlib.metadata.version("jax"),
    "jaxlib": importlib.metadata.version("jaxlib"),
    "libtpu": version(),
    "libtpu_pinned": pinned(),
  }


def warning() -> str:
  """Returns one line if libtpu is not known to be the pinned one, else ""."""
  used, required = version(), pinned()
  if not required or _holds(used, required):
    return ""
  jax = importlib.metadata.version("jax")
  return (
    f"libtpu {used or 'of unknown version'} compiles, but jax {jax} is released"
    f" with libtpu{required}: memory and speed of a run may differ. pip install"
    f" 'libtpu{required}', or give --libtpu one."
  )


def _holds(version: str, required: str) -> bool:
  """Returns whether a version matches "==0.0.42.*"; False for other forms."""
  number = required.removeprefix("==").strip()
  if not required.startswith("==") or "," in number:
    return False
  return bool(version) and fnmatch.fnmatchcase(version, number)
