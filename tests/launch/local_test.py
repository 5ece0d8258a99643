"""launch/local.sh: processes of this machine, with a lavit that is a script."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.launch import worlds

LOCAL = ("--config", "configs/run.py", "--workdir", "runs/w", "--grace", "1")


def test_local_starts_k_processes_with_their_numbers_and_one_port(world):
  status, out, err = world.run(
    "local.sh", *LOCAL, "--processes", "3", "--devices", "4", XLA_FLAGS="--a"
  )
  assert status == 0, err
  ports = set()
  for i in range(3):
    [(arguments, environment)] = world.attempts(str(i))
    assert arguments == ["train", *LOCAL[:4]]
    assert environment["LAVIT_PROCESS_ID"] == str(i)
    assert environment["LAVIT_NUM_PROCESSES"] == "3"
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] == "gloo"
    flags = "--a --xla_force_host_platform_device_count=4"
    assert environment["XLA_FLAGS"] == flags
    ports.add(environment["LAVIT_COORDINATOR"])
    assert f"[{i}] attempt 0 step 3\n" in out
  assert len(ports) == 1
  assert ports.pop().startswith("127.0.0.1:")


def test_local_ends_all_when_one_fails_and_reports_the_crash(world):
  world.plan(_0="hang", _0_1=9)
  status, out, err = world.run("local.sh", *LOCAL)
  assert status == 9
  assert "[0] told to end\n" in out
  assert "a process ended with status 9" in err


def test_local_kills_what_does_not_end(world):
  worlds.write_script(
    world.path / "bin/lavit",
    'trap "" TERM; echo $$ >>pids; [ "$LAVIT_PROCESS_ID" = 1 ] && exit 9;'
    " while :; do sleep 0.1; done",
  )
  began = time.monotonic()
  assert world.run("local.sh", *LOCAL)[0] == 9
  assert time.monotonic() - began < 10


def test_local_passes_signals_on_and_ends_with_75(world):
  world.plan(_0="hang")
  run = world.start("local.sh", *LOCAL, "--resume", "--max-restarts", "3")
  world.wait_for_attempt("0", "1")
  run.send_signal(signal.SIGINT)
  out, err = run.communicate(timeout=20)
  assert run.returncode == 75
  assert {"[0] told to end", "[1] told to end"} <= set(out.splitlines())
  assert "telling the run to save and end" in err
  assert len(world.attempts("0")) == 1


def test_local_resumes_after_75_only_if_asked(world):
  world.plan(_0=75)
  assert world.run("local.sh", *LOCAL)[0] == 75
  world.plan(_1=75, _2=1, _3=0)
  status, _, _ = world.run("local.sh", *LOCAL, "--resume", "--max-restarts=1")
  assert status == 0
  assert len(world.attempts("0")) == len(world.attempts("1")) == 4


def test_local_gives_up_after_the_last_restart_and_never_repeats_a_mistake(
  world,
):
  world.plan(_0=1, _1=5, _2=0, _3=2)
  assert world.run("local.sh", *LOCAL, "--max-restarts", "1")[0] == 5
  assert world.run("local.sh", *LOCAL)[0] == 0
  status, _, _ = world.run("local.sh", *LOCAL, "--max-restarts", "9")
  assert status == 2
  assert len(world.attempts("0")) == 4


def test_local_printed_commands_run_when_pasted(world):
  args = ["--config", worlds.CONFIG, "--workdir", "a b; touch pwned"]
  env = {
    "PATH": f"{world.path / 'bin'}:{os.environ['PATH']}",
    "LAVIT_STUB": str(world.path),
  }
  _, out, _ = world.run("local.sh", *args, "--dry-run", "--", *worlds.ODD)
  assert not (world.path / "runs").exists()
  subprocess.run(
    ["sh"],
    input=out,
    text=True,
    check=True,
    env=os.environ | env,
    cwd=world.path,
    capture_output=True,
  )
  assert not list(world.path.rglob("pwned"))
  assert world.attempts("1")[0][0] == ["train", *args, *worlds.ODD]


def test_local_processes_find_each_other_through_gloo(world):
  script = world.path / "real.py"
  script.write_text(
    textwrap.dedent("""\
      import os
      import jax
      from jax.experimental import multihost_utils
      jax.distributed.initialize(
        os.environ["LAVIT_COORDINATOR"],
        int(os.environ["LAVIT_NUM_PROCESSES"]),
        int(os.environ["LAVIT_PROCESS_ID"]),
      )
      ids = multihost_utils.process_allgather(jax.process_index())
      print("devices", jax.device_count(), "processes", ids.tolist())
    """)
  )
  worlds.write_script(
    world.path / "bin/real", f"exec {sys.executable} {script}"
  )
  status, out, err = world.run(
    "local.sh", *LOCAL, "--devices", "3", LAVIT=str(world.path / "bin/real")
  )
  assert status == 0, out + err
  for i in range(2):
    assert f"[{i}] devices 6 processes [0, 1]\n" in out


MISTAKES = [
  (["--workdir", "w"], "--config is missing"),
  (["--config", "c"], "--workdir is missing"),
  ([*LOCAL, "--processes", "two"], "--processes takes a whole"),
  ([*LOCAL, "x"], "unknown argument 'x'"),
]


@pytest.mark.parametrize(("args", "line"), MISTAKES)
def test_a_mistake_is_one_clear_line(world, args, line):
  status, out, err = world.run("local.sh", *args)
  assert (status, out, err.count("\n")) == (2, "", 1)
  assert line in err
