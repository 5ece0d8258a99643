"""Where the time of a run goes, and how well the chips are used.

All wall-clock time belongs to one activity at a time (`ACTIVITIES`); the loop
says when it turns to another. Model FLOPs are those of `flops`, of the tokens
and images that are there: padding is not useful. The rates written are
those of the time since the last ones, evaluation and checkpoints left out.

Goodput is the share of the wall-clock time since the first start of the run
that went into steps which were kept: what was lost to a kill, to waiting for
a machine, to compilation, data, evaluation and checkpoints is missing. For
this the totals are written beside every checkpoint (`goodput.jsonl`).
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lavit_jax.core.storage import log_files
from lavit_jax.cost import chips
from lavit_jax.train.telemetry import flops, writers

ACTIVITIES = (
  "start",
  "compile",
  "data_wait",
  "step",
  "evaluation",
  "checkpoint",
)
_OF_TOKENS = ("llm", "head", "lora")


class Meter:
  """Measures one process of a run; the loop writes what it finds.

  Attributes:
    goodput: in 0 ... 1, now.
  """

  def __init__(
    self,
    workdir,
    *,
    resume_step: int = 0,
    chip: chips.Chip | None = None,
    num_devices: int = 1,
    num_shares: int = 1,
    write: bool = True,
    clock: Callable[[], float] = time.time,
  ):
    """Starts to measure, as activity "start".

    Args:
      workdir: path of the run.
      resume_step: step of the checkpoint that it goes on from.
      chip: without one there is no MFU.
      num_devices: of the whole run.
      num_shares: into which processes cut a batch, each reading one.
      write: whether this process writes `goodput.jsonl`.
      clock: seconds since 1970.
    """
    self._clock, self._chip = clock, chip
    self._devices, self._shares = num_devices, num_shares
    self._activity, self._since = "start", clock()
    self._spent = dict.fromkeys(ACTIVITIES, 0.0)
    self._reported = dict(self._spent)
    self._steps, self._tokens, self._flops = 0, 0, 0.0
    self._useful: Callable[[Mapping], float] | None = None
    self._writer = None
    self._before = _Before(self._since)
    if write:
      path = workdir / writers.GOODPUT
      self._before = _Before.read(path, resume_step, self._since)
      self._writer = writers.JsonLinesWriter(path, resume_step=resume_step)
      self.saved(resume_step)

  def enter(self, activity: str) -> None:
    """Says what is done from now on."""
    self._spent[activity] += 0.0  # an unknown one is a KeyError
    now = self._clock()
    self._spent[self._activity] += now - self._since
    self._activity, self._since = activity, now

  def begin_phase(self, objective, phase) -> None:
    """Says whose steps are counted from now on."""
    self._useful = useful_flops(objective, phase) if self._chip else None

  def count(self, batch: Mapping[str, np.ndarray], tokens: int) -> None:
    """Counts a step by its host batch, the share of this process."""
    self._steps += 1
    self._tokens += tokens * self._shares
    if self._useful is not None:
      self._flops += self._useful(batch)

  @property
  def goodput(self) -> float:
    """Of this run with all its starts."""
    self.enter(self._activity)
    wall = self._since - self._before.first_start
    return (self._before.kept + self._spent["step"]) / max(wall, 1e-9)

  def rates(self) -> dict[str, float]:
    """What is worth writing, since the last call; nothing without a step.

    Names: time/step_s and time/data_wait_s, means of a step; time/compile_s,
    time/evaluation_s and time/checkpoint_s, in all; tokens_per_second and
    tokens_per_second_per_chip, padding left out (a chip of TPU7x is two
    devices); mfu, where the chip is known, of all devices' peak; goodput;
    memory/*_gb, of a device.
    """
    self.enter(self._activity)
    new = {k: v - self._reported[k] for k, v in self._spent.items()}
    if not self._steps:
      return {}
    found = {
      f"time/{name}_s": new[name] / self._steps
      for name in ("step", "data_wait")
    }
    for name in ("compile", "evaluation", "checkpoint"):
      if new[name]:
        found[f"time/{name}_s"] = new[name]
    busy = max(new["step"] + new["data_wait"], 1e-9)
    if self._tokens:
      found["tokens_per_second"] = self._tokens / busy
      chips = self._devices / (self._chip.devices_per_chip if self._chip else 1)
      found["tokens_per_second_per_chip"] = self._tokens / busy / chips
    if self._chip is not None and self._useful is not None:
      most = self._chip.flops * self._devices
      found["mfu"] = self._flops / busy / most
    self._reported = dict(self._spent)
    self._steps, self._tokens, self._flops = 0, 0, 0.0
    return found | {"goodput": self.goodput} | memory()

  def saved(self, step: int) -> None:
    """Says that all steps before this one are kept."""
    self.enter(self._activity)
    if self._writer is None:
      return
    before = self._before
    lost = {
      f"{name}_s": before.lost.get(f"{name}_s", 0.0) + self._spent[name]
      for name in ACTIVITIES
      if name != "step"
    }
    kept = {"kept_s": before.kept + self._spent["step"]}
    start = {"first_start": before.first_start, "starts": before.starts}
    self._writer.write_scalars(step, kept | lost | start)

  def close(self) -> None:
    """Writes no more."""
    if self._writer is not None:
      self._writer.close()


class _Before:
  """What earlier starts of the run left in `goodput.jsonl`."""

  def __init__(self, first_start, starts=1, kept=0.0, lost=None):
    self.first_start, self.starts = first_start, starts
    self.kept, self.lost = kept, lost or {}

  @classmethod
  def read(cls, path, step: int, now: float) -> "_Before":
    """The totals of the checkpoint of `step`; see `Meter.saved`."""
    rows = writers.read_json_lines(path) if log_files.pieces(path) else []
    rows = [row for row in rows if "kept_s" in row]
    if not rows:
      return cls(now)
    last = rows[-1]
    kept = max((r["kept_s"] for r in rows if r["step"] <= step), default=0.0)
    lost = {f"{k}_s": last.get(f"{k}_s", 0.0) for k in ACTIVITIES}
    starts = int(last["starts"]) + 1
    return cls(rows[0]["first_start"], starts, kept, lost)


def useful_flops(objective, phase) -> Callable[[Mapping], float]:
  """A function from host batches to model FLOPs of a whole step.

  Parts that read tokens count by the share of a batch that is tokens, and by
  how many keys these see; all others by the share of images that are there.
  Every process is taken to have as full a batch as this one.

  Args:
    objective: of the stage.
    phase: of the run.
  """
  first = flops.of_step(objective, phase, segment=1)
  second = flops.of_step(objective, phase, segment=2)

  def count(batch) -> float:
    tokens, segment = 1.0, 1.0
    if "segments" in batch:
      there = batch["segments"] > 0
      tokens = float(there.mean())
      # A token at place p of a document of s tokens sees p + 1 keys, on
      # average (s + 1) / 2.
      seen = (batch["positions"][there] + 1.0).mean() if there.any() else 1.0
      segment = 2.0 * float(seen) - 1.0
    images = _images(batch)
    total = 0.0
    for name, value in first.items():
      value += (segment - 1.0) * (second[name] - value)
      total += value * (tokens if name in _OF_TOKENS else images)
    return total

  return count


def _images(batch) -> float:
  """The share of the places for images that have one."""
  if "keep" in batch:
    return float(batch["keep"].any(-1).mean())
  if "valid" in batch:
    return float((batch["valid"] > 0).mean())
  return 1.0


def memory() -> dict[str, float]:
  """GB in use on the fullest local device, at most so far, and on the host.

  Devices that do not tell (CPUs) are left out.
  """
  found = {}
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  for name, key in (
    ("device", "bytes_in_use"),
    ("device_peak", "peak_bytes_in_use"),
    ("device_limit", "bytes_limit"),
  ):
    if values := [s[key] for s in stats if key in s]:
      found[f"memory/{name}_gb"] = max(values) / 1e9
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():
    pages = int(statm.read_text().split()[1])
    found["memory/host_gb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
  return found
