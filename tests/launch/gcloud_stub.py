"""A `gcloud` for tests: TPUs as folders, hosts as home folders in them.

Lives in $LAVIT_STUB: world.json is what exists and which faults are still to
come; calls.jsonl is what was called. `ssh` runs the command for real, with
the host's folder as its home. A fault is asked for by operation ("create",
"scp", "ssh:start" ...): each call takes the next of its list, None is none.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

STUB = pathlib.Path(os.environ["LAVIT_STUB"])
MESSAGES = {
  "capacity": 'ERROR: There is no more capacity in the zone "us-west4-a"; code'
  ": 8, RESOURCE_EXHAUSTED",
  "quota": "ERROR: Quota limit 'TPUV5sPreemptible' has been exceeded.",
  "exists": "ERROR: ALREADY_EXISTS: there is one of this name",
  "denied": "ERROR: PERMISSION_DENIED: you may not do this.",
  "offline": "ERROR: gcloud crashed (ConnectionError): Max retries exceeded",
  "drop": "ssh: connect to host 10.0.0.2 port 22: Connection timed out",
}


@contextlib.contextmanager
def world():
  """The state of all TPUs, locked: slices are asked side by side."""
  with open(STUB / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    path = STUB / "world.json"
    state = json.loads(path.read_text())
    try:
      yield state
    finally:  # a refusal leaves by SystemExit and uses up its fault too
      path.write_text(json.dumps(state))


def flag(argv, name, default=None):
  for word in argv:
    if word.startswith(f"--{name}="):
      return word.split("=", 1)[1]
  return default


def fail(text, status=1):
  print(text, file=sys.stderr)
  sys.exit(status)


def operation(argv):
  """The name that faults are listed under, "ssh:start" for example."""
  verb = argv[3]
  if verb != "ssh":
    return verb
  command = flag(argv, "command")
  if "LAVIT_STATE" in command:
    return "ssh:state"
  return "ssh:" + re.findall(r"worker\.sh (\w+)", command)[-1]


def homes(node, worker="all"):
  """The home folders of a node's hosts."""
  found = sorted((STUB / "tpus" / node).iterdir())
  return found if worker == "all" else [found[int(worker)]]


def kill(node):
  """What a machine that goes away does to its processes."""
  for home in homes(node):
    pid = home / "lavit/run/pid"
    if pid.exists():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)


def preempt(state):
  for node in state["nodes"]:
    kill(node)
    state["nodes"][node] = "PREEMPTED"
  for name in state["queue"]:
    state["queue"][name] = "SUSPENDED"


def create(state, argv):
  name = argv[4]
  queued = argv[2] == "queued-resources"
  if name in state["nodes"] or name in state["queue"]:
    fail(f"ERROR: ALREADY_EXISTS: {name}")
  nodes = [name]
  if queued:
    state["queue"][name] = "ACTIVE"
    if count := flag(argv, "node-count"):
      nodes = [f"{flag(argv, 'node-prefix')}-{i}" for i in range(int(count))]
  for node in nodes:
    state["nodes"][node] = "READY"
    for worker in range(state["workers"]):
      (STUB / "tpus" / node / f"w{worker}").mkdir(parents=True)


def delete(state, argv):
  name = argv[4]
  queued = argv[2] == "queued-resources"
  if name not in state["queue" if queued else "nodes"]:
    fail(f"ERROR: NOT_FOUND: {name}")
  if not queued and name in state["queue"]:
    fail("ERROR: FAILED_PRECONDITION: part of a queued resource")
  state["queue"].pop(name, None)
  for node in list(state["nodes"]):
    if node == name or node.startswith(f"{name}-"):
      kill(node)
      shutil.rmtree(STUB / "tpus" / node)
      del state["nodes"][node]


def describe(state, argv, fault):
  kind = "queue" if argv[2] == "queued-resources" else "nodes"
  if fault:  # "=CREATING": this answer, once
    print(fault[1:])
  elif argv[4] in state[kind]:
    print(state[kind][argv[4]])
  else:
    fail(f"ERROR: NOT_FOUND: {kind} {argv[4]} was not found")


def reach(state, node):
  """Real gcloud refuses ssh and scp to a TPU that is not READY."""
  if node not in state["nodes"]:
    fail(f"ERROR: NOT_FOUND: {node}")
  if state["nodes"][node] != "READY":
    fail(f"ERROR: the TPU is in state {state['nodes'][node]}, unusable")


def ssh(argv, fault):
  command = flag(argv, "command")
  status = 0
  for home in homes(argv[4], flag(argv, "worker", "0")):
    where, number = home.parent.name, home.name[1:]
    env = os.environ | {
      "HOME": str(home),
      "PATH": f"{STUB / 'host_bin'}:{os.environ['PATH']}",
      "LAVIT_STUB_HOST": f"{where}.{number}",
    }
    run = subprocess.Popen(
      ["bash", "-c", command],
      cwd=home,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
    )
    for count, line in enumerate(run.stdout, 1):
      sys.stdout.buffer.write(line)
      sys.stdout.flush()
      if fault == f"drop at {count}":
        run.kill()
        fail(MESSAGES["drop"], 255)
      if fault == f"repeat at {count}":  # gcloud itself connects again
        run.kill()
        return ssh(argv, None)
    status = status or run.wait()
  return 255 if fault == "drop after" else status


def storage(source, target):
  """`gcloud storage cp` from gs://, which is the folder `bucket` here."""
  with open(STUB / "storage_calls", "a") as calls:
    calls.write(f"{source}\n")
  path = STUB / "bucket" / source.removeprefix("gs://")
  denied = STUB / "bucket_denied"
  if denied.exists():
    denied.unlink()
    fail(f"ERROR: (gcloud.storage.cp) HTTPError 403: no access to {source}")
  if not path.is_file():
    fail(
      "ERROR: (gcloud.storage.cp) The following URLs matched no objects or"
      f" files:\n-{source}"
    )
  shutil.copy(path, target)


def main(argv):
  if argv[:2] == ["storage", "cp"]:
    storage(*argv[2:])
    return
  with open(STUB / "calls.jsonl", "a") as calls:
    calls.write(json.dumps(argv) + "\n")
  with world() as state:
    name = operation(argv)
    faults = state["faults"].get(name, [])
    fault = faults.pop(0) if faults else None
    verb = argv[3]
    if fault == "preempt":
      preempt(state)
      status, text = 255, MESSAGES["drop"]
    elif fault in MESSAGES:
      status, text = (255 if fault == "drop" else 1), MESSAGES[fault]
    else:
      status, text = None, ""
      if verb in ("ssh", "scp"):
        reach(state, argv[4] if verb == "ssh" else argv[5].split(":")[0])
      elif verb == "describe":
        describe(state, argv, fault)
      else:
        {"create": create, "delete": delete}[verb](state, argv)
  if status is not None:
    fail(text, status)
  if verb == "scp":
    node, target = argv[5].split(":")
    for home in homes(node):
      shutil.copy(argv[4], home / target)
  if verb == "ssh":
    sys.exit(ssh(argv, fault))


if __name__ == "__main__":
  main(sys.argv[1:])
