"""The device mesh, and the one table from logical axes to mesh axes.

Models name what a dimension *is* ("embed", "mlp", ...); this file alone says
where it lives. Changing the parallelism is a change of config.mesh.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils

from lavit_jax.core import errors

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
_LARGE = 1 << 26  # bytes; a parameter of more must not be whole on each device


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Builds the mesh `("data", "fsdp", "context", "tensor")`.

  Devices of several TPU slices are laid out so that only `data` crosses them:
  what is slow between slices, DCN, then carries gradients alone.

  Args:
    sizes: size of each mesh axis; a missing axis is 1 and at most one is -1,
      "the rest". `{"data": -1, "tensor": 2}` on 8 devices is 4 x 1 x 1 x 2.
    devices: the devices to use, all of them by default.

  Raises:
    errors.ConfigError: an unknown axis, sizes whose product is not the
      number of devices, or `data` that the slices do not divide.
  """
  devices = list(jax.devices() if devices is None else devices)
  if unknown := sorted(set(sizes) - set(MESH_AXES)):
    raise errors.ConfigError(
      f"config.mesh names {unknown}, but the mesh axes are"
      f" {list(MESH_AXES)}. Remove or rename them."
    )
  shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
  if shape.count(-1) == 1:
    rest = math.prod(size for size in shape if size != -1)
    if rest and len(devices) % rest == 0:
      shape[shape.index(-1)] = len(devices) // rest
  if math.prod(shape) != len(devices):
    raise errors.ConfigError(
      f"config.mesh={dict(sizes)} does not fill the {len(devices)} devices"
      " here: the product of its axes must equal their number. Set one axis"
      " to -1 for the rest."
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
      f"config.mesh.data={shape[0]} does not divide among {slices} slices: it"
      " is the one axis that crosses them. Make it a multiple of their number,"
      " or smaller axes and data=-1."
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (shape[0] // slices, *shape[1:]),
    (slices, *(1 for _ in shape[1:])),
    devices,
    allow_split_physical_axes=True,
  )
  return jax.sharding.Mesh(grid, MESH_AXES, axis_types=auto)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh):
  """Makes the mesh and the rules current for Linen's logical constraints."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def ways(name: str) -> int:
  """Parts into which the current mesh cuts a logical axis; 1 without a mesh.

  And 1 within `jax.shard_map`, where arrays are what one device holds.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(MESH_AXES) <= set(mesh.axis_names) or mesh.manual_axes:
    return 1
  return _ways(nn.logical_to_mesh_axes((name,), RULES), mesh)


