"""Fixtures: a checkout to launch from, and a world with stubs."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.launch import worlds


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
  """A git checkout with the launchers, in a folder with a space."""
  root = tmp_path_factory.mktemp("launch") / "a checkout"
  shutil.copytree(worlds.ROOT / "launch", root / "launch")
  for name in ("configs/run.py", worlds.CONFIG):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("")
  git = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t"]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "-A"], check=True)
  subprocess.run([*git, "commit", "-qm", "code"], check=True)
  return root


@pytest.fixture
def world(tmp_path, checkout):
  world = worlds.World(tmp_path, checkout)
  yield world
  world.release()
  for process in world.started:
    process.kill()
    process.communicate()
  for pid in tmp_path.glob("tpus/*/*/lavit/run/pid"):
    if not (pid.parent / "status").exists():
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        continue
