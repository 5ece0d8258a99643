"""What one chip executes and moves in a run of a compiled program.

Products are counted in its optimized HLO, as often as they run. Pallas'
attention kernels, which XLA cannot look into, count the blocks that their
causal mask leaves.
"""

import math
import re

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


def flops(program: hlo.Program) -> float:
  """FLOPs of the matrix products and convolutions that one chip executes."""
  return program.total(_products)


def int8_flops(program: hlo.Program) -> float:
  """Those of `flops` that are products of two int8 arrays."""
  return program.total(lambda *line: _narrow_products(*line, "s8"))


def fp8_flops(program: hlo.Program) -> float:
  """Those of `flops` that are products of two fp8 arrays, of any kind."""
  return program.total(lambda *line: _narrow_products(*line, "f8"))


def kernels(program: hlo.Program) -> list[str]:
  """Names of the Pallas kernels of a program, each as often as it stands."""
  return [
    one.name
    for lines in program.computations.values()
    for one in lines
    if 'custom_call_target="tpu_custom_call"' in one.rest
  ]


def arrays(program: hlo.Program) -> set[tuple[str, tuple[int, ...]]]:
  """Every (dtype, shape) that some instruction of a program makes."""
  return {
    (array.dtype, array.shape)
    for lines in program.computations.values()
    for one in lines
    for array in one.arrays
  }


def hbm_bytes(program: hlo.Program) -> float:
  """An estimate of what one chip moves between its HBM and its units, bytes.

  Every array that is made in HBM is written once and read once. What stays in
  the vector memory (XLA marks it S(1)) and what is written into a part of a
  larger array in place does not count.
  """
  loops = ("while", "conditional", "call")  # what is fused stays inside
  return 2.0 * program.total(_made, loops)


def _made(one: hlo.Instruction, _) -> float:
  """Bytes in HBM of what one instruction makes."""
  # What is copied ahead is counted where it was made.
  if one.operation in _NOT_MOVED or one.operation.endswith(("-start", "-done")):
    return 0.0
  whole = f"{one.name} {one.rest}"
  if "AllocateBuffer" in whole or any(name in whole for name in _IN_PLACE):
    return 0.0
  return sum(a.bytes for a in one.arrays if "S(" not in a.layout)


def _products(one: hlo.Instruction, beside) -> float:
  """FLOPs of one instruction itself, without what it calls."""
  if one.operation == "custom-call":
    return _kernel(one)
  if one.operation not in ("convolution", "dot"):
    return 0.0
  left, right = (_shape(beside.get(name)) for name in one.operands[:2])
  out = _shape(one)
  if one.operation == "dot":
    contracted = hlo.dims(_CONTRACT.search(one.rest)[1])
    return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
  return _convolution(one.rest, left, right, out)


def _narrow_products(one: hlo.Instruction, beside, dtype: str) -> float:
  """`_products` of an instruction, if the dtypes of both operands begin so."""
  if one.operation not in ("convolution", "dot"):
    return 0.0
  operands = [beside.get(name) for name in one.operands[:2]]
  is_so = lambda x: x and x.arrays and x.arrays[0].dtype.startswith(dtype)
  return _products(one, beside) if all(map(is_so, operands)) else 0.0


def _shape(one: hlo.Instruction | None) -> tuple[int, ...]:
  """Of what an instruction makes, the first of a tuple."""
  return one.arrays[0].shape if one and one.arrays else ()


def _convolution(rest, left, right, out) -> float:
  """2 x output batch x features in x features out x pairs of each axis.

  TPUs write products of many matrices as convolutions whose windows fall
  between the rows: only what meets an element counts.
  """
  of_left, of_right, of_out = _LABELS.search(rest).groups()
  found = _WINDOW.search(rest)
  window = dict(x.split("=") for x in found[1].split()) if found else {}
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


def _of_axis(window, axis) -> tuple[int, int, int, int]:
  """(stride, padding before, left dilation, right dilation) of one axis."""

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
  """How many (output, window element) pairs meet an input."""
  count, last = 0, (inputs - 1) * dilate
  for place in range(outputs):
    for k in range(size):
      t = place * stride + k * spread - before
      count += 0 <= t <= last and t % dilate == 0
  return count


def _kernel(one: hlo.Instruction) -> float:
  """FLOPs of an attention kernel of ours; 0 of any other call."""
  found = next((k for k in _KERNELS if one.name.startswith(k)), None)
  if found is None:
    return 0.0
  given = hlo.arrays_in(_OF_KERNEL.search(one.rest)[1])
  query, key = [a.shape for a in given if "f" in a.dtype][:2]
  blocks = next(a.shape for a in given if a.dtype == "s8")[-1]
  # Below the diagonal, and the blocks that it cuts.
  share = (blocks + 1) / (2 * blocks)
  return 2.0 * _KERNELS[found] * math.prod(query) * key[-2] * share
