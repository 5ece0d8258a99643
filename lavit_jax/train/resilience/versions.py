"""Which versions of the libraries a run began with, in its workdir.

Resuming to the bit, compiled programs that are found again and kernels that
are chosen by version all need the same libraries. `versions.txt` is in the form
of `pip freeze`: `pip install -c WORKDIR/versions.txt …` brings them back, and
launch/lib/worker.sh does so on each new TPU.
"""

import json
import logging
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from etils import epath

from lavit_jax.core import hosts
from lavit_jax.core.storage import files

_LOG = logging.getLogger(__name__)
FILE = "versions.txt"
_OURS = "lavit-jax"
_LINE = re.compile(r"(?:# )?([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_HEAD = "# What this run began with. To go on with other versions, delete it.\n"
_SHOWN = 12  # packages named in one warning
_MOST = 1 << 20  # bytes of the file


def installed() -> dict[str, str]:
  """Versions by normalized name, without the part behind "+".

  That part says how a version was built, and where an index such as PyPI has
  the version, it has it without.
  """
  found = {
    name: one.version.partition("+")[0] for name, one in _distributions()
  }
  return dict(sorted(found.items()))


def unpinned() -> set[str]:
  """Those that pip cannot be asked for: no index has them as they are here.

  This package, and what was installed from a repository or to be edited. What
  only came from a file is not among them: conda installs all of its packages
  from one.
  """
  found = {name for name, one in _distributions() if _is_own(one)}
  return found | {_OURS}


def _distributions() -> Iterator[tuple[str, metadata.Distribution]]:
  """Normalized names and what has them, the first on the path alone."""
  met = set()
  for one in metadata.distributions():
    name = re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower()
    if name and name not in met:
      met.add(name)
      yield name, one


def _is_own(distribution) -> bool:
  """Whether it was installed from a repository or to be edited (PEP 610)."""
  text = distribution.read_text("direct_url.json")
  if not text:
    return False
  try:
    told = json.loads(text)
    return "vcs_info" in told or bool(told.get("dir_info", {}).get("editable"))
  except (ValueError, AttributeError, TypeError):  # nobody knows
    return True


def check(workdir: epath.Path) -> list[str]:
  """Writes `versions.txt` at the first start, compares at every later one.

  With several processes all call it: the first one writes, each compares what
  its own machine has. Another version is a warning: the run goes on.

  Returns:
    The differences, "jax 0.10.2, here 0.12.0".
  """
  path = workdir / FILE
  here = {"python": _python()} | installed()
  if hosts.is_lead() and not path.exists():
    noted = {"python"} | unpinned()  # and no constraints of pip's
    lines = [
      f"{'# ' if name in noted else ''}{name}=={version}\n"
      for name, version in here.items()
    ]
    files.write_whole(path, "".join([_HEAD, *lines]).encode())
  hosts.barrier("lavit_versions")
  found = differences(read(path), here)
  if found:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    _LOG.warning(
      "this run began with other versions than are installed here: %s%s. Its"
      " numbers may differ from here on. To go on with the old ones: %s …; to"
      " be content with these, delete %s",
      "; ".join(found[:_SHOWN]),
      more,
      _way_back(path),
      path,
    )
  return found


def _way_back(path) -> str:
  """The command that installs what a file has; pip reads none in a store."""
  if files.is_remote(path):
    return f"gcloud storage cp {path} . && pip install -c {FILE}"
  return f"pip install -c {path}"


def _python() -> str:
  return ".".join(platform.python_version_tuple()[:2])


def read(path: epath.Path) -> dict[str, str]:
  """The versions in a file; lines of another form are left out."""
  with path.open("rb") as file:
    lines = file.read(_MOST).decode("utf-8", "replace").splitlines()
  return dict(m.groups() for m in map(_LINE.fullmatch, lines) if m)


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
  """Packages of both that are of another version; of one alone is none."""
  both: Iterable[str] = (name for name in there if name in here)
  return [
    f"{name} {there[name]}, here {here[name]}"
    for name in both
    if there[name] != here[name]
  ]
