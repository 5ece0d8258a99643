"""What the launchers' tests share: stubs on PATH, and what they recorded."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
STUBS = pathlib.Path(__file__).parent
CONFIG = "configs/it's a; touch pwned/$(touch pwned).py"
TPU = ("--name", "pod", "--zone", "us-west4-a", "--type", "v5litepod-16")
RUN = (*TPU, "--config", "configs/run.py", "--workdir", "/mnt/shared/run")
ODD = ["--config.a=b c", "--config.d='\"; touch pwned", "--config.e=$(pwd)\nf"]
AT_ONCE = {"LAVIT_LAUNCH_SECOND_MS": "0"}  # for tests of long back-offs


@dataclasses.dataclass
class World:
  """A folder with stubs on PATH, and what they recorded."""

  path: pathlib.Path
  checkout: pathlib.Path
  started: list = dataclasses.field(default_factory=list)

  def __post_init__(self):
    write_script(
      self.path / "bin/gcloud",
      f'exec {sys.executable} -S {STUBS / "gcloud_stub.py"} "$@"',
    )
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
      self.install("host_bin", name, STUBS / "python_stub.sh")
    self.install("host_bin", "lavit_stub", STUBS / "lavit_stub.sh")
    self.install("bin", "lavit", STUBS / "lavit_stub.sh")
    (self.path / "plan").mkdir()
    self.set(workers=2, nodes={}, queue={}, faults={})

  def install(self, folder, name, source):
    (self.path / folder).mkdir(exist_ok=True)
    shutil.copy(source, self.path / folder / name)

  def set(self, **changes):
    state = self.state() if (self.path / "world.json").exists() else {}
    (self.path / "world.json").write_text(json.dumps(state | changes))

  def state(self):
    return json.loads((self.path / "world.json").read_text())

  def plan(self, **attempts):
    """How attempts end: plan(_0="hang", _1=75)."""
    for name, plan in attempts.items():
      (self.path / "plan" / name[1:].replace("_", ".")).write_text(str(plan))

  def release(self):
    (self.path / "release").touch()

  def start(self, script, *args, **env):
    process = subprocess.Popen(
      [self.checkout / "launch" / script, *args],
      env=os.environ
      | {
        "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
        "LAVIT_STUB": str(self.path),
        "LAVIT_LAUNCH_SECOND_MS": "3",
        "TMPDIR": str(self.path),
      }
      | env,
      cwd=self.path,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self.started.append(process)
    return process

  def run(self, script, *args, **env):
    """Starts a launcher; its (exit status, output, messages)."""
    process = self.start(script, *args, **env)
    out, err = process.communicate(timeout=60)
    assert not list(self.path.rglob("pwned"))
    return process.returncode, out, err

  def calls(self, verb=None):
    path = self.path / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [json.loads(line) for line in lines]
    return [c for c in calls if verb in (None, c[3])]

  def commands(self, words):
    """The ssh calls whose command has these words."""
    return [c for c in self.calls("ssh") if words in " ".join(c)]

  def attempts(self, host):
    """For each attempt of `lavit` on a host: (arguments, environment)."""
    found = []
    for attempt in range(len(list((self.path / "runs").glob(f"{host}.*")))):
      run = self.path / "runs" / f"{host}.{attempt}"
      arguments = (run / "arguments").read_text().split("\0")[:-1]
      pairs = (run / "environment").read_text().split("\0")[:-1]
      found.append((arguments, dict(p.split("=", 1) for p in pairs)))
    return found

  def wait_for_attempt(self, *hosts, attempt=0):
    deadline = time.monotonic() + 20
    for host in hosts:
      while not (self.path / f"runs/{host}.{attempt}/ready").exists():
        assert time.monotonic() < deadline, f"{host} never began"
        time.sleep(0.02)


def write_script(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
