"""The figures as a Markdown table, and what they were measured on."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

from side_by_side import worker

_QUIET = 0.05  # share of the machine that others may use
_COUNTED = 0.05  # CPU seconds of others below which the count is too coarse


def origin(threads: int) -> dict:
  """Date, machine and the versions that both sides share."""
  numpy = importlib.metadata.version("numpy")
  return {
    "date": datetime.date.today().isoformat(),
    "machine": {
      "cpu": _cpu(),
      "cores": os.cpu_count(),
      "threads": threads,
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
    },
    "versions": {"python": platform.python_version(), "numpy": numpy},
  }


def _cpu():
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":")[1].strip()
  return platform.processor() or platform.machine()


def table(report) -> str:
  """The rows of a report as Markdown, a line about the machine before."""
  on, versions = report["machine"], report["versions"]
  listed = ", ".join(f"{name} {x}" for name, x in versions.items())
  head = ("case", "batch", "PyTorch s", "ours s", "ratio", "compile s")
  head += ("PyTorch a second", "ours a second")
  lines = [
    f"{on['cpu']}, {on['threads']} of {on['cores']} cores, {report['date']};"
    f" {listed}; median of {report['repeats']}",
    _others(report["rows"]),
    "",
    f"| {' | '.join(head)} |",
    f"|{'---|' * len(head)}",
  ]
  lines += [f"| {' | '.join(_cells(row))} |" for row in report["rows"]]
  return "\n".join(lines)


def _others(rows):
  """A line about other programs on the machine."""
  if any(row["others_cpu_s"] is None for row in rows):
    return "Whether other programs ran meanwhile is not known here."
  taken = sum(row["others_cpu_s"] for row in rows)
  share = taken / (sum(row["wall_s"] for row in rows) * os.cpu_count())
  text = f"Other programs used {share:.1%} of the machine meanwhile."
  if any(map(_noisy, rows)):
    text += (
      " Rows marked noisy say little, least of all about PyTorch, whose"
      " threads wait for one another: time them again on an idle machine."
    )
  return text


def _noisy(row):
  taken = row["others_cpu_s"] or 0.0
  share = taken / (row["wall_s"] * os.cpu_count())
  return taken > _COUNTED and share > _QUIET


def _cells(row):
  seconds = {s: row[s]["median_s"] for s in worker.SIDES if s in row}
  times = [f"{seconds[s]:.3f}" if s in seconds else "-" for s in worker.SIDES]
  rates = [
    f"{row['count'] / seconds[s]:.1f} {row['unit']}"
    if s in seconds and row["count"]
    else "-"
    for s in worker.SIDES
  ]
  both = len(seconds) == len(worker.SIDES)
  ratio = f"{seconds['torch'] / seconds['ours']:.2f}" if both else "-"
  ratio += " (noisy)" if _noisy(row) else ""
  compiled = f"{row['ours']['compile_s']:.1f}" if "ours" in row else "-"
  return [row["case"], str(row["batch"]), *times, ratio, compiled, *rates]