def param_shardings(variables, mesh: jax.sharding.Mesh, *, whole: bool = False):
  """Shardings of a tree of boxed (abstract) parameters.

  Args:
    variables: a tree whose leaves may be `nn.LogicallyPartitioned` boxes, as
      `jax.eval_shape(module.init, ...)` returns it. Leaves without a box are
      replicated.
    mesh: from `make_mesh`.
    whole: large arrays may be whole on every device: they are none of a model,
      whose size they do not grow with.

  Returns:
    The same tree, unboxed, of `jax.sharding.NamedSharding`.

  Raises:
    errors.ConfigError: a logical axis without a rule, a dimension that the
      mesh axes assigned to it do not divide, or more than 64 MB that stay
      whole on every device although the mesh has axes for parameters.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def layout(path, leaf):
    name, names, value = jax.tree_util.keystr(path), (), leaf
    if is_box(leaf):
      names, value = leaf.names, leaf.value
    if len(names) != len(value.shape):  # sums of an optimizer over an axis
      names = (None,) * len(value.shape)
    _check(name, value.shape, names, mesh)
    if not whole:
      _check_large(name, value, names, mesh)
    spec = nn.logical_to_mesh_axes(names, RULES)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(layout, variables, is_leaf=is_box)


def _check_large(path, value, names, mesh):
  """Raises ConfigError for a large array that no axis splits."""
  size = math.prod(value.shape) * jax.numpy.dtype(value.dtype).itemsize
  wanted = mesh.shape["fsdp"] * mesh.shape["tensor"]
  axes = nn.logical_to_mesh_axes(names, RULES)
  if size > _LARGE and wanted > 1 and _ways(axes, mesh) == 1:
    raise errors.ConfigError(
      f"Array {path} of shape {tuple(value.shape)}, {size / 1e6:.0f} MB,"
      f" would be whole on every device, for its logical axes {names} are"
      " not split by this mesh. Give it axes that sharding.RULES maps to fsdp"
      " or tensor, or set config.mesh.fsdp above 1."
    )


def _ways(axes, mesh) -> int:
  """In how many parts the mesh axes of a spec cut an array."""
  flat = [a for x in axes if x for a in ((x,) if isinstance(x, str) else x)]
  return math.prod(mesh.shape[a] for a in flat)


def _check(path, shape, names, mesh):
  if unknown := [n for n in names if n is not None and n not in _NAMES]:
    raise errors.ConfigError(
      f"Parameter {path} has logical axes {unknown} that sharding.RULES does"
      " not know, so it would silently stay replicated. Add a rule or use a"
      f" known name: {sorted(_NAMES)}."
    )
  axes = nn.logical_to_mesh_axes(names, RULES)
  for size, axis in zip(shape, axes, strict=False):
    split = (axis,) if isinstance(axis, str) else tuple(axis or ())
    ways = _ways([split], mesh)
    if size % ways:
      raise errors.ConfigError(
        f"Parameter {path} of shape {tuple(shape)} cannot be split {ways} ways"
        f" over mesh axes {split}: {size} % {ways} != 0. Choose a model size"
        f" that divides, or smaller config.mesh sizes for {split}."
      )


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Leading axis over data and fsdp, everything else whole."""
  spec = jax.sharding.PartitionSpec(("data", "fsdp"))
  return jax.sharding.NamedSharding(mesh, spec)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The same value on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def check_batch(mesh: jax.sharding.Mesh, batch_size: int) -> None:
  """Raises ConfigError unless a batch divides over data and fsdp."""
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size < 1 or batch_size % ways:
    raise errors.ConfigError(
      f"A global batch of {batch_size} does not divide over data x fsdp ="
      f" {ways} devices. Change config.batch_size or config.mesh."
    )


def rows_of_process(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Rows of a global batch that the devices of this process hold, ascending.

  Processes whose devices are parts of the same rows, by `tensor` or `context`,
  get the same ones.

  Raises:
    errors.ConfigError: the batch does not divide over data and fsdp.
  """
  check_batch(mesh, batch_size)
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  number = np.arange(batch_size)
  return np.unique(np.concatenate([number[index] for index in held.values()]))


def put_batch(
  batch: Mapping[str, np.ndarray],
  mesh: jax.sharding.Mesh,
  batch_size: int | None = None,
):
  """Global arrays [B, ...] from what this process holds of each.

  Args:
    batch: arrays of the rows that `rows_of_process` names.
    mesh: where they go.
    batch_size: B; by default as many rows as these, one process having all.
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


def unbox(tree):
  """A tree of (abstract) arrays without their logical-axis boxes.

  Unlike `nn.meta.unbox` it adds no sharding constraint: the layout is given
  from outside, by `param_shardings`.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(
    lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box
  )


def abstract(boxed, mesh, *, whole: bool = False):
  """Boxed shapes as unboxed ones, each with its sharding.

  Args:
    boxed: abstract arrays.
    mesh: over which they are split.
    whole: see `param_shardings`.
  """
  layout = param_shardings(boxed, mesh, whole=whole)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    unbox(boxed),
    layout,
  )


def layout_of(state):
  """The shardings of a tree of arrays, abstract ones too."""
  return jax.tree.map(lambda x: x.sharding, state)


def bytes_a_device(tree) -> int:
  """What one device holds of a tree of (abstract) arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
