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
_LIBRARIES = {
  "clu",
  "etils",
  "flax",
  "grain",
  "jax",
  "jaxlib",
  "ml_collections",
  "optax",
  "orbax",
  "tensorstore",
}
# The stand-in for gs:// of tests takes the place of what these ask Google.
_STAND_IN = {
  "etils.epath.backend.fsspec_backend._get_filesystem",
  "etils.epath.backend.fsspec_backend._get_filesystem.cache_clear",
  "orbax.checkpoint._src.path.gcs_utils",
}
_PRIVATE = re.compile(r"_[a-z]\w*$")


def _imported(tree):
  """{name in the module: dotted name} of all that a module imports."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        first = alias.name if alias.asname else alias.name.split(".")[0]
        found[alias.asname or first] = first
        found[alias.name] = alias.name
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        name = f"{node.module}.{alias.name}"
        found[alias.asname or alias.name] = name
  return found


def _chains(tree, imported):
  """Dotted names of attributes of what is imported, like jax.core.Tracer."""
  for node in ast.walk(tree):
    parts = []
    while isinstance(node, ast.Attribute):
      parts.append(node.attr)
      node = node.value
    if parts and isinstance(node, ast.Name) and node.id in imported:
      yield ".".join([imported[node.id], *reversed(parts)])


def _faults(text):
  """Names in a module's text that another version may not have."""
  tree = ast.parse(text)
  imported = _imported(tree)
  names = [*imported.values(), *_chains(tree, imported)]
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
    if not (path.name == "fake_gcs.py" and name in _STAND_IN)
  }
  assert not found, "\n".join(sorted(found))


def test_what_it_looks_for_is_found():
  text = """
from jax._src import core
from jax.experimental.pallas.ops.gpu import attention
import jax.core
import jax.experimental.topologies
import orbax.checkpoint as ocp
x = jax.core.Tracer
y = jax._src.core
z = ocp._src.path
mask.q_sequence = y
kernel = type(kernel)(x, **kernel.kwargs)
fine = jax.experimental.multihost_utils.sync_global_devices
"""
  assert set(_faults(text)) >= {
    "jax._src.core",
    "jax.experimental.pallas.ops.gpu.attention",
    "jax.core",
    "jax.core.Tracer",
    "orbax.checkpoint._src.path",
    "mask.q_sequence",
    "kernel.kwargs",
  }
  fine = text.splitlines()[4] + "\n" + text.splitlines()[-1]
  assert not set(_faults(fine))
