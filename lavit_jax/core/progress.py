"""Progress of long work: a bar in a terminal, plain lines in a log."""

import collections
import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

_WINDOW = 30.0  # seconds over which rates are averaged
_BAR = 24  # characters


@dataclasses.dataclass(frozen=True)
class _Totals:
  """Totals at the end of one step; `busy` is the time without pauses."""

  step: int
  busy: float = 0.0
  waited: float = 0.0
  examples: int = 0
  tokens: int = 0


class Progress:
  """Shows the progress of a stage and its rates.

  In a terminal one line is redrawn, at most ten times per second. Elsewhere a
  plain line is printed every `every` seconds, without carriage returns. Rates
  are means of the last half minute without the first step, which compiles and
  would distort the estimate of the remaining time.

  ```
  with Progress(total=100, label="tokenizer") as bar:
    for step in range(100):
      with bar.waiting():
        batch = next(batches)
      ...
      bar.update(step + 1, examples=64, tokens=900, metrics={"loss": loss})
      if evaluate_now:
        with bar.paused():
          ...
  ```
  """

  def __init__(
    self,
    total: int,
    *,
    start: int = 0,
    label: str = "",
    every: float = 10.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total = total
    self._label = label
    self._stream = sys.stderr if stream is None else stream
    self._terminal = self._stream.isatty()
    self._every = 0.1 if self._terminal else every
    self._clock = clock
    self._begin = self._drawn = clock()
    self._paused = self._waited = 0.0
    self._waits = False  # whether `waiting` is used at all
    self._history = collections.deque([_Totals(start)])
    self._first = True  # no step is done yet
    self._metrics: dict[str, float] = {}
    self._fresh = False  # steps were done since the last line
    self._unended = False  # the terminal's last line says "compiling"

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as time spent waiting for data."""
    self._waits = True
    before = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - before

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside from the rates, as for evaluation and saving."""
    before = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - before

  def compiling(self) -> None:
    """Shows that the next step is compiled first, until that step is done."""
    text = f"{self._label}: compiling the step (a minute or so)".lstrip(": ")
    if self._terminal:
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"\r{text[:width]}\x1b[K")
      self._unended = True
    else:
      self._stream.write(text + "\n")
    self._stream.flush()

  def update(
    self,
    step: int,
    *,
    examples: int = 0,
    tokens: int = 0,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Reports finished steps.

    Args:
      step: number of finished steps.
      examples: examples in the last step.
      tokens: tokens in the last step.
      metrics: numbers to show, by name; earlier ones remain.
    """
    now = self._clock()
    busy = now - self._begin - self._paused
    last = self._history[-1]
    examples, tokens = last.examples + examples, last.tokens + tokens
    self._history.append(_Totals(step, busy, self._waited, examples, tokens))
    if self._first:
      self._history.popleft()
      self._first = False
    while len(self._history) > 2 and busy - self._history[1].busy >= _WINDOW:
      self._history.popleft()
    self._metrics.update(metrics or {})
    self._fresh, self._unended = True, False
    if now - self._drawn >= self._every or (
      self._terminal and step == self._total
    ):
      self._draw(now)

  def rates(self) -> dict[str, float]:
    """Returns means of the last half minute, to be written with the metrics.

    Names are steps_per_second, examples_per_second, tokens_per_second and
    data_wait_share (0 to 1). There are none before the second step.
    """
    first, last = self._history[0], self._history[-1]
    seconds = last.busy - first.busy
    if seconds <= 0:
      return {}
    return {
      "steps_per_second": (last.step - first.step) / seconds,
      "examples_per_second": (last.examples - first.examples) / seconds,
      "tokens_per_second": (last.tokens - first.tokens) / seconds,
      "data_wait_share": min((last.waited - first.waited) / seconds, 1.0),
    }

  def print(self, text: str) -> None:
    """Prints a separate line without breaking the bar."""
    if self._terminal:
      self._stream.write("\r\x1b[K")
    self._stream.write(text + "\n")
    if self._terminal and self._fresh:
      self._draw(self._clock())
    self._stream.flush()

  def close(self) -> None:
    """Prints the last state, unless it was printed, and ends the line."""
    if self._fresh:
      self._draw(self._clock())
      if self._terminal:
        self._stream.write("\n")
      self._fresh = False
    elif self._unended:
      self._stream.write("\n")
    self._unended = False
    self._stream.flush()

  def _draw(self, now: float) -> None:
    self._drawn = now
    line = self._line(now)
    if self._terminal:
      width = shutil.get_terminal_size().columns - 1
      self._stream.write(f"\r{line[:width]}\x1b[K")
    else:
      self._stream.write(line + "\n")
      self._fresh = False
    self._stream.flush()

  def _line(self, now: float) -> str:
    step = self._history[-1].step
    share = min(step / self._total, 1.0) if self._total else 1.0
    rates = self.rates()
    fields = [f"{step}/{self._total}", f"{duration(now - self._begin)} gone"]
    if rates.get("steps_per_second") and step < self._total:
      left = (self._total - step) / rates["steps_per_second"]
      fields.append(f"{duration(left)} left")
    for name, unit in (("examples", "ex/s"), ("tokens", "tok/s")):
      if rate := rates.get(f"{name}_per_second"):
        fields.append(f"{quantity(rate)} {unit}")
    if rates and self._waits:
      fields.append(f"data wait {rates['data_wait_share']:.0%}")
    fields += [f"{name} {value:.4g}" for name, value in self._metrics.items()]
    if self._terminal:
      full = round(share * _BAR)
      fields.insert(0, "█" * full + "░" * (_BAR - full))
    head = f"{self._label} {share:4.0%}".strip()
    return "  ".join([head, *fields])


def duration(seconds: float) -> str:
  """Formats seconds: 42 → "42s", 150 → "2m30s", 3720 → "1h02m"."""
  seconds = round(max(seconds, 0.0))
  if seconds < 60:
    return f"{seconds}s"
  minutes, seconds = divmod(seconds, 60)
  if minutes < 60:
    return f"{minutes}m{seconds:02d}s"
  hours, minutes = divmod(minutes, 60)
  return f"{hours}h{minutes:02d}m"


def quantity(value: float) -> str:
  """Formats three digits and a suffix: 12.34 → "12.3", 1234 → "1.23k"."""
  for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= 0.9995 * factor:  # 999.6 reads 1k
      return f"{value / factor:.3g}{suffix}"
  return f"{value:.3g}"
