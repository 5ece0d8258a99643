"""FLOPs of a traced function: its matrix products and its convolutions.

The rule:

  A product float[m, k] x float[k, n] is 2 m n k FLOPs; a convolution is one
    product at every position of its output, those at the edge too. All else
    (norms, softmax, activations, look-ups of embeddings) is nothing.
  The body of a scan counts once a step. Of `jax.lax.platform_dependent` the
    default form counts, of another `cond` the branch that costs most.
  A gradient costs a product once more for each factor that depends on a
    trained array: twice for activations by trained weights, once where the
    weights are frozen and gradient only passes through. Where no gradient
    arrives (`stop_gradient`, `argmax`, a mask) there is none.
  A product that the result does not depend on is not counted.

Gradients are read off the forward pass, by the activity analysis of automatic
differentiation (Griewank and Walther, Evaluating Derivatives, section 6.2). So
what rematerialization computes again is not counted, and the gradient of a
`custom_vjp` costs what JAX's own would.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Primitives whose derivative is zero, of floats to floats.
_FLAT = ("stop_gradient", "round", "sign", "floor", "ceil")
# Primitives whose body has the shapes of one device or one block.
_PARTIAL = ("shard_map", "pallas_call")


def count(
  function: Callable[..., Any], *args: Any, trained: Any = None
) -> dict[str, float]:
  """Counts the FLOPs of a function, and of its gradient, without running it.

  Args:
    function: of arrays; it is traced for a single CPU, so that no kernel and
      no device's share hides a product.
    *args: trees of arrays or `jax.ShapeDtypeStruct`s.
    trained: a tree of bools like the first argument, True where the gradient
      of the result is wanted; None counts the forward pass alone.

  Returns:
    {scope: FLOPs}. A scope is a path of `jax.named_scope`s, which Linen opens
    for every module: "UnifiedModel/llm/layers/mlp/gate".

  Raises:
    ValueError: products whose number is not in the jaxpr: of a while loop, a
      kernel, or `jax.shard_map`.
  """
  device = jax.sharding.AbstractDevice("cpu", None, "cpu")
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((), (), abstract_device=device)
  ):
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args
    )
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
  flags = [] if trained is None else list(jax.tree.leaves(trained))
  flags += [False] * (len(jaxpr.invars) - len(flags))
  total: collections.Counter[str] = collections.Counter()
  results = [True] * len(jaxpr.outvars)
  _add(total, jaxpr, "", 1, flags, results, results, opaque=False)
  return dict(total)


def _add(total, jaxpr, scope, times, varied, useful, live, *, opaque):
  """Adds the FLOPs of a jaxpr to `total`, by scope.

  Args:
    total: a counter, changed in place.
    jaxpr: with its own inputs and outputs.
    scope: in which it is run.
    times: how often it is run.
    varied: of each input, whether it depends on a trained array.
    useful: of each output, whether a gradient arrives there.
    live: of each output, whether the result depends on it at all.
    opaque: whether it is of a function whose gradient is written by hand. Its
      gradient is taken to pass every operation.
  """
  varied = _reached(jaxpr, varied, opaque)
  useful = _reached(jaxpr, useful, opaque, reverse=True)
  live = _reached(jaxpr, live, True, reverse=True)
  for eqn in jaxpr.eqns:
    if not any(_flags(eqn.outvars, live)):
      continue
    name = f"{scope}/{eqn.source_info.name_stack}".strip("/")
    if flops := _flops(eqn):
      gradients = sum(_flags(eqn.invars, varied)) * (eqn.outvars[0] in useful)
      total[name] += times * flops * (1 + gradients)
    elif (body := _body(eqn)) is not None:
      _add(
        total,
        body,
        name,
        times * eqn.params.get("length", 1),
        _crossed(eqn, _flags(eqn.invars, varied), opaque)[0],
        _crossed(eqn, _flags(eqn.outvars, useful), opaque, reverse=True)[0],
        _crossed(eqn, _flags(eqn.outvars, live), True, reverse=True)[0],
        opaque=opaque or _by_hand(eqn),
      )
    else:
      _check_has_none(eqn, name)


def _check_has_none(eqn, name: str) -> None:
  """Raises ValueError if an equation without a body multiplies matrices."""
  if any(map(_forward_flops, core.jaxprs_in_params(eqn.params))):
    raise ValueError(
      f"{eqn.primitive.name} in {name!r} multiplies matrices, but its jaxpr"
      " does not say how often. Trace a form of the function with a scan in"
      " place of a while loop, and without kernels and jax.shard_map."
    )


def _flops(eqn) -> int:
  """Returns the FLOPs of a product or convolution, 0 for other equations."""
  params = eqn.params
  if eqn.primitive.name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    size = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    zeros = 1
  elif eqn.primitive.name == "conv_general_dilated":
    kernel = eqn.invars[1].aval.shape
    out_channels = params["dimension_numbers"].rhs_spec[0]
    size = math.prod(kernel) // kernel[out_channels]
    zeros = math.prod(params["lhs_dilation"])  # one input in so many is data
  else:
    return 0
  return 2 * size * math.prod(eqn.outvars[0].aval.shape) // zeros


def _forward_flops(jaxpr) -> int:
  """Returns the FLOPs of a forward pass, bodies of loops counted once."""
  inner = lambda eqn: core.jaxprs_in_params(eqn.params)
  return sum(_flops(e) + sum(map(_forward_flops, inner(e))) for e in jaxpr.eqns)


def _body(eqn) -> core.Jaxpr | None:
  """Returns the jaxpr that an equation runs on its inputs, if it has one."""
  if eqn.primitive.name in _PARTIAL:
    return None
  if eqn.primitive.name == "cond":
    branches = [branch.jaxpr for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms") or ()
    if None in platforms:
      return branches[platforms.index(None)]
    return max(branches, key=_forward_flops)
  body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  return getattr(body, "jaxpr", body)


def _by_hand(eqn) -> bool:
  """Returns whether the gradient of an equation is written by hand."""
  return eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call")


def _reached(jaxpr, flags, opaque, reverse=False) -> set[core.Var]:
  """Returns the variables of a jaxpr that depend on its flagged inputs.

  In reverse, those that its flagged outputs depend on. A dependence counts if
  gradients pass it; with `opaque` every one does.
  """
  found = _flagged(jaxpr.outvars if reverse else jaxpr.invars, flags)
  for eqn in reversed(jaxpr.eqns) if reverse else jaxpr.eqns:
    near, far = eqn.invars, eqn.outvars
    if reverse:
      near, far = far, near
    flags = _flags(near, found)
    if any(flags):
      _, crossed = _crossed(eqn, flags, opaque, reverse)
      found |= _flagged(far, crossed)
  return found


def _crossed(eqn, flags, opaque, reverse=False) -> tuple[list, list]:
  """Carries flags of an equation's inputs to its outputs, or in reverse.

  Returns:
    (the flags at the entry of its body, with those that the carry of a scan
    has at any step; the flags at the equation's other end).
  """
  far = eqn.invars if reverse else eqn.outvars
  passes = [opaque or _differentiable(v) for v in far]
  body = _body(eqn)
  if body is None:
    flat = eqn.primitive.name in _FLAT and not opaque
    return flags, [p and not flat for p in passes]
  extra = len(eqn.invars) - len(body.invars)  # the index of a cond
  flags = list(flags if reverse else flags[extra:])
  consts, carry = (eqn.params.get(k, 0) for k in ("num_consts", "num_carry"))
  if eqn.primitive.name != "scan":
    consts = carry = 0
  into, out_of = (0, consts) if reverse else (consts, 0)
  while True:
    found = _reached(body, flags, opaque or _by_hand(eqn), reverse)
    result = _flags(body.invars if reverse else body.outvars, found)
    fresh = [
      i for i in range(carry) if result[out_of + i] and not flags[into + i]
    ]
    if not fresh:
      break
    for i in fresh:
      flags[into + i] = True
  result = [False] * extra + result if reverse else result
  return flags, [a and b for a, b in zip(result, passes, strict=True)]


def _flagged(variables: Sequence, flags: Sequence[bool]) -> set[core.Var]:
  """Returns the variables with a flag; literals are none."""
  pairs = zip(variables, flags, strict=True)
  return {v for v, flag in pairs if flag and not isinstance(v, core.Literal)}


def _flags(variables: Sequence, found: set[core.Var]) -> list[bool]:
  """Returns whether each variable (or literal) is in a set."""
  return [not isinstance(v, core.Literal) and v in found for v in variables]


def _differentiable(variable) -> bool:
  dtype = getattr(variable.aval, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
