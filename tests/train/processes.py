"""Runs of `lavit train` as real processes, one or several, on this machine."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

_ROOT = pathlib.Path(__file__).parents[2]


def write_config(path, stage, root, **overrides):
  """A config file with the micro config of a stage; its path."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "from tests import micro\n\n\n"
    "def get_config():\n"
    f"  return micro.config({stage!r}, {str(root)!r}, **{overrides!r})\n"
  )
  return path


def free_port() -> int:
  """A port that nobody listens on."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def flags_for(devices: int) -> str:
  """XLA_FLAGS of a process with so many devices, else as the tests' own."""
  return re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])


class Group:
  """The processes of one run; `logs` are the files with what they print."""

  def __init__(self, count, config, workdir, *, devices=1, flags=()):
    logs = pathlib.Path(f"{workdir}.logs")
    logs.mkdir(parents=True, exist_ok=True)
    first = len(list(logs.iterdir()))
    self.logs = [logs / f"{first + i:03d}.txt" for i in range(count)]
    port = free_port()
    self.children = []
    for i, log in enumerate(self.logs):
      env = os.environ | {
        "PYTHONPATH": str(_ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags_for(devices),
      }
      if count > 1:
        env |= {
          "LAVIT_COORDINATOR": f"127.0.0.1:{port}",
          "LAVIT_NUM_PROCESSES": str(count),
          "LAVIT_PROCESS_ID": str(i),
        }
      command = [sys.executable, "-m", "lavit_jax", "train", "--config", config]
      command += ["--workdir", workdir, *flags]
      with log.open("wb") as out:
        self.children.append(
          subprocess.Popen(
            [str(word) for word in command],
            cwd=_ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
          )
        )

  def wait(self, timeout=300) -> list[int]:
    """Exit statuses of all; those still there are an error."""
    end = time.monotonic() + timeout
    return [
      child.wait(timeout=max(end - time.monotonic(), 0.1))
      for child in self.children
    ]

  def text(self, i) -> str:
    """What process i has printed."""
    return self.logs[i].read_text(errors="replace")

  def kill(self) -> None:
    """SIGKILL to all."""
    for child in self.children:
      child.kill()
    for child in self.children:
      child.wait()


@contextlib.contextmanager
def running(*args, **kwargs):
  """A Group; nothing of it is left afterwards."""
  group = Group(*args, **kwargs)
  try:
    yield group
  finally:
    group.kill()


def run(*args, **kwargs) -> Group:
  """Runs a Group to its end, which must be a good one."""
  with running(*args, **kwargs) as group:
    statuses = group.wait()
    texts = "\n".join(group.text(i)[-3000:] for i in range(len(statuses)))
    assert not any(statuses), f"{statuses}\n{texts}"
    return group


def until(path, lines, group, timeout=300) -> None:
  """Waits until a file has so many lines; fails if the run ends before."""
  end = time.monotonic() + timeout
  while time.monotonic() < end:
    if path.exists() and len(path.read_text().splitlines()) >= lines:
      return
    ended = [c.poll() for c in group.children if c.poll() is not None]
    assert not ended, f"{ended}: {group.text(0)[-3000:]}"
    time.sleep(0.02)
  raise AssertionError(f"{path} did not get {lines} lines in {timeout} s")
