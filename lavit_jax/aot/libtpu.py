"""The TPU compiler: which libtpu compiles, and which one a TPU machine has.

`pip install 'jax[tpu]'` brings the libtpu that a version of JAX was released
with; another one lays programs out otherwise, and the memory it tells is not
that of a run. `TPU_LIBRARY_PATH`, which JAX and libtpu's own package obey,
names another library than the installed one.
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
    path: of libtpu.so, or of a folder that has it or `libtpu/libtpu.so`, as
      `pip install --target` makes one; None: `TPU_LIBRARY_PATH` or the
      installed one.

  Raises:
    errors.UsageError: there is none.
  """
  if path is None:
    path = os.environ.get(VARIABLE) or None
  if path is None:
    return
  given = pathlib.Path(path)
  places = (given, given / "libtpu.so", given / "libtpu" / "libtpu.so")
  found = next((place for place in places if place.is_file()), None)
  if found is None:
    raise errors.UsageError(
      f"{path}: no libtpu.so is there. Give --libtpu (or {VARIABLE}) the file,"
      " or the folder of pip install --target FOLDER --no-deps libtpu==VERSION."
    )
  os.environ[VARIABLE] = str(found.resolve())


def library() -> pathlib.Path:
  """The libtpu.so that JAX loads.

  Raises:
    errors.UsageError: libtpu is not installed, and none is named.
  """
  named = os.environ.get(VARIABLE)
  if named and pathlib.Path(named).is_file():
    return pathlib.Path(named)
  try:
    import libtpu
  except ImportError as e:
    raise errors.UsageError(
      "Compiling for TPUs needs libtpu, on x86 Linux: pip install"
      " 'lavit_jax[tpu]'"
    ) from e
  return pathlib.Path(libtpu.get_library_path())


def version() -> str:
  """Of `library`, as its package's metadata beside it tell; "" without them."""
  folder = library().resolve().parents[1]
  for found in importlib.metadata.distributions(path=[str(folder)]):
    if found.metadata["Name"] == "libtpu":
      return found.version
  return ""


def pinned() -> str:
  """What the installed JAX's extra "tpu" asks of libtpu: "==0.0.42.*".

  "" if it asks for nothing.
  """
  for line in importlib.metadata.requires("jax") or ():
    if match := _REQUIRED.match(line):
      return match[1].strip()
  return ""


def versions() -> dict[str, str]:
  """Of jax, jaxlib and the libtpu used, and the libtpu that jax asks for."""
  return {
    "jax": importlib.metadata.version("jax"),
    "jaxlib": importlib.metadata.version("jaxlib"),
    "libtpu": version(),
    "libtpu_pinned": pinned(),
  }


def warning() -> str:
  """One line if the libtpu used is not the pinned one, else "".

  Also if that cannot be told, by its version or by the pin.
  """
  used, wanted = version(), pinned()
  if not wanted or _holds(used, wanted):
    return ""
  jax = importlib.metadata.version("jax")
  return (
    f"libtpu {used or 'of unknown version'} compiles, but jax {jax} is released"
    f" with libtpu{wanted}: memory and speed of a run may differ. pip install"
    f" 'libtpu{wanted}', or give --libtpu one."
  )


def _holds(version: str, wanted: str) -> bool:
  """Whether a version is one of "==0.0.42.*"; no other form is understood."""
  number = wanted.removeprefix("==").strip()
  if not wanted.startswith("==") or "," in number:
    return False
  return bool(version) and fnmatch.fnmatchcase(version, number)
