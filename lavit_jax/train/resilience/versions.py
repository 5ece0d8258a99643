"""Library versions that a run began with, in its workdir.

Bit-equal resume, finding compiled programs again and kernels that are chosen by
version all need the same libraries. `versions.txt` is in the format of
`pip freeze`: `pip install -c WORKDIR/versions.txt …` brings them back, and
launch/lib/worker.sh does so on each new TPU.
"""

import functools
import json
import logging
import platform
import re
from collections.abc import Mapping
from importlib import metadata

from etils import epath

from lavit_jax.core import hosts
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
FILE = "versions.txt"
_PACKAGE = "lavit-jax"
_LINE = re.compile(r"(?:# )?([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_HEAD = "# What this run began with. To go on with other versions, delete it.\n"
_MAX_SHOWN = 12  # packages named in one warning
_MAX_BYTES = 1 << 20  # of the file


def installed() -> dict[str, str]:
  """Returns versions by normalized name, without the part behind "+".

  That part says how a version was built; an index such as PyPI has the version
  without it.
  """
  return {name: version for name, (version, _) in _distributions().items()}


def unpinned() -> set[str]:
  """Returns packages that pip cannot be asked for in their version here.

  No index has that version of this package, nor of packages that were installed
  from a repository or editable. Packages that came from a file are not among
  them: conda installs all of its packages from one.
  """
  found = _distributions().items()
  return {_PACKAGE} | {name for name, (_, is_local) in found if is_local}


@functools.cache  # hundreds of files, which the readers parse to their ends
def _distributions() -> Mapping[str, tuple[str, bool]]:
  """Returns (version, whether it is local) by normalized name, sorted.

  Of two of one name, the first on the path.
  """
  found: dict[str, tuple[str, bool]] = {}
  for distribution in metadata.distributions():
    name = distribution.metadata["Name"] or ""
    name = re.sub(r"[-_.]+", "-", name).lower()
    if name and name not in found:
      version = distribution.version.partition("+")[0]
      found[name] = version, _is_local(distribution)
  return dict(sorted(found.items()))


def _is_local(distribution: metadata.Distribution) -> bool:
  """Returns whether it was installed from a repository or editable (PEP 610).

  True if the record cannot be read.
  """
  text = distribution.read_text("direct_url.json")
  if not text:
    return False
  try:
    origin = json.loads(text)
    is_editable = bool(origin.get("dir_info", {}).get("editable"))
    return "vcs_info" in origin or is_editable
  except (ValueError, AttributeError, TypeError):
    return True


def check(workdir: epath.Path) -> list[str]:
  """Writes `versions.txt` at the first start, compares at every later one.

  With several processes all call it: the lead process writes, each compares
  what its own machine has. Another version is a warning: the run goes on.

  Returns:
    The differences, such as "jax 0.10.2, here 0.12.0".
  """
  path = workdir / FILE
  here = {"python": _python()} | installed()
  if hosts.is_lead() and not path.exists():
    comments = {"python"} | unpinned()  # constraints that pip cannot meet
    lines = [
      f"{'# ' if name in comments else ''}{name}=={version}\n"
      for name, version in here.items()
    ]
    files.write_whole(path, "".join([_HEAD, *lines]).encode())
  hosts.barrier("lavit_versions")
  changed = differences(read(path), here)
  if changed:
    more = len(changed) - _MAX_SHOWN
    _LOG.warning(
      "this run began with other versions than are installed here: %s%s. Its"
      " numbers may differ from here on. To go on with the old versions: %s …;"
      " to accept the new ones, delete %s",
      "; ".join(changed[:_MAX_SHOWN]),
      f" and {more} more" if more > 0 else "",
      _install_command(path),
      path,
    )
  return changed


def _install_command(path: epath.Path) -> str:
  """Returns the command that installs a file's versions.

  pip reads no file in an object store, so such a file is copied first.
  """
  if files.is_remote(path):
    return f"gcloud storage cp {path} . && pip install -c {FILE}"
  return f"pip install -c {path}"


def _python() -> str:
  return ".".join(platform.python_version_tuple()[:2])


def read(path: epath.Path) -> dict[str, str]:
  """Returns the versions in a file; lines in another format are ignored."""
  with path.open("rb") as file:
    lines = file.read(_MAX_BYTES).decode("utf-8", "replace").splitlines()
  matches = (_LINE.fullmatch(line) for line in lines)
  return {match[1]: match[2] for match in matches if match}


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
  """Describes packages of both sides that have different versions."""
  return [
    f"{name} {version}, here {here[name]}"
    for name, version in there.items()
    if name in here and here[name] != version
  ]
