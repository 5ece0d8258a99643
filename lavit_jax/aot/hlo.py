"""Optimized HLO, read back: what a compiled program says of itself.

XLA's own cost analysis counts the body of a loop once; `Program.runs` says how
often each computation runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_OPERANDS = re.compile(r"\(([^()]*)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(  # of fp8 the dtype goes on, f8e4m3fn
  r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z0-9]*)?)\[([0-9,]*)\](\{[^}]*\})?"
)
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")

_SIZES = {
  "pred": 1,
  "s4": 0.5,
  "u4": 0.5,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
  "c64": 8,
  "c128": 16,
}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result.

  Attributes:
    dtype: of XLA, "bf16".
    shape: of one device.
    layout: of XLA, "{1,0:T(8,128)S(1)}"; S(n) is a memory that is not HBM.
  """

  dtype: str
  shape: tuple[int, ...]
  layout: str = ""

  @property
  def bytes(self) -> float:
    """Without padding."""
    return math.prod(self.shape) * size_of(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: without its %.
    operation: "fusion", "all-gather-start".
    result: its type as text.
    rest: operands and attributes as text, from the "(" of the operands on.
  """

  name: str
  operation: str
  result: str
  rest: str

  @property
  def arrays(self) -> list[Array]:
    """What it makes; several of a tuple."""
    return arrays_in(self.result)

  @property
  def operands(self) -> list[str]:
    """Names of the values that it takes."""
    match = _OPERANDS.match(self.rest)
    return _NAME.findall(match[1]) if match else []

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    if self.operation in ("async-update", "async-done"):
      return []  # these name again what their start has
    names = _CALLED.findall(self.rest)
    for branches in _BRANCHES.findall(self.rest):
      names += [name.strip(" %") for name in branches.split(",")]
    return names


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by their names, and which of them is the entry."""

  computations: dict[str, list[Instruction]]
  entry: str

  def runs(self, entered: Collection[str] | None = None) -> dict[str, int]:
    """How often each computation runs in one run of the program.

    All branches of a conditional count.

    Args:
      entered: operations whose computations count; None: all.
    """
    times = {self.entry: 1}
    for name in self._callers_first():
      for one in self.computations[name]:
        if entered is None or one.operation in entered:
          for called in one.called:
            inner = times.get(name, 0) * self.trips(one)
            times[called] = times.get(called, 0) + inner
    return times

  def total(
    self,
    of: Callable[[Instruction, dict[str, Instruction]], float],
    entered: Collection[str] | None = None,
  ) -> float:
    """Sum over all instructions, each as often as it runs.

    Args:
      of: (instruction, all of its computation by name) to a number.
      entered: see `runs`.
    """
    total = 0.0
    for name, times in self.runs(entered).items():
      lines = self.computations.get(name, [])
      beside = {one.name: one for one in lines}
      total += times * sum(of(one, beside) for one in lines)
    return total

  def trips(self, one: Instruction) -> int:
    """How often an instruction runs what it calls: once, if it is no loop.

    A loop's count is XLA's `known_trip_count`, or the constant that its
    condition compares the counter with over the counter's step.
    """
    if one.operation != "while":
      return 1
    if match := _TRIPS.search(one.rest):
      return int(match[1])
    condition = self.computations.get(_CONDITION.search(one.rest)[1], [])
    bounds = [found for line in condition if (found := _constant(line))]
    return math.ceil(max(bounds, default=1) / self._step(one, condition))

  def _step(self, loop: Instruction, condition) -> int:
    """What a loop adds to its counter each turn; 1 if it does not say."""
    body = self.computations.get(_BODY.search(loop.rest)[1], [])
    compared = _INDEX.search(
      next((x.rest for x in condition if "get-tuple" in x.operation), "")
    )
    made = {line.name: line for line in body}
    if not compared or not body or body[-1].operation != "tuple":
      return 1
    added = made.get(body[-1].operands[int(compared[1])])
    if added is None or added.operation != "add":
      return 1
    steps = [_constant(made[x]) for x in added.operands if x in made]
    return next((step for step in steps if step), 1)

  def _callers_first(self) -> list[str]:
    """Computations that the entry reaches, each after all that call it."""
    done: dict[str, None] = {}
    waiting = [(self.entry, False)]
    while waiting:
      name, left = waiting.pop()
      if left:
        done[name] = None
      elif name in self.computations and name not in done:
        waiting.append((name, True))
        waiting += [
          (called, False)
          for one in self.computations[name]
          for called in one.called
        ]
    return list(reversed(done))


def read(text: str) -> Program:
  """Reads `compiled.as_text()`, or a program that XLA has dumped."""
  made: dict[str, list[Instruction]] = {}
  entry, lines = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = made.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":
      lines = None
    elif lines is not None and (one := _instruction(line)):
      lines.append(one)
  return Program(made, entry)


def _instruction(line: str) -> Instruction | None:
  """None of a line that is none."""
  match = _INSTRUCTION.match(line)
  operation = _OPERATION.search(match[2]) if match else None
  if not operation:
    return None
  # A result of one array ends where the operation's name begins.
  result, rest = match[2][: operation.start(1)], match[2][operation.end(1) :]
  return Instruction(match[1], operation[1], result, rest)


def arrays_in(text: str) -> list[Array]:
  """All arrays that a text names, "(f32[8,2]{1,0}, u32[])"."""
  return [
    Array(dtype, dims(shape), layout)
    for dtype, shape, layout in _ARRAY.findall(text)
  ]


def dims(text: str) -> tuple[int, ...]:
  """Sizes of "8,128"."""
  return tuple(int(size) for size in text.split(",") if size)


def size_of(dtype: str) -> float:
  """Bytes of one element; 0 of a token."""
  return 1 if dtype.startswith("f8") else _SIZES.get(dtype, 0)


def _constant(one: Instruction) -> int:
  """The value of a whole constant above 0; else 0."""
  value = one.rest[1:].partition(")")[0]
  return int(value) if one.operation == "constant" and value.isdigit() else 0
