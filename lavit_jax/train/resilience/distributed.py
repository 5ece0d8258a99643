"""One run by several processes: who joins whom, and when to stop together.

On Cloud TPU, under SLURM and other clusters that JAX knows, LAVIT_DISTRIBUTED=1
is enough; by hand, each process is told

  LAVIT_COORDINATOR=host:port  LAVIT_NUM_PROCESSES=n  LAVIT_PROCESS_ID=0 ... n-1

Without any of these a run is one process.
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

import jax
from jax.experimental import multihost_utils

from lavit_jax.core import errors

HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead
_SHUTDOWN_SECONDS = 60  # that one which is done waits for the others
_BY_HAND = ("LAVIT_COORDINATOR", "LAVIT_NUM_PROCESSES", "LAVIT_PROCESS_ID")


def initialize(environment: Mapping[str, str] | None = None) -> None:
  """Joins the processes that the environment tells of, once.

  Must come before anything asks JAX for devices.

  Args:
    environment: by default that of this process.

  Raises:
    errors.ConfigError: the environment tells only a part of it.
    errors.Unreachable: the others could not be reached.
  """
  environment = os.environ if environment is None else environment
  given = {n: environment[n] for n in _BY_HAND if environment.get(n)}
  if not given and environment.get("LAVIT_DISTRIBUTED") != "1":
    return
  told = _by_hand(given)
  if jax.distributed.is_initialized():
    return
  # Collectives between the CPUs of several processes; no effect elsewhere.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
      **told,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError) as e:
    raise errors.Unreachable(
      "This process could not join the others of its run"
      f" ({' '.join(str(e).split())[:300]}). Check that all of them were"
      f" started, and that {given.get(_BY_HAND[0]) or 'the coordinator'} can be"
      " reached from here."
    ) from e
  _LastWords.start()


def _by_hand(given) -> dict[str, str | int]:
  """Arguments of `jax.distributed.initialize`; none where a cluster tells."""
  if not given:
    return {}
  missing = [name for name in _BY_HAND if name not in given]
  try:
    count, number = (int(given.get(name, "0")) for name in _BY_HAND[1:])
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
    "coordinator_address": given[_BY_HAND[0]],
    "num_processes": count,
    "process_id": number,
    # A SLURM step of which this is not all would bind a single GPU.
    "cluster_detection_method": "deactivate",
  }


class _LastWords:
  """Says why this process is gone, where it cannot say so itself.

  When a process of a run dies, JAX ends the others from C++, where no Python
  runs any more. A shell outlives them by a moment: unless it is told that all
  is well, it prints the reason when its input ends.
  """

  _shell: subprocess.Popen | None = None
  failed = False  # the run; others must not be waited for

  @classmethod
  def start(cls) -> None:
    """Begins to watch; call it where the processes have been joined."""
    if cls._shell is not None or jax.process_count() == 1:
      return
    me, count = jax.process_index(), jax.process_count()
    text = (
      f"lavit: process {me} of {count} of this run was ended from outside, or"
      " by JAX because another process has died or cannot be reached: the one"
      " whose log ends in another way. Give the same command again on all"
      " hosts: training goes on from the newest checkpoint."
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
      jax.distributed.shutdown()  # it may end this process, with those words
    cls.keep_silent()

  @classmethod
  def keep_silent(cls) -> None:
    """Tells that this process ends in its own way."""
    if cls._shell is not None and cls._shell.stdin is not None:
      with contextlib.suppress(OSError):  # it was killed
        cls._shell.stdin.write(b"done\n")
        cls._shell.stdin.close()
      cls._shell = None


_LOST = re.compile(
  "gloo|closed by peer|connection re(set|fused)|coordination service|heartbeat"
  "|barrier.*(fail|time)|task.*(dead|unhealthy|error)",
  re.IGNORECASE | re.DOTALL,
)


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error says that another process of the run is gone."""
  if isinstance(error, errors.PeerLost):
    return True
  ours = isinstance(error, errors.LavitError) and not isinstance(
    error, errors.CheckpointError
  )
  known = isinstance(error, (RuntimeError, ValueError, OSError))
  several = jax.distributed.is_initialized() and jax.process_count() > 1
  return several and known and not ours and bool(_LOST.search(str(error)))


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Inside, an error of this process ends the run: see `leave`.

  Raises:
    errors.PeerLost: in place of what JAX says where another process died.
  """
  try:
    yield
  except errors.Preempted:
    raise  # all of them end alike
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
  """Prints a text and ends at once if a run of several processes has failed.

  An exit in good order would wait for the others, which wait for this one;
  once it is gone they find out. Otherwise nothing is done.
  """
  if not _LastWords.failed:
    return
  _LastWords.keep_silent()
  sys.stdout.flush()
  print(text, file=sys.stderr, flush=True)
  os._exit(status)


class StopSignal:
  """Knows whether a SIGTERM, a cloud's notice of preemption, has come.

  With several processes the notice of one stops all of them after the same
  step, which JAX's coordination service agrees on. Use it as a context.
  """

  def __init__(self):
    self._asked = threading.Event()
    self._before = None
    # JAX catches the signal itself where there are several processes.
    self._alone = not jax.distributed.is_initialized()

  def __enter__(self) -> "StopSignal":
    main = threading.current_thread() is threading.main_thread()
    if self._alone and main:
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *unused) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _notice(self, *unused):
    self._asked.set()

  def after(self, step: int) -> bool:
    """Whether to save and stop after this step; to be asked after every one.

    Every process gets the same answer.
    """
    if self._alone:
      return self._asked.is_set()
    return multihost_utils.reached_preemption_sync_point(step)
