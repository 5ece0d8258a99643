"""The device mesh, and the table from logical axes to mesh axes.

Models give each dimension a logical name ("embed", "mlp", ...). Only this file
maps these names to mesh axes. Parallelism is changed in config.mesh alone.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils

from lavit_jax.core import errors

Tree = Any  # a pytree of arrays, abstract arrays, boxes or shardings

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES = (
  # Parameters.
  ("embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv", "tensor"),
  ("vocab", "tensor"),
  ("lookup", "tensor"),  # the vocabulary of an embedding table
  ("code", "fsdp"),
  ("code_dim", None),
  ("layers", None),
  ("qkv", None),
  ("rank", None),
  ("patch", None),
  ("position", None),
  ("classes", None),
  ("conv", None),
  ("conv_in", "fsdp"),
  ("conv_out", "tensor"),
  ("norm", None),
  ("time", None),
  # Activations.
  ("act_batch", ("data", "fsdp")),
  ("act_len", "context"),
  ("act_embed", None),
  ("act_mlp", "tensor"),
  ("act_heads", "tensor"),
  ("act_vocab", "tensor"),
)
_NAMES = frozenset(name for name, _ in RULES)
_LARGE = 1 << 26  # bytes; larger parameters must not be replicated


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Builds the mesh `("data", "fsdp", "context", "tensor")`.

  Devices of several TPU slices are laid out so that only `data` crosses them:
  the slow network between slices (DCN) then carries gradients only.

  Args:
    sizes: size of each mesh axis. A missing axis has size 1; one axis may be
      -1, which uses the remaining devices: `{"data": -1, "tensor": 2}` on 8
      devices is 4 x 1 x 1 x 2.
    devices: all of them by default.

  Raises:
    errors.ConfigError: an axis is unknown, the product of the sizes is not the
      number of devices, or `data` is no multiple of the number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  if unknown := sorted(set(sizes) - set(MESH_AXES)):
    raise errors.ConfigError(
      f"config.mesh has {unknown}, but the mesh axes are {list(MESH_AXES)}."
      " Remove or rename them."
    )
  shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
  if shape.count(-1) == 1:
    rest = math.prod(size for size in shape if size != -1)
    if rest and len(devices) % rest == 0:
      shape[shape.index(-1)] = len(devices) // rest
  if math.prod(shape) != len(devices):
    raise errors.ConfigError(
      f"config.mesh={dict(sizes)} does not fill the {len(devices)} devices"
      " here: the product of its sizes must equal their number. Set one axis"
      " to -1 to use the remaining devices."
    )
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
    return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)
  if shape[0] % slices:
    raise errors.ConfigError(
      f"config.mesh.data={shape[0]} does not divide among {slices} slices, and"
      " only this axis may cross them. Make it a multiple of their number, or"
      " make other axes smaller and set data=-1."
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (shape[0] // slices, *shape[1:]),
    (slices, *(1 for _ in shape[1:])),
    devices,
    allow_split_physical_axes=True,
  )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh) -> Iterator[jax.sharding.Mesh]:
  """Activates the mesh and the rules for Linen's logical constraints."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def ways(name: str) -> int:
  """Returns how many ways the current mesh splits a logical axis.

  It is 1 without a mesh, and within `jax.shard_map`, where arrays are shards.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.manual_axes:
    return 1
  return _ways(nn.logical_to_mesh_axes((name,), RULES), mesh)


def param_shardings(
  variables: Tree, mesh: jax.sharding.Mesh, *, whole: bool = False
) -> Tree:
  """Returns the shardings of a tree of boxed (abstract) parameters.

  Args:
    variables: a tree whose leaves may be `nn.LogicallyPartitioned` boxes, as
      `jax.eval_shape(module.init, ...)` returns it. Leaves without a box are
      replicated.
    mesh: from `make_mesh`.
    whole: allow large arrays to be replicated: they do not belong to a model,
      and do not grow with its size.

  Returns:
    The same tree, unboxed, of `jax.sharding.NamedSharding`.

  Raises:
    errors.ConfigError: a logical axis has no rule, a dimension is not divided
      by its mesh axes, or an array of more than 64 MB is replicated although
      the mesh has axes for parameters.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def layout(path, leaf):
    name, names, value = jax.tree_util.keystr(path), (), leaf
    if is_box(leaf):
      names, value = leaf.names, leaf.value
    if len(names) != len(value.shape):  # an optimizer's sums over an axis
      names = (None,) * len(value.shape)
    _check(name, value.shape, names, mesh)
    if not whole:
      _check_large(name, value, names, mesh)
    spec = nn.logical_to_mesh_axes(names, RULES)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(layout, variables, is_leaf=is_box)


