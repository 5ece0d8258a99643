"""The least time that a step can take on a chip, and what a program sends.

Nothing here is measured. A step does three things, each as fast as the chip's
table says it can be done at most:

  compute  executed FLOPs at the peak of bf16 products, recomputation included
  HBM      bytes read and written; those of a program are XLA's own estimate
  ICI      collectives by rings over the axes of the torus, both ways at once:
           a group of n chips that gathers B bytes receives (n - 1) / n B of
           them over its links: see `topology.links`. Groups of a size that no
           axes of the mesh make are taken to have those of one axis.

`step_s` is the largest of the three: perfect overlap. `step_s_no_overlap` is
compute + ICI, as if nothing were sent while anything is computed; HBM counts
only if it is above compute. The truth lies between. Kernel launches, latency
of collectives, work of the vector units and the host are left out.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from lavit_jax.train import chips

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

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
class Roofline:
  """Seconds of a step and the model FLOP utilisation (MFU) they mean."""

  compute_s: float
  hbm_s: float
  ici_s: float
  step_s: float
  step_s_no_overlap: float
  mfu: float
  mfu_no_overlap: float


def estimate(
  flops_executed: float,
  bytes_hbm: float,
  collectives: Iterable[Collective | tuple[str, float, int]],
  chip: chips.Chip,
  *,
  model_flops: float,
  links: Mapping[int, float] | None = None,
) -> Roofline:
  """The roofline of one step; see the module for its assumptions.

  Args:
    flops_executed: of one chip.
    bytes_hbm: of one chip.
    collectives: of one chip; (kind, bytes, group size) will do.
    chip: where it runs.
    model_flops: of one chip: of the whole step over the number of chips.
    links: by the size of a group, the links that each of its chips has.

  Raises:
    ValueError: an unknown kind of collective.
  """
  compute = flops_executed / chip.flops
  hbm = bytes_hbm / chip.hbm_bandwidth
  ici = 0.0
  for one in collectives:
    if not isinstance(one, Collective):
      kind, size, group = one
      one = Collective(kind, "", size, group)
    ici += one.times * seconds(one, chip, (links or {}).get(one.group_size))
  step, apart = max(compute, hbm, ici), max(compute, hbm) + ici
  useful = model_flops / chip.flops
  return Roofline(compute, hbm, ici, step, apart, useful / step, useful / apart)


def seconds(
  one: Collective, chip: chips.Chip, links: float | None = None
) -> float:
  """Time of one run of a collective over some links, 2 by default."""
  if one.kind not in KINDS:
    raise ValueError(f"kind={one.kind!r}: expected one of {KINDS}.")
  if one.group_size <= 1:
    return 0.0
  # Both ways round a ring; a switch has one link each way.
  links = links or (1 if chip.torus_axes == 1 else 2)
  speed, size = links * chip.link_bandwidth, one.group_size
  share = (size - 1) / size
  if one.kind == "collective-permute":
    return one.bytes / chip.link_bandwidth
  if one.kind == "all-reduce":
    return 2 * share * one.bytes / speed
  if one.kind == "all-to-all" and chip.torus_axes > 1:
    # A chip's bytes travel a quarter of the ring on average.
    return max(size / 4, 1.0) * share * one.bytes / speed
  return share * one.bytes / speed


ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPERATION = re.compile(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)"?\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"constant\((\d+)\)")
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


def collectives_of(hlo_text: str) -> list[Collective]:
  """The collectives of an optimized program, as one chip runs it.

  Those in the body of a `while` count as often as it runs: by XLA's
  `known_trip_count`, or else by the constant that its condition compares
  with (once if there is none). What runs beside computation, in a start and
  a done or in several fusions of one channel, counts once.

  Args:
    hlo_text: of `compiled.as_text()`.
  """
  parts, entry = computations(hlo_text)
  found: dict[str, list[tuple[Collective, str, str]]] = {}

  def inside(name):
    """(collective, its channel, computation that has it), nested ones too."""
    if name not in found:
      found[name] = []  # of a computation that is not there
      made, channels = [], {}
      for line in parts.get(name, ()):
        for one, channel, where in _of_line(line, name, parts, inside):
          if not channel or channels.setdefault(channel, where) == where:
            made.append((one, channel, where))
      found[name] = made
    return found[name]

  return [one for one, _, _ in inside(entry)]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of each computation by its name, and the entry's name."""
  made, entry, lines = {}, "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = made.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif line.rstrip() == "}":
      lines = None
    elif lines is not None:
      lines.append(line)
  return made, entry


