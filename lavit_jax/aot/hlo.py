"""Parses the text of optimized HLO.

XLA's own cost analysis counts the body of a loop once; `Program.runs` counts
how often each computation runs.
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
_ARRAY = re.compile(  # fp8 dtypes have a longer name: f8e4m3fn
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
    """Bytes without padding."""
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
    """The arrays of its result; several of a tuple."""
    return arrays_in(self.result)

  @property
  def operands(self) -> list[str]:
    """Names of its operands."""
    match = _OPERANDS.match(self.rest)
    return _NAME.findall(match[1]) if match else []

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    if self.operation in ("async-update", "async-done"):
      return []  # their start has named the same
    names = _CALLED.findall(self.rest)
    for branches in _BRANCHES.findall(self.rest):
      names += [name.strip(" %") for name in branches.split(",")]
    return names


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: by name, their instructions in order.
    entry: name of the computation that the program runs.
  """

  computations: dict[str, list[Instruction]]
  entry: str

  def runs(self, entered: Collection[str] | None = None) -> dict[str, int]:
    """Counts how often each computation runs in one run of the program.

    All branches of a conditional count.

    Args:
      entered: operations whose computations count; None for all.

    Returns:
      {computation: times}.
    """
    times = {self.entry: 1}
    for name in self._callers_first():
      for line in self.computations[name]:
        if entered is None or line.operation in entered:
          for called in line.called:
            inner = times.get(name, 0) * self.trips(line)
            times[called] = times.get(called, 0) + inner
    return times

  def total(
    self,
    value: Callable[[Instruction, dict[str, Instruction]], float],
    entered: Collection[str] | None = None,
  ) -> float:
    """Sums a value over all instructions, each as often as it runs.

    Args:
      value: maps (instruction, all of its computation by name) to a number.
      entered: see `runs`.
    """
    total = 0.0
    for name, times in self.runs(entered).items():
      lines = self.computations.get(name, [])
      by_name = {line.name: line for line in lines}
      total += times * sum(value(line, by_name) for line in lines)
    return total

  def trips(self, line: Instruction) -> int:
    """Returns how often an instruction runs what it calls; 1 but for loops.

    A loop's count is XLA's `known_trip_count`, or the constant that its
    condition compares the counter with over the counter's step.
    """
    if line.operation != "while":
      return 1
    if match := _TRIPS.search(line.rest):
      return int(match[1])
    condition = self._called_as(_CONDITION, line)
    bounds = [bound for one in condition if (bound := _constant(one))]
    return math.ceil(max(bounds, default=1) / self._step(line, condition))

  def _called_as(
    self, role: re.Pattern[str], line: Instruction
  ) -> list[Instruction]:
    """Returns a computation that an instruction names in a role."""
    match = role.search(line.rest)
    return self.computations.get(match[1], []) if match else []

  def _step(self, loop: Instruction, condition: list[Instruction]) -> int:
    """Returns what a loop adds to its counter each time; 1 if unknown."""
    body = self._called_as(_BODY, loop)
    compared = _INDEX.search(
      next((x.rest for x in condition if "get-tuple" in x.operation), "")
    )
    by_name = {line.name: line for line in body}
    if not compared or not body or body[-1].operation != "tuple":
      return 1
    counter = by_name.get(body[-1].operands[int(compared[1])])
    if counter is None or counter.operation != "add":
      return 1
    steps = [_constant(by_name[x]) for x in counter.operands if x in by_name]
    return next((step for step in steps if step), 1)

  def _callers_first(self) -> list[str]:
    """Returns the computations in use, each after all that call it."""
    done: dict[str, None] = {}
    todo = [(self.entry, False)]  # (name, whether all it calls are done)
    while todo:
      name, is_last = todo.pop()
      if is_last:
        done[name] = None
      elif name in self.computations and name not in done:
        todo.append((name, True))
        todo += [
          (called, False)
          for line in self.computations[name]
          for called in line.called
        ]
    return list(reversed(done))


def read(text: str) -> Program:
  """Parses `compiled.as_text()`, or a program that XLA has dumped."""
  computations: dict[str, list[Instruction]] = {}
  entry, lines = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":
      lines = None
    elif lines is not None and (instruction := _instruction(line)):
      lines.append(instruction)
  return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
  """Parses a line; None if it is no instruction."""
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  operation = _OPERATION.search(match[2])
  if operation is None:
    return None
  # A result of one array ends where the operation's name begins.
  result, rest = match[2][: operation.start(1)], match[2][operation.end(1) :]
  return Instruction(match[1], operation[1], result, rest)


def arrays_in(text: str) -> list[Array]:
  """Parses all arrays of a text such as "(f32[8,2]{1,0}, u32[])"."""
  return [
    Array(dtype, dims(shape), layout)
    for dtype, shape, layout in _ARRAY.findall(text)
  ]


def dims(text: str) -> tuple[int, ...]:
  """Parses sizes such as "8,128"."""
  return tuple(int(size) for size in text.split(",") if size)


def size_of(dtype: str) -> float:
  """Returns the bytes of one element; 0 for a token."""
  return 1 if dtype.startswith("f8") else _SIZES.get(dtype, 0)


def _constant(line: Instruction) -> int:
  """Returns the value of a positive integer constant; else 0."""
  value = line.rest[1:].partition(")")[0]
  return int(value) if line.operation == "constant" and value.isdigit() else 0
