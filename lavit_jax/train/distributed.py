"""One run by several processes: who joins whom, and when to stop together.

On Cloud TPU, under SLURM and other clusters that JAX knows, LAVIT_DISTRIBUTED=1
is enough; by hand, each process is told

  LAVIT_COORDINATOR=host:port  LAVIT_NUM_PROCESSES=n  LAVIT_PROCESS_ID=0 ... n-1

Without any of these a run is one process.
"""

import os
import signal
import threading
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from lavit_jax import errors

HEARTBEAT_SECONDS = 30  # after which a silent process counts as dead
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
      **told, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as e:
    raise errors.Unreachable(
      "This process could not join the others of its run"
      f" ({' '.join(str(e).split())[:300]}). Check that all of them were"
      f" started, and that {given.get(_BY_HAND[0]) or 'the coordinator'} can be"
      " reached from here."
    ) from e


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
