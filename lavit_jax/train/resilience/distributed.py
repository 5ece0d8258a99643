"""One run by several processes: how they join, and how they stop together.

On Cloud TPU, under SLURM and other clusters that JAX knows, LAVIT_DISTRIBUTED=1
is enough; elsewhere each process is started with

  LAVIT_COORDINATOR=host:port  LAVIT_NUM_PROCESSES=n  LAVIT_PROCESS_ID=0 ... n-1

Without any of these variables a run is one process.
"""

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from lavit_jax.core import errors

HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
_SHUTDOWN_SECONDS = 60  # that a process waits for the others at its end
_VARIABLES = ("LAVIT_COORDINATOR", "LAVIT_NUM_PROCESSES", "LAVIT_PROCESS_ID")


def initialize(environment: Mapping[str, str] | None = None) -> None:
  """Joins the processes that the environment describes, once.

  Must be called before anything asks JAX for devices.

  Args:
    environment: by default that of this process.

  Raises:
    errors.ConfigError: some of the variables are missing or wrong.
    errors.Unreachable: the other processes could not be reached.
  """
  environment = os.environ if environment is None else environment
  given = {n: environment[n] for n in _VARIABLES if environment.get(n)}
  if not given and environment.get("LAVIT_DISTRIBUTED") != "1":
    return
  arguments = _arguments(given)
  if jax.distributed.is_initialized():
    return
  # Collectives between the CPUs of several processes; no effect elsewhere.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **arguments,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError) as e:
    raise errors.Unreachable(
      "This process could not join the others of its run"
      f" ({' '.join(str(e).split())[:300]}). Check that all of them were"
      f" started, and that {given.get(_VARIABLES[0]) or 'the coordinator'} can"
      " be reached from here."
    ) from e
  _LastWords.start()


def _arguments(given: Mapping[str, str]) -> dict[str, Any]:
  """Returns arguments of `jax.distributed.initialize`; none for a cluster."""
  if not given:
    return {}
  missing = [name for name in _VARIABLES if name not in given]
  try:
    count, number = (int(given.get(name, "0")) for name in _VARIABLES[1:])
    good = not missing and 0 <= number < count
  except ValueError:
    good = False
  if not good:
    raise errors.ConfigError(
      f"{', '.join(f'{k}={v}' for k, v in given.items())}: a run of several"
      " processes needs LAVIT_COORDINATOR=host:port, LAVIT_NUM_PROCESSES=n and"
      " LAVIT_PROCESS_ID, a number below n"
      + (f" ({', '.join(missing)} is missing)." if missing else ".")
    )
  return {
    "coordinator_address": given[_VARIABLES[0]],
    "num_processes": count,
    "process_id": number,
    # A SLURM step of which this run is a part would bind a single GPU.
    "cluster_detection_method": "deactivate",
  }


class _LastWords:
  """Says why this process is gone, when it cannot say so itself.

  When a process of a run dies, JAX ends the others from C++, where no Python
  runs any more. A shell, started beforehand, outlives them by a moment: when
  its input ends it prints the reason, unless it has been sent the word "done".
  There is one a process, hence a class with no instances.
  """

  _shell: subprocess.Popen | None = None
  failed = False  # whether the run has; others must not be waited for

  @classmethod
  def start(cls) -> None:
    """Starts the shell; to be called once the processes have joined."""
    if cls._shell is not None or jax.process_count() == 1:
      return
    number, count = jax.process_index(), jax.process_count()
    text = (
      f"lavit: process {number} of {count} of this run was ended from outside,"
      " or by JAX because another process has died or cannot be reached: the"
      " one whose log ends in another way. Give the same command again on all"
      " hosts: a run goes on from its newest checkpoint, a cache with its next"
      " shard."
    )
    script = 'read -r word; [ "$word" = done ] || printf "%s\\n" "$0" >&2'
    cls._shell = subprocess.Popen(
      ["/bin/sh", "-c", script, text],
      stdin=subprocess.PIPE,
      start_new_session=True,  # out of reach of a signal to the whole group
    )
    atexit.register(cls._end)

  @classmethod
  def _end(cls) -> None:
    if not cls.failed:
      jax.distributed.shutdown()  # may end this process; the shell then prints
    cls.keep_silent()

  @classmethod
  def keep_silent(cls) -> None:
    """Has the shell print nothing: this process reports its end itself."""
    if cls._shell is not None and cls._shell.stdin is not None:
      with contextlib.suppress(OSError):  # the shell was killed
        cls._shell.stdin.write(b"done\n")
        cls._shell.stdin.close()
      cls._shell = None


_LOST = re.compile(
  "gloo|closed by peer|connection re(set|fused)|coordination service|heartbeat"
  "|barrier.*(fail|time)|task.*(dead|unhealthy|error)",
  re.IGNORECASE | re.DOTALL,
)


def is_lost_peer(error: BaseException) -> bool:
  """Returns whether an error means that another process of the run is gone."""
  if isinstance(error, errors.PeerLost):
    return True
  is_own = isinstance(error, errors.LavitError) and not isinstance(
    error, errors.CheckpointError
  )
  may_be = isinstance(error, (RuntimeError, ValueError, OSError)) and not is_own
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  return several and may_be and bool(_LOST.search(str(error)))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Ends the run of all processes at an error inside; see `leave`.

  Raises:
    errors.PeerLost: in place of JAX's error if another process has died.
  """
  try:
    yield
  except errors.Preempted:
    raise  # all processes end alike
  except Exception as error:
    _LastWords.failed = jax.distributed.is_initialized()
    if not is_lost_peer(error) or isinstance(error, errors.PeerLost):
      raise
    raise errors.PeerLost(
      f"Process {jax.process_index()} of {jax.process_count()} stops, for"
      " another process of this run has died or cannot be reached"
      f" ({' '.join(str(error).split())[:200]}). Its own log says why. Give the"
      " same command again on all hosts: training goes on from the newest"
      " checkpoint."
    ) from error


def leave(status: int, text: str) -> None:
  """Prints a text and ends this process at once, if a shared run has failed.

  A regular exit would wait for the others, which wait for this process; once
  it is gone they notice. If no run of several processes has failed, nothing is
  done.

  Args:
    status: exit status.
    text: printed to stderr.
  """
  if not _LastWords.failed:
    return
  _LastWords.keep_silent()
  sys.stdout.flush()
  print(text, file=sys.stderr, flush=True)
  os._exit(status)


class StopSignal:
  """Notices a SIGTERM, a cloud's notice of preemption. Use it as a context.

  With several processes the notice to one stops all of them after the same
  step, which JAX's coordination service agrees on.
  """

  def __init__(self) -> None:
    self._received = threading.Event()
    self._previous: Any = None
    # JAX catches the signal itself if there are several processes.
    self._alone = not jax.distributed.is_initialized()

  def __enter__(self) -> "StopSignal":
    """Starts to catch the signal."""
    main = threading.current_thread() is threading.main_thread()
    if self._alone and main:
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *unused: Any) -> None:
    """Restores the handler of before."""
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _receive(self, *unused: Any) -> None:
    self._received.set()

  def after(self, step: int) -> bool:
    """Returns whether to save and stop after this step.

    To be asked after every step. Every process gets the same answer.
    """
    if self._alone:
      return self._received.is_set()
    return multihost_utils.reached_preemption_sync_point(step)
