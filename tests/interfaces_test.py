"""What is used of other libraries is public, and not about to go."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
# Of `jax.experimental`, what is in use on JAX 0.10 and 0.12 without a warning.
_EXPERIMENTAL = {
  "jax.experimental.compilation_cache",
  "jax.experimental.mesh_utils",
  "jax.experimental.multihost_utils",
  "jax.experimental.pallas.ops.tpu.splash_attention",
  "jax.experimental.topologies",
}
_GONE = {"jax.core", "jax.interpreters", "jax.lib", "jax.abstract_arrays"}
_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "grain", "splash", "nn", "jnp"}
_PRIVATE = re.compile(r"_[a-z]\w*$")


def _imported(tree):
  """Dotted names of all that a module imports."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _chains(tree):
  """Dotted names of attributes, like jax.core.Tracer."""
  for node in ast.walk(tree):
    parts = []
    while isinstance(node, ast.Attribute):
      parts.append(node.attr)
      node = node.value
    if parts and isinstance(node, ast.Name):
      yield ".".join([node.id, *reversed(parts)])


def _faults(text):
  """Names in a module's text that another version may not have."""
  tree = ast.parse(text)
  names = [*_imported(tree), *_chains(tree)]
  for name in names:
    first, *rest = name.split(".")
    if first not in _LIBRARIES:
      continue
    of_jax = name.startswith("jax.experimental.")
    allowed = any(f"{name}.".startswith(f"{x}.") for x in _EXPERIMENTAL)
    if (
      any(_PRIVATE.match(part) for part in rest)
      or any(f"{name}.".startswith(f"{gone}.") for gone in _GONE)
      or (of_jax and not allowed)
    ):
      yield name
  for node in ast.walk(tree):  # a library's object changed or taken apart
    if isinstance(node, ast.Attribute) and (
      node.attr == "kwargs"
      or (node.attr == "q_sequence" and isinstance(node.ctx, ast.Store))
    ):
      yield ast.unparse(node)


def test_only_public_names_of_jax_and_its_libraries_are_used():
  found = {
    f"{path.relative_to(ROOT)}: {name}"
    for folder in ("lavit_jax", "configs", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    for name in _faults(path.read_text("utf-8"))
  }
  assert not found, "\n".join(sorted(found))


def test_what_it_looks_for_is_found():
  text = """
from jax._src import core
from jax.experimental.pallas.ops.gpu import attention
import jax.core
import jax.experimental.topologies
x = jax.core.Tracer
y = jax._src.core
mask.q_sequence = y
kernel = type(kernel)(x, **kernel.kwargs)
fine = jax.experimental.multihost_utils.sync_global_devices
"""
  assert set(_faults(text)) >= {
    "jax._src.core",
    "jax.experimental.pallas.ops.gpu.attention",
    "jax.core",
    "jax.core.Tracer",
    "mask.q_sequence",
    "kernel.kwargs",
  }
  fine = text.splitlines()[4] + "\n" + text.splitlines()[-1]
  assert not set(_faults(fine))