def _of_line(line, where, parts, inside):
  """What `inside` of `collectives_of` gives, of one instruction."""
  match = INSTRUCTION.match(line)
  operation = OPERATION.search(match[2]) if match else None
  if not operation or operation[1] in ("async-update", "async-done"):
    return []  # these name again what their start has
  kind = operation[1].removesuffix("-start")
  if kind in KINDS:
    result = match[2][: operation.start()]
    if kind == "all-reduce" and where.startswith(_REDUCE_SCATTER):
      one = _collective(kind, result, line, False)
      one = dataclasses.replace(one, kind="reduce-scatter")
    else:
      one = _collective(kind, result, line, operation[1] != kind)
    channel = _CHANNEL.search(line)
    return [(one, channel[1] if channel else "", where)]
  return [
    (dataclasses.replace(one, times=one.times * times), channel, origin)
    for name, times in calls(line, parts)
    for one, channel, origin in inside(name)
  ]


def calls(line: str, parts) -> list[tuple[str, int]]:
  """Computations that one instruction calls, and how often it runs each."""
  match = INSTRUCTION.match(line)
  operation = OPERATION.search(match[2]) if match else None
  if not operation or operation[1] in ("async-update", "async-done"):
    return []  # these name again what their start has
  called = _CALLED.findall(line)
  for branches in _BRANCHES.findall(line):
    called += [name.strip(" %") for name in branches.split(",")]
  times = _trips(line, parts) if operation[1] == "while" else 1
  return [(name, times) for name in called]


def _trips(line: str, parts) -> int:
  """How often a `while` runs."""
  if match := _TRIPS.search(line):
    return int(match[1])
  condition = _CONDITION.search(line)
  text = "\n".join(parts.get(condition[1], ())) if condition else ""
  return max((int(value) for value in _CONSTANT.findall(text)), default=1)


def _collective(kind, result, line, is_start) -> Collective:
  """What one line of HLO sends."""
  arrays = [
    (dtype, math.prod(int(d) for d in dims.split(",") if d) * size_of(dtype))
    for dtype, dims in ARRAY.findall(result)
    if dims or not is_start  # scalars of a start are its context
  ]
  if is_start and kind in ("all-gather", "collective-permute"):
    arrays = arrays[len(arrays) // 2 :]  # (operands, results)
  dtype, _ = max(arrays, key=lambda x: x[1], default=("", 0.0))
  size, group = sum(value for _, value in arrays), _group_size(line)
  if kind == "reduce-scatter":
    size *= group
  return Collective(kind, dtype, size, group)


def size_of(dtype: str) -> float:
  """Bytes of one element; 0 of a token."""
  return 1 if dtype.startswith("f8") else _SIZES.get(dtype, 0)


def _group_size(line: str) -> int:
  """Chips of one group; of a permutation 2."""
  if match := _IOTA_GROUPS.search(line):
    return int(match[2])
  if match := _GROUPS.search(line):
    return len(match[1].split(","))
  if match := _MESH_GROUPS.search(line):
    sizes = dict(_MESH_AXIS.findall(match[1]))
    parts = _MESH_PART.findall(match[2])
    return math.prod(int(part or sizes[name]) for name, part in parts)
  return 2 if "source_target_pairs=" in line else 1
