"""FLOPs and bytes of one chip in one run of a compiled program.

Products are counted in its optimized HLO, as often as they run. Pallas'
attention kernels, which XLA cannot look into, count the blocks that their
causal mask leaves.
"""

import math
import re
from collections.abc import Mapping

from lavit_jax.aot import hlo

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACT = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OF_KERNEL = re.compile(r"operand_layout_constraints=\{(.*?)\}, \w+=")

# Products of two arrays of [queries, keys, width] in each attention kernel:
# logits and the sum of values; backward logits again and what follows.
_KERNELS = {
  "splash_mha_fwd": 2,
  "splash_mha_dq": 3,
  "splash_mha_dkv": 5,  # fused: gradients by query, key and value
}

_NOT_MOVED = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "iota",
}
_IN_PLACE = (
  "dynamic-update-slice",
  "dynamic_update_slice",
  "dynamic_update_index",
)
_Computation = Mapping[str, hlo.Instruction]  # its instructions by name


def flops(program: hlo.Program) -> float:
  """Counts the FLOPs of the matrix products and convolutions of one chip."""
  return program.total(_products)


def int8_flops(program: hlo.Program) -> float:
  """Counts those of `flops` that are products of two int8 arrays."""
  return program.total(
    lambda line, others: _low_precision_products(line, others, "s8")
  )


def fp8_flops(program: hlo.Program) -> float:
  """Counts those of `flops` that are products of two fp8 arrays of any kind."""
  return program.total(
    lambda line, others: _low_precision_products(line, others, "f8")
  )


def kernels(program: hlo.Program) -> list[str]:
  """Returns the names of a program's Pallas kernels, one for each call."""
  return [
    line.name
    for lines in program.computations.values()
    for line in lines
    if 'custom_call_target="tpu_custom_call"' in line.rest
  ]


def arrays(program: hlo.Program) -> set[tuple[str, tuple[int, ...]]]:
  """Returns every (dtype, shape) among the results of a program."""
  return {
    (array.dtype, array.shape)
    for lines in program.computations.values()
    for line in lines
    for array in line.arrays
  }


def hbm_bytes(program: hlo.Program) -> float:
  """Estimates the bytes that one chip moves between HBM and its units.

  Every array whose buffer is in HBM is written once and read once. Arrays that
  stay in the vector memory (XLA marks it S(1)) and those that are written into
  a part of a larger array in place do not count.
  """
  loops = ("while", "conditional", "call")  # results inside fusions stay there
  return 2.0 * program.total(_result_bytes, loops)


def _result_bytes(line: hlo.Instruction, _) -> float:
  """Returns the bytes in HBM of an instruction's result."""
  # Copies ahead of time are counted where the array is computed.
  is_copy = line.operation.endswith(("-start", "-done"))
  if line.operation in _NOT_MOVED or is_copy:
    return 0.0
  text = f"{line.name} {line.rest}"
  if "AllocateBuffer" in text or any(name in text for name in _IN_PLACE):
    return 0.0
  return sum(a.bytes for a in line.arrays if "S(" not in a.layout)


def _products(line: hlo.Instruction, others: _Computation) -> float:
  """Counts the FLOPs of one instruction, without what it calls.

  Args:
    line: the instruction.
    others: all of its computation.
  """
  if line.operation == "custom-call":
    return _kernel(line)
  if line.operation not in ("convolution", "dot"):
    return 0.0
  left, right = (_shape(others.get(name)) for name in line.operands[:2])
  out = _shape(line)
  if line.operation == "dot":
    contracted = hlo.dims(_match(_CONTRACT, line.rest)[1])
    return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
  return _convolution(line.rest, left, right, out)


def _low_precision_products(
  line: hlo.Instruction, others: _Computation, dtype: str
) -> float:
  """Counts `_products` if the dtypes of both operands begin with `dtype`."""
  if line.operation not in ("convolution", "dot"):
    return 0.0
  for name in line.operands[:2]:
    operand = others.get(name)
    if operand is None or not operand.arrays:
      return 0.0
    if not operand.arrays[0].dtype.startswith(dtype):
      return 0.0
  return _products(line, others)


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
  """Searches for what optimized HLO always has.

  Raises:
    ValueError: it is missing.
  """
  match = pattern.search(text)
  if match is None:
    raise ValueError(f"HLO {text[:200]!r} has no {pattern.pattern!r}.")
  return match


def _shape(line: hlo.Instruction | None) -> tuple[int, ...]:
  """Returns the shape of a result; of a tuple that of its first array."""
  return line.arrays[0].shape if line and line.arrays else ()


def _convolution(
  rest: str,
  left: tuple[int, ...],
  right: tuple[int, ...],
  out: tuple[int, ...],
) -> float:
  """Counts 2 x out batch x in features x out features x pairs of each axis.

  TPUs compile products of many matrices to convolutions whose windows fall
  between the rows: only window positions that meet an element count.
  """
  of_left, of_right, of_out = _match(_LABELS, rest).groups()
  match = _WINDOW.search(rest)
  window = dict(x.split("=") for x in match[1].split()) if match else {}
  total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")]
  total *= right[of_right.index("i")]
  for axis in sorted(c for c in of_out if c.isdigit()):
    size = lambda labels, shape, axis=axis: shape[labels.index(axis)]
    total *= _pairs(
      size(of_left, left),
      size(of_out, out),
      size(of_right, right),
      *_of_axis(window, int(axis)),
    )
  return total


def _of_axis(window: Mapping[str, str], axis: int) -> tuple[int, int, int, int]:
  """Returns (stride, padding before, left dilation, right dilation)."""

  def field(name, default):
    values = window[name].split("x") if name in window else []
    return values[axis] if axis < len(values) else default

  before = int(field("pad", "0_0").split("_")[0])
  return (
    int(field("stride", "1")),
    before,
    int(field("lhs_dilate", "1")),
    int(field("rhs_dilate", "1")),
  )


def _pairs(inputs, outputs, size, stride, before, dilate, spread) -> int:
  """Counts the (output, window element) pairs that meet an input."""
  count, last = 0, (inputs - 1) * dilate
  for i in range(outputs):
    for k in range(size):
      t = i * stride + k * spread - before
      count += 0 <= t <= last and t % dilate == 0
  return count


def _kernel(line: hlo.Instruction) -> float:
  """Counts the FLOPs of an attention kernel of `_KERNELS`; 0 of other calls."""
  kind = next((k for k in _KERNELS if line.name.startswith(k)), None)
  if kind is None:
    return 0.0
  operands = hlo.arrays_in(_match(_OF_KERNEL, line.rest)[1])
  query, key = [a.shape for a in operands if "f" in a.dtype][:2]
  blocks = next(a.shape for a in operands if a.dtype == "s8")[-1]
  # Blocks below the diagonal, and those that it cuts.
  share = (blocks + 1) / (2 * blocks)
  return 2.0 * _KERNELS[kind] * math.prod(query) * key[-2] * share
