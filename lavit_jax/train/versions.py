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
from collections.abc import Iterable, Mapping
from importlib import metadata

from etils import epath

from lavit_jax import files, hosts

_LOG = logging.getLogger(__name__)
FILE = "versions.txt"
_LINE = re.compile(r"(?:# )?([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)")
_HEAD = "# What this run began with. To go on with other versions, delete it.\n"
_SHOWN = 12  # packages named in one warning
_MOST = 1 << 20  # bytes of the file


def installed() -> dict[str, str]:
  """Versions by normalized name, of what an index such as PyPI has.

  Left out is what came from a folder or a repository, this package first of
  all, and the part of a version behind "+", which says how it was built.
  """
  found = {}
  for one in metadata.distributions():
    name = one.metadata["Name"]
    if not name or _is_local(one):
      continue
    name = re.sub(r"[-_.]+", "-", name).lower()
    found.setdefault(name, one.version.partition("+")[0])  # first on the path
  found.pop("lavit-jax", None)
  return dict(sorted(found.items()))


def _is_local(distribution) -> bool:
  """Whether pip was given an address in place of a name."""
  text = distribution.read_text("direct_url.json")
  return bool(text) and "url" in json.loads(text)


def check(workdir: epath.Path) -> list[str]:
  """Writes `versions.txt` at the first start, compares at every later one.

  With several processes all call it: the first one writes, each compares what
  its own machine has. Another version is a warning: the run goes on.

  Returns:
    The differences, "jax 0.10.2, here 0.12.0".
  """
  path = workdir / FILE
  here = {"python": _python()} | installed()
  if hosts.first() and not path.exists():
    python, *rest = [f"{name}=={version}\n" for name, version in here.items()]
    files.write_whole(path, f"{_HEAD}# {python}{''.join(rest)}".encode())
  hosts.barrier("lavit_versions")
  found = differences(read(path), here)
  if found:
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    _LOG.warning(
      "this run began with other versions than are installed here: %s%s. Its"
      " numbers may differ from here on. To go on with the old ones: pip"
      " install -c %s …; to be content with these, delete that file",
      "; ".join(found[:_SHOWN]),
      more,
      path,
    )
  return found


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
