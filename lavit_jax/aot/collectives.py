"""What the chips of a compiled program send each other."""

import dataclasses
import math
import re

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


def of_program(program: hlo.Program) -> list[Collective]:
  """The collectives of an optimized program, as one chip runs it.

  Those in a loop count as often as it runs. What runs beside computation, in
  a start and a done or in several fusions of one channel, counts once.
  """
  found: dict[str, list[tuple[Collective, str, str]]] = {}

  def inside(name):
    """(collective, its channel, computation that has it), nested ones too."""
    if name not in found:
      found[name] = []  # of a computation that is not there
      made, channels = [], {}
      for line in program.computations.get(name, ()):
        for one, channel, where in of_line(line, name):
          if not channel or channels.setdefault(channel, where) == where:
            made.append((one, channel, where))
      found[name] = made
    return found[name]

  def of_line(line, where):
    if line.operation.removesuffix("-start") in KINDS:
      channel = _CHANNEL.search(line.rest)
      return [(_collective(line, where), channel[1] if channel else "", where)]
    times = program.trips(line)
    return [
      (dataclasses.replace(one, times=one.times * times), channel, origin)
      for name in line.called
      for one, channel, origin in inside(name)
    ]

  return [one for one, _, _ in inside(program.entry)]


def _collective(line: hlo.Instruction, where: str) -> Collective:
  """What one instruction sends, which stands in the computation `where`."""
  kind = line.operation.removesuffix("-start")
  is_start = line.operation != kind
  if kind == "all-reduce" and where.startswith(_REDUCE_SCATTER):
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
  """Chips of one group; of a permutation 2."""
  if match := _IOTA_GROUPS.search(rest):
    return int(match[2])
  if match := _GROUPS.search(rest):
    return len(match[1].split(","))
  if match := _MESH_GROUPS.search(rest):
    sizes = dict(_MESH_AXIS.findall(match[1]))
    parts = _MESH_PART.findall(match[2])
    return math.prod(int(part or sizes[name]) for name, part in parts)
  return 2 if "source_target_pairs=" in rest else 1
