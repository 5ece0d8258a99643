"""The collectives of a compiled program: what its chips send each other."""

import dataclasses
import math
import re
from collections.abc import Iterator

from lavit_jax.aot import hlo

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

_CHANNEL = re.compile(r"channel_id=(\d+)")
# Three ways of writing groups: {{0,1},{2,3}}, [groups,size]<=[...], and
# mesh['a'=2,'b'=4] {'b'}, where 'b':(2)2 is a part of an axis.
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
_MESH_PART = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")

# On TPUs an all-reduce of which each chip keeps its own part is a fusion.
_REDUCE_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of `KINDS`.
    dtype: of XLA, "bf16"; the largest array's.
    bytes: of the whole result on a chip; of the operand for reduce-scatter.
    group_size: chips that take part together.
    times: how often it runs in one run of the program.
  """

  kind: str
  dtype: str
  bytes: float
  group_size: int
  times: int = 1


@dataclasses.dataclass(frozen=True)
class _Found:
  """A collective, its channel ("" for none), and the computation it is in."""

  collective: Collective
  channel: str
  computation: str


def of_program(program: hlo.Program) -> list[Collective]:
  """Returns the collectives of an optimized program, as one chip runs it.

  Those in a loop count as often as it runs. A collective that runs beside
  computation, as a start and a done or as several fusions of one channel,
  counts once.
  """
  known: dict[str, list[_Found]] = {}

  def in_computation(name: str) -> list[_Found]:
    """Finds those of a computation and of all that it calls."""
    if name not in known:
      known[name] = []  # stays so for a computation that is missing
      found, channels = [], dict[str, str]()
      for line in program.computations.get(name, ()):
        for one in in_line(line, name):
          first = channels.setdefault(one.channel, one.computation)
          if not one.channel or first == one.computation:
            found.append(one)
      known[name] = found
    return known[name]

  def in_line(line: hlo.Instruction, computation: str) -> Iterator[_Found]:
    if line.operation.removesuffix("-start") in KINDS:
      match = _CHANNEL.search(line.rest)
      channel = match[1] if match else ""
      yield _Found(_collective(line, computation), channel, computation)
      return
    times = program.trips(line)
    for name in line.called:
      for one in in_computation(name):
        total = one.collective.times * times
        repeated = dataclasses.replace(one.collective, times=total)
        yield dataclasses.replace(one, collective=repeated)

  return [one.collective for one in in_computation(program.entry)]


def _collective(line: hlo.Instruction, computation: str) -> Collective:
  """Describes the collective of an instruction in a computation."""
  kind = line.operation.removesuffix("-start")
  is_start = line.operation != kind
  if kind == "all-reduce" and computation.startswith(_REDUCE_SCATTER):
    kind = "reduce-scatter"
    is_start = False
  # Scalars of a start are its context.
  arrays = [a for a in line.arrays if a.shape or not is_start]
  if is_start and kind in ("all-gather", "collective-permute"):
    arrays = arrays[len(arrays) // 2 :]  # (operands, results)
  largest = max(arrays, key=lambda a: a.bytes, default=hlo.Array("", ()))
  size, group = math.fsum(a.bytes for a in arrays), _group_size(line.rest)
  if line.operation.startswith("reduce-scatter"):
    size *= group
  return Collective(kind, largest.dtype, size, group)


def _group_size(rest: str) -> int:
  """Returns the chips of one group; 2 for a permutation."""
  if match := _IOTA_GROUPS.search(rest):
    return int(match[2])
  if match := _GROUPS.search(rest):
    return len(match[1].split(","))
  if match := _MESH_GROUPS.search(rest):
    sizes = dict(_MESH_AXIS.findall(match[1]))
    parts = _MESH_PART.findall(match[2])
    return math.prod(int(part or sizes[name]) for name, part in parts)
  return 2 if "source_target_pairs=" in rest else 1
