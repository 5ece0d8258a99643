"""Gradients of a batch that is too large to be held at once.

The batch is cut into `config.accumulate` parts that are run one after the
other. That changes memory alone: an objective gives *sums* over a part, which
add up to those of the batch, and `combine` makes the loss of them, whatever it
is. By the chain rule

  d combine(S) / d params = sum over parts of (d combine / d S)(S) d S_part,

where S are the sums of the whole batch. So S has to be known first, but only
as far as the slopes d combine / d S depend on it: these sums are `norms`, most
often counts that need no network. What is random is drawn for the whole batch
before it is cut.
"""

import jax
import jax.numpy as jnp

from lavit_jax.core import errors, sharding


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Asks whether every part of a batch has rows for all devices.

  A part with fewer would be whole on every device, where attention kernels
  cannot be used: more memory and time than without parts.

  Args:
    config: of the run; of it `accumulate`, 1 if it is missing, and
      `batch_size`.
    mesh: whose data and fsdp split the rows.

  Raises:
    errors.ConfigError: they have not, or `accumulate` is no whole number of 1
      or more.
  """
  parts, rows = config.get("accumulate", 1), config.batch_size
  if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
    raise errors.ConfigError(
      f"config.accumulate={parts}: expected in how many parts a batch is run,"
      " a whole number. Set it to 1 for none."
    )
  sharding.check_batch(mesh, rows)
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % (parts * ways) == 0:
    return
  each = rows // ways
  fits = min(
    (n for n in range(1, each + 1) if each % n == 0),
    key=lambda n: (abs(n - parts), -n),
  )
  nearest = max(round(rows / (parts * ways)), 1) * parts * ways
  raise errors.ConfigError(
    f"config.accumulate={parts} cuts a batch of {rows} rows into parts of"
    f" {rows / parts:g}, which data x fsdp = {ways} devices do not divide. Set"
    f" config.accumulate={fits}, or config.batch_size={nearest}."
  )


def value_and_grad(objective, phase, parts: int):
  """`jax.value_and_grad` of an objective's loss over a batch in parts.

  Args:
    objective: see `objectives.base.Objective`; of it `draws`, `norms`, `sums`,
      `combine` and `merge_seen`.
    phase: of the run.
    parts: in how many a batch is cut; 1 for none.

  Returns:
    (merge, trainable, frozen, extra, batch, rng) -> ((loss, (seen, metrics)),
    grads), where `merge` makes the parameters of the trainable ones, and
    `seen` is what `Objective.update_extra` asks for.
  """

  def whole(merge, trainable, frozen, extra, batch, rng):
    draws = objective.draws(phase, batch, rng)

    def loss(trainable):
      sums, seen = objective.sums(
        phase, merge(trainable), frozen, extra, batch, draws
      )
      value, metrics = objective.combine(phase, sums)
      return value, (seen, metrics)

    return jax.value_and_grad(loss, has_aux=True)(trainable)

  def in_parts(merge, trainable, frozen, extra, batch, rng):
    given = batch, objective.draws(phase, batch, rng)
    given = jax.tree_util.tree_map_with_path(
      lambda path, x: cut(jax.tree_util.keystr(path), x, parts), given
    )
    run = lambda part, params: objective.sums(
      phase, merge(params), frozen, extra, *part
    )
    norms = _added(
      lambda part: objective.norms(
        phase, merge(trainable), frozen, extra, *part
      ),
      given,
    )
    first = jax.tree.map(lambda x: x[0], given)
    sums, seen = _zeros(run, first, trainable)
    slopes = jax.grad(lambda sums: objective.combine(phase, sums)[0])(
      sums | norms
    )

    def one(carry, part):
      grads, sums, seen = carry
      more, pull, found = jax.vjp(
        lambda params: run(part, params), trainable, has_aux=True
      )
      grads = jax.tree.map(jnp.add, grads, *pull(slopes))
      sums = jax.tree.map(jnp.add, sums, more)
      return (grads, sums, objective.merge_seen(seen, found)), None

    start = jax.tree.map(jnp.zeros_like, trainable), sums, seen
    (grads, sums, seen), _ = jax.lax.scan(one, start, given)
    loss, metrics = objective.combine(phase, sums)
    return (loss, (seen, metrics)), grads

  return whole if parts == 1 else in_parts


def _zeros(function, *args):
  """Zeros in the shapes that a function gives."""
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args)
  )


def _added(function, given):
  """The sum of a function's trees over the parts."""
  zeros = _zeros(function, jax.tree.map(lambda x: x[0], given))
  add = lambda total, part: (
    jax.tree.map(jnp.add, total, function(part)),
    None,
  )
  return jax.lax.scan(add, zeros, given)[0]


def cut(name: str, x: jax.Array, parts: int) -> jax.Array:
  """[B, ...] to [parts, B / parts, ...], every part with rows of all devices.

  Row i goes to part i % parts: rows of a device stay where they are.
  """
  if x.shape[0] % parts:
    raise errors.ConfigError(
      f"config.accumulate={parts} does not divide the batch of {x.shape[0]}"
      f" rows ({name}). Make config.batch_size a multiple of it."
    )
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
