"""A process for each side, so that their threads do not meet.

The parent asks by name and waits; a worker that fails shows its traceback
and ends, which ends the parent.
"""

import concurrent.futures
import importlib
import multiprocessing
import os
import pathlib
import time

# A process of its own for each side: nothing here may import JAX or PyTorch.
SIDES = {"torch": "pytorch", "ours": "ours"}
_SHARE = ".55"  # of a GPU's memory that JAX takes at once: PyTorch needs some


class Worker:
  """One side, in its process."""

  def __init__(
    self, side: str, folder, sizes, threads: int, modules=SIDES, device="cpu"
  ):
    """Starts it; `side` is a key of `modules`, which name files here.

    `device` is "cpu", or "gpu" for the first one of the machine.
    """
    spawn = multiprocessing.get_context("spawn")
    self._pipe, other = spawn.Pipe()
    args = (other, modules[side], str(folder), sizes, threads, device)
    self._process = spawn.Process(target=_serve, args=args, daemon=True)
    self._process.start()
    other.close()
    self._side = side

  def ask(self, method: str, *args):
    """What the method of `_Timer` returns.

    Raises:
      SystemExit: the worker failed; it has said why.
    """
    try:
      self._pipe.send((method, args))
      return self._pipe.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as e:
      raise SystemExit(f"{self._side}: the worker ended, see above.") from e

  def close(self):
    """Ends the process."""
    self._pipe.close()
    self._process.join()


def apart(function, *args):
  """Calls a function, named "module.name" here, in a process of its own."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(_call, function, args).result()


def _call(function, args):
  _restrict(os.cpu_count())
  module, name = function.split(".")
  return getattr(importlib.import_module(f"side_by_side.{module}"), name)(*args)


def _restrict(threads, device="cpu"):
  """Before JAX or PyTorch is imported: CPU only, on so many cores; or a GPU."""
  os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compiling is timed
  if device == "gpu":
    os.environ["JAX_PLATFORMS"] = "cuda"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = _SHARE
    return
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["OMP_NUM_THREADS"] = str(threads)
  if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as cores
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])


def _serve(pipe, module, folder, sizes, threads, device):
  """Answers until the parent closes the pipe."""
  _restrict(threads, device)
  side = importlib.import_module(f"side_by_side.{module}").Side
  timer = _Timer(side(folder, sizes, threads))
  while True:
    try:
      method, args = pipe.recv()
    except EOFError:
      return
    pipe.send(getattr(timer, method)(*args))


class _Timer:
  """Runs and times the work of a side."""

  def __init__(self, side):
    self._side = side
    self._work = {}

  def versions(self):
    return self._side.versions()

  def peak(self):
    """Most memory held so far, in MB."""
    return self._side.peak()

  def about(self):
    """What the side says of its device and its work, of a training step."""
    return self._side.about()

  def convolutions(self, shapes):
    """GFLOP/s of each, see `unet_cases.CONVOLUTIONS`."""
    return self._side.convolutions(shapes)

  def first(self, case, batch):
    """(seconds of the first call, compiling included; what it gave)."""
    self._work[case.name, batch] = self._side.work(case, batch)
    return self._timed(case, batch)

  def judged(self, case, batch):
    """What is compared beside the first call's result, or None."""
    work = self._side.judged(case, batch)
    return None if work is None else work()

  def again(self, case, batch):
    """Seconds of one more call; CPU seconds of others meanwhile, or None."""
    before, own = _busy_seconds(), time.process_time()
    seconds, _ = self._timed(case, batch)
    if before is None:
      return seconds, None
    own = time.process_time() - own
    return seconds, _busy_seconds() - before - own

  def profile(self, case, batch, repeats, directory):
    """Calls under a profiler, which writes into the directory."""
    os.makedirs(directory, exist_ok=True)
    with self._side.profile(directory):
      for _ in range(repeats):
        self._timed(case, batch)

  def _timed(self, case, batch):
    work = self._work[case.name, batch]
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _busy_seconds():
  """CPU seconds of all processes so far, None where nothing counts them."""
  path = pathlib.Path("/proc/stat")
  if not path.exists():
    return None
  ticks = [int(x) for x in path.read_text().split("\n", 1)[0].split()[1:]]
  user, nice, system, _idle, _wait, irq, softirq, stolen = ticks[:8]
  busy = user + nice + system + irq + softirq + stolen
  return busy / os.sysconf("SC_CLK_TCK")
