"""What a compiled program does: products counted in its optimized HLO.

XLA's own cost analysis counts the body of a loop once. Here it counts as often
as it runs, and Pallas' attention kernels, which XLA cannot look into, count
the blocks that their causal mask leaves.
"""

import math
import re
from collections.abc import Callable

from lavit_jax.train import roofline

_SHAPE = re.compile(r"^\(?([a-z]+[0-9]*)\[([0-9,]*)\]")
_OPERANDS = re.compile(r"\(([^()]*)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACT = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LAYOUT = re.compile(r"operand_layout_constraints=\{(.*?)\}, \w+=")

# Products of two arrays of [queries, keys, width] in each attention kernel:
# logits and the sum of values; backward logits again and what follows.
_KERNELS = {
  "splash_mha_fwd": 2,
  "splash_mha_dq": 3,
  "splash_mha_dkv": 5,  # fused: gradients by query, key and value
}


def flops(hlo_text: str) -> float:
  """FLOPs of the matrix products and convolutions that one chip executes.

  Args:
    hlo_text: of `compiled.as_text()`.
  """
  return _total(hlo_text, _products)


def _total(hlo_text: str, of_line: Callable, entered=None) -> float:
  """Sum over all instructions, each as often as it runs.

  Args:
    hlo_text: of a program.
    of_line: (line, shapes of its computation's values) to a number.
    entered: operations whose computations count too; all by default.
  """
  computations, entry = roofline.computations(hlo_text)
  known: dict[str, float] = {}

  def inside(name: str) -> float:
    if name not in known:
      known[name] = 0.0  # of a computation that calls itself
      lines = computations.get(name, ())
      shapes, total = _shapes(lines), 0.0
      for line in lines:
        total += of_line(line, shapes)
        if entered is None or _operation(line) in entered:
          for called, times in roofline.calls(line, computations):
            total += times * inside(called)
      known[name] = total
    return known[name]

  return inside(entry)


def _operation(line: str) -> str:
  """The operation of an instruction, "" of another line."""
  match = roofline.INSTRUCTION.match(line)
  found = roofline.OPERATION.search(match[2]) if match else None
  return found[1] if found else ""


def _shapes(lines) -> dict[str, tuple[int, ...]]:
  """Dimensions of every value of a computation (the first of a tuple's)."""
  made = {}
  for line in lines:
    if match := roofline.INSTRUCTION.match(line):
      shape = _SHAPE.match(match[2])
      made[match[1]] = _dims(shape[2]) if shape else ()
  return made


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(",") if size)


def _products(line: str, shapes) -> float:
  """FLOPs of one instruction itself, without what it calls."""
  match = roofline.INSTRUCTION.match(line)
  operation = roofline.OPERATION.search(match[2]) if match else None
  if not operation:
    return 0.0
  kind, rest = operation[1], match[2][operation.end() - 1 :]
  if kind == "custom-call":
    return _kernel(match[1], line)
  if kind not in ("convolution", "dot"):
    return 0.0
  names = _NAME.findall(_OPERANDS.match(rest)[1])
  left, right = (shapes.get(name, ()) for name in names[:2])
  out = shapes[match[1]]
  if kind == "dot":
    contracted = _dims(_CONTRACT.search(line)[1])
    return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
  return _convolution(line, left, right, out)


def _convolution(line, left, right, out) -> float:
  """2 x output batch x features in x features out x pairs of each axis.

  TPUs write products of many matrices as convolutions whose windows fall
  between the rows: only what meets an element counts.
  """
  of_left, of_right, of_out = _LABELS.search(line).groups()
  found = _WINDOW.search(line)
  window = dict(x.split("=") for x in found[1].split()) if found else {}
  total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")]
  total *= right[of_right.index("i")]
  for axis in sorted(c for c in of_out if c.isdigit()):
    size = lambda labels, dims, axis=axis: dims[labels.index(axis)]
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


def _kernel(name: str, line: str) -> float:
  """FLOPs of an attention kernel of ours; 0 of any other call."""
  found = next((k for k in _KERNELS if name.startswith(k)), None)
  if found is None:
    return 0.0
  arrays = [
    (dtype, _dims(dims))
    for dtype, dims in roofline.ARRAY.findall(_LAYOUT.search(line)[1])
  ]
  query, key = [dims for dtype, dims in arrays if "f" in dtype][:2]
  blocks = next(dims for dtype, dims in arrays if dtype == "s8")[-1]
  # Below the diagonal, and the blocks that it cuts.
  share = (blocks + 1) / (2 * blocks)
  return 2.0 * _KERNELS[found] * math.prod(query) * key[-2] * share


def kernels(hlo_text: str) -> list[str]:
  """Names of the Pallas kernels of a program, each as often as it stands."""
  return [
    roofline.INSTRUCTION.match(line)[1]
    for line in hlo_text.splitlines()
    if 'custom_call_target="tpu_custom_call"' in line
  ]


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
_RESULT = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")


def hbm_bytes(hlo_text: str) -> float:
  """An estimate of what one chip moves between its HBM and its units, bytes.

  Every array that is made in HBM is written once and read once. What stays in
  the vector memory (XLA marks it S(1)) and what is written into a part of a
  larger array in place does not count.
  """
  loops = ("while", "conditional", "call")  # what is fused stays inside
  return 2.0 * _total(hlo_text, lambda line, _: _made(line), loops)


def _made(line: str) -> float:
  """Bytes in HBM of what one instruction makes."""
  match = roofline.INSTRUCTION.match(line)
  operation = roofline.OPERATION.search(match[2]) if match else None
  if not operation or operation[1] in _NOT_MOVED:
    return 0.0
  # What is copied ahead is counted where it was made.
  if operation[1].endswith(("-start", "-done")) or "AllocateBuffer" in line:
    return 0.0
  in_place = ("dynamic-update-slice", "dynamic_update_slice")
  if any(name in line for name in (*in_place, "dynamic_update_index")):
    return 0.0
  total = 0.0
  for dtype, dims, layout in _RESULT.findall(match[2][: operation.start()]):
    if "S(" not in layout:
      total += math.prod(_dims(dims)) * roofline.size_of(dtype)
  return total


def arrays(hlo_text: str) -> set[tuple[str, tuple[int, ...]]]:
  """Every (dtype, shape) that some instruction of a program makes."""
  return {
    (dtype, _dims(dims))
    for line in hlo_text.splitlines()
    if (match := roofline.INSTRUCTION.match(line))
    and (operation := roofline.OPERATION.search(match[2]))
    for dtype, dims in roofline.ARRAY.findall(match[2][: operation.start()])
  }
