"""`.ci/run` stops at the first of its steps that fails, whichever it is."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Takes the place of Python and of all that an environment has in bin/. Which
# of them fails is in $FAILS.
_STUB = """#!/bin/bash
name=${0##*/}
if [[ "$*" == "-m venv .venv" ]]; then
  mkdir -p .venv/bin
  for one in python pip uv ruff mypy; do cp "$0" ".venv/bin/$one"; done
fi
echo "$name $*" >>"$CALLS"
[[ "$name $*" != *"$FAILS"* ]]
"""


@pytest.fixture
def checkout(tmp_path):
  """A repository with the project's `.ci` and a stub of Python."""
  root = tmp_path / "checkout"
  shutil.copytree(ROOT / ".ci", root / ".ci")
  shutil.copy(ROOT / "README.md", root)
  (root / "setup.py").touch()
  subprocess.run(["git", "init", "-q", root], check=True)
  python = tmp_path / "python"
  python.write_text(_STUB)
  python.chmod(0o755)
  return root


def _oldest(checkout, fails):
  calls = checkout.parent / "calls"
  done = subprocess.run(
    [checkout / ".ci/run", "oldest"],
    env=os.environ
    | {
      "PYTHON": str(checkout.parent / "python"),
      "CALLS": str(calls),
      "FAILS": fails,
      "LAVIT_SHARED": "",
    },
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  return done, calls.read_text().splitlines()


def test_all_steps_are_taken_where_none_fails(checkout):
  done, calls = _oldest(checkout, "nothing fails")
  assert done.returncode == 0, done.stderr
  assert ".ci/run: all passed (oldest)" in done.stdout
  assert calls[-1] == "python -m pytest"
  steps = (
    "pip compile",
    "lowest.py",
    "ruff check",
    "ruff format",
    "-e .[test,docs]",
  )
  for step in steps:
    assert any(step in call for call in calls), step


def test_pip_installs_what_uv_cannot(checkout):
  done, calls = _oldest(checkout, "uv pip install")
  assert done.returncode == 0, done.stderr
  one, other = (call for call in calls if call.endswith("-e .[test,docs]"))
  assert one.startswith("uv pip install")
  assert other.startswith("pip install")


def test_a_lane_that_there_is_not_is_named_before_any_begins(checkout):
  done = subprocess.run(
    [checkout / ".ci/run", "oldest", "newset"],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 2
  assert "unknown lane 'newset'" in done.stderr


@pytest.mark.parametrize(
  "step",
  [
    "-m venv",
    "install --quiet setuptools uv",
    "pip compile",
    "lowest.py",
    "-e .[test,docs]",
    "ruff check",
    "ruff format",
    "mypy",
    "import_map.py --check",
    "mkdocs build --strict",
    "-m pytest",
  ],
)
def test_what_fails_ends_it(checkout, step):
  done, calls = _oldest(checkout, step)
  assert done.returncode, done.stdout
  assert "all passed" not in done.stdout
  site = [call for call in calls if "mkdocs" in call]  # built beside the rest
  others = [call for call in calls if "mkdocs" not in call]
  assert step in (site if "mkdocs" in step else others)[-1]
  assert ("-m pytest" in others[-1]) == (step == "-m pytest")