def _check_large(path, value, names, mesh):
  """Raises ConfigError for a large array that is replicated."""
  size = math.prod(value.shape) * jax.numpy.dtype(value.dtype).itemsize
  wanted = mesh.shape["fsdp"] * mesh.shape["tensor"]
  axes = nn.logical_to_mesh_axes(names, RULES)
  if size > _LARGE and wanted > 1 and _ways(axes, mesh) == 1:
    raise errors.ConfigError(
      f"Array {path} of shape {tuple(value.shape)}, {size / 1e6:.0f} MB,"
      f" would be whole on every device: this mesh does not split its logical"
      f" axes {names}. Give it axes that sharding.RULES maps to fsdp or tensor,"
      " or set config.mesh.fsdp above 1."
    )


def _ways(axes, mesh) -> int:
  """Returns how many ways the mesh axes of a spec split an array."""
  flat = [a for x in axes if x for a in ((x,) if isinstance(x, str) else x)]
  return math.prod(mesh.shape[a] for a in flat)


def _check(path, shape, names, mesh):
  if unknown := [n for n in names if n is not None and n not in _NAMES]:
    raise errors.ConfigError(
      f"Parameter {path} has logical axes {unknown} without a rule in"
      " sharding.RULES: it would silently be replicated. Add a rule or use one"
      f" of {sorted(_NAMES)}."
    )
  axes = nn.logical_to_mesh_axes(names, RULES)
  for size, axis in zip(shape, axes, strict=False):
    split = (axis,) if isinstance(axis, str) else tuple(axis or ())
    ways = _ways([split], mesh)
    if size % ways:
      raise errors.ConfigError(
        f"Parameter {path} of shape {tuple(shape)} cannot be split {ways} ways"
        f" over mesh axes {split}: {size} % {ways} != 0. Choose a model size"
        f" that is a multiple, or smaller config.mesh sizes for {split}."
      )


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of batches: the first axis over data and fsdp."""
  spec = jax.sharding.PartitionSpec(("data", "fsdp"))
  return jax.sharding.NamedSharding(mesh, spec)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of arrays that every device holds as a whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check_batch(mesh: jax.sharding.Mesh, batch_size: int) -> None:
  """Raises ConfigError unless data x fsdp divides the global batch size."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size < 1 or batch_size % ways:
    raise errors.ConfigError(
      f"A global batch of {batch_size} does not divide over data x fsdp ="
      f" {ways} devices. Change config.batch_size or config.mesh."
    )


def rows_of_process(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Returns the rows of a global batch that this process holds, ascending.

  Processes that share rows, split over `tensor` or `context`, get the same.

  Raises:
    errors.ConfigError: data x fsdp does not divide the batch size.
  """
  check_batch(mesh, batch_size)
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  number = np.arange(batch_size)
  return np.unique(np.concatenate([number[index] for index in held.values()]))


def put_batch(
  batch: Mapping[str, np.ndarray],
  mesh: jax.sharding.Mesh,
  batch_size: int | None = None,
) -> dict[str, jax.Array]:
  """Returns global arrays [B, ...] from the rows of this process.

  Args:
    batch: arrays of the rows of `rows_of_process`.
    mesh: that they are split over.
    batch_size: B; by default the rows of `batch`, for a single process.
  """
  size = batch_size or len(next(iter(batch.values())))
  rows_of_process(mesh, size)
  target = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(
      target, np.asarray(value), (size, *np.shape(value)[1:])
    )
    for name, value in batch.items()
  }


def unbox(tree: Tree) -> Tree:
  """Returns a tree of (abstract) arrays without their logical-axis boxes.

  Unlike `nn.meta.unbox` it adds no sharding constraint: shardings come from
  `param_shardings`.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(
    lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box
  )


def abstract(
  boxed: Tree, mesh: jax.sharding.Mesh, *, whole: bool = False
) -> Tree:
  """Returns boxed abstract arrays as unboxed ones with shardings.

  Args:
    boxed: abstract arrays.
    mesh: that they are split over.
    whole: see `param_shardings`.
  """
  layout = param_shardings(boxed, mesh, whole=whole)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    unbox(boxed),
    layout,
  )


def layout_of(state: Tree) -> Tree:
  """Returns the shardings of a tree of (abstract) arrays."""
  return jax.tree.map(lambda x: x.sharding, state)


def bytes_per_device(tree: Tree) -> int:
  """Returns the bytes per device of (abstract) arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
