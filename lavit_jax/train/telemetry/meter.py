"""Accounts for the time of a run, and for the use of its chips.

All wall-clock time belongs to one activity at a time (`ACTIVITIES`); the loop
reports every change of activity. Model FLOPs are those of `flops` for the
tokens and images of a batch, padding left out. Rates cover the time since the
last ones, without evaluation and checkpoints.

Goodput is the share of the wall-clock time since the first start of the run
that was spent in steps which were kept. It excludes time lost to a kill, to
waiting for a machine, to compilation, data, evaluation and checkpoints. For
this the totals are written beside every checkpoint (`goodput.jsonl`).
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

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
_OF_TOKENS = ("llm", "head", "lora")  # networks that read tokens


class Meter:
  """Measures one process of a run; the loop writes the results."""

  def __init__(
    self,
    workdir: epath.Path,
    *,
    resume_step: int = 0,
    chip: chips.Chip | None = None,
    num_devices: int = 1,
    num_shares: int = 1,
    write: bool = True,
    clock: Callable[[], float] = time.time,
  ):
    """Starts to measure, in activity "start".

    Args:
      workdir: of the run.
      resume_step: step of the checkpoint from which the run is resumed.
      chip: of the run; None, and the run has no MFU.
      num_devices: of the whole run.
      num_shares: parts of a batch that processes read, one each.
      write: whether this process writes `goodput.jsonl`.
      clock: returns seconds since 1970.
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
    """Begins an activity, one of `ACTIVITIES`; the one before it is over."""
    self._spent[activity] += 0.0  # an unknown one is a KeyError
    now = self._clock()
    self._spent[self._activity] += now - self._since
    self._activity, self._since = activity, now

  def begin_phase(self, objective: Any, phase: Any) -> None:
    """Begins to count the steps of a phase of an objective."""
    self._useful = useful_flops(objective, phase) if self._chip else None

  def count(self, batch: Mapping[str, np.ndarray], tokens: int) -> None:
    """Counts a step.

    Args:
      batch: host arrays, the share of this process.
      tokens: of this share, padding left out.
    """
    self._steps += 1
    self._tokens += tokens * self._shares
    if self._useful is not None:
      self._flops += self._useful(batch)

  @property
  def goodput(self) -> float:
    """The goodput up to now, in 0 ... 1, of all starts of this run."""
    self.enter(self._activity)
    wall = self._since - self._before.first_start
    return (self._before.kept + self._spent["step"]) / max(wall, 1e-9)

  def rates(self) -> dict[str, float]:
    """Returns times and rates since the last call; {} without a step.

    Names: time/step_s and time/data_wait_s, means of a step; time/compile_s,
    time/evaluation_s and time/checkpoint_s, totals; tokens_per_second and
    tokens_per_second_per_chip, padding left out (a chip of TPU7x is two
    devices); mfu, of all devices' peak, where the chip is known; goodput;
    memory/*_gb, of a device.
    """
    self.enter(self._activity)
    new = {k: v - self._reported[k] for k, v in self._spent.items()}
    if not self._steps:
      return {}
    rates = {
      f"time/{name}_s": new[name] / self._steps
      for name in ("step", "data_wait")
    }
    for name in ("compile", "evaluation", "checkpoint"):
      if new[name]:
        rates[f"time/{name}_s"] = new[name]
    busy = max(new["step"] + new["data_wait"], 1e-9)
    if self._tokens:
      rates["tokens_per_second"] = self._tokens / busy
      chips = self._devices / (self._chip.devices_per_chip if self._chip else 1)
      rates["tokens_per_second_per_chip"] = self._tokens / busy / chips
    if self._chip is not None and self._useful is not None:
      peak = self._chip.flops * self._devices
      rates["mfu"] = self._flops / busy / peak
    self._reported = dict(self._spent)
    self._steps, self._tokens, self._flops = 0, 0, 0.0
    return rates | {"goodput": self.goodput} | memory()

  def saved(self, step: int) -> None:
    """Writes the totals: the steps before `step` are in a checkpoint."""
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
    """Closes `goodput.jsonl`."""
    if self._writer is not None:
      self._writer.close()


class _Before:
  """Totals of the earlier starts of the run, from `goodput.jsonl`."""

  def __init__(
    self,
    first_start: float,
    starts: int = 1,
    kept: float = 0.0,
    lost: dict[str, float] | None = None,
  ):
    self.first_start, self.starts = first_start, starts
    self.kept, self.lost = kept, lost or {}

  @classmethod
  def read(cls, path: epath.Path, step: int, now: float) -> "_Before":
    """Returns the totals at the checkpoint of `step`; see `Meter.saved`."""
    rows = writers.read_json_lines(path) if log_files.pieces(path) else []
    rows = [row for row in rows if "kept_s" in row]
    if not rows:
      return cls(now)
    last = rows[-1]
    kept = max((r["kept_s"] for r in rows if r["step"] <= step), default=0.0)
    lost = {f"{k}_s": last.get(f"{k}_s", 0.0) for k in ACTIVITIES}
    starts = int(last["starts"]) + 1
    return cls(rows[0]["first_start"], starts, kept, lost)


def useful_flops(
  objective: Any, phase: Any
) -> Callable[[Mapping[str, np.ndarray]], float]:
  """Returns a function from host batches to model FLOPs of a global step.

  The FLOPs of networks that read tokens are scaled by the share of positions
  that hold one, and by the keys that these see; of all other networks by the
  share of image slots that hold an image. The batches of all processes are
  taken to be as full as this one's.

  Args:
    objective: of the stage.
    phase: of the run.
  """
  scopes = flops.by_scope(objective, phase)
  first = flops.by_network(objective, scopes, segment=1)
  second = flops.by_network(objective, scopes, segment=2)

  def count(batch) -> float:
    tokens, segment = 1.0, 1.0
    if "segments" in batch:
      used = batch["segments"] > 0
      tokens = float(used.mean())
      # The token at position p of a document of s tokens sees p + 1 keys, on
      # average (s + 1) / 2.
      keys = (batch["positions"][used] + 1.0).mean() if used.any() else 1.0
      segment = 2.0 * float(keys) - 1.0
    images = _images(batch)
    total = 0.0
    for name, value in first.items():
      value += (segment - 1.0) * (second[name] - value)
      total += value * (tokens if name in _OF_TOKENS else images)
    return total

  return count


def _images(batch) -> float:
  """Returns the share of the image slots that hold an image."""
  if "keep" in batch:
    return float(batch["keep"].any(-1).mean())
  if "valid" in batch:
    return float((batch["valid"] > 0).mean())
  return 1.0


def memory() -> dict[str, float]:
  """Returns GB in use, now and at the peak, on the fullest local device.

  With its limit and GB in use on the host: {"memory/device_gb": ...}. Devices
  without statistics (CPUs) are left out.
  """
  numbers = {}
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  for name, key in (
    ("device", "bytes_in_use"),
    ("device_peak", "peak_bytes_in_use"),
    ("device_limit", "bytes_limit"),
  ):
    if values := [s[key] for s in stats if key in s]:
      numbers[f"memory/{name}_gb"] = max(values) / 1e9
  statm = pathlib.Path("/proc/self/statm")
  if statm.exists():
    pages = int(statm.read_text().split()[1])
    numbers["memory/host_gb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
  return numbers
