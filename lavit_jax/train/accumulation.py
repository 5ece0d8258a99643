"""Gradients of a batch that is too large to be held at once.

The batch is cut into `config.accumulate` parts that are run one after the
other. Each part's loss is a weighted mean; parts are weighted alike, so that
the sum is the gradient of the whole batch's loss, whatever padding they hold.
"""

import jax
import jax.numpy as jnp

from lavit_jax import errors


def value_and_grad(objective, phase, parts: int):
  """`jax.value_and_grad` of an objective's loss over a batch in parts.

  Args:
    objective: its `weight` says how much a batch counts. What it changes
      without a gradient goes from part to part.
    phase: of the run.
    parts: in how many a batch is cut; 1 for none.

  Returns:
    (merge, trainable, frozen, extra, batch, rng) -> ((loss, (extra, metrics)),
    grads), where `merge` makes the parameters of the trainable ones.
  """

  def whole(merge, trainable, frozen, extra, batch, rng):
    def loss(trainable):
      params = merge(trainable)
      return objective.loss(phase, params, frozen, extra, batch, rng)

    return jax.value_and_grad(loss, has_aux=True)(trainable)

  def in_parts(merge, trainable, frozen, extra, batch, rng):
    batch = {name: cut(name, x, parts) for name, x in batch.items()}
    weights = jax.vmap(objective.weight)(batch).astype(jnp.float32)
    shares = weights / jnp.maximum(weights.sum(), 1e-9)

    def one(carry, given):
      extra, grads = carry
      number, share, batch = given
      key = jax.random.fold_in(rng, number)
      (loss, (extra, metrics)), more = whole(
        merge, trainable, frozen, extra, batch, key
      )
      grads = jax.tree.map(lambda a, b: a + share * b, grads, more)
      return (extra, grads), (share * loss, _scale(metrics, share))

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    given = (jnp.arange(parts), shares, batch)
    (extra, grads), (loss, metrics) = jax.lax.scan(one, (extra, zeros), given)
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    return (loss.sum(), (extra, metrics)), grads

  return whole if parts == 1 else in_parts


def _scale(metrics, share):
  return jax.tree.map(lambda x: x * share, metrics)


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
