"""AdamW with warm-up, cosine decay and learning-rate groups."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lavit_jax import errors

FROZEN = "frozen"


def schedule(phase) -> optax.Schedule:
  """Linear warm-up to `lr`, then cosine to `lr * end_factor`, in phase steps.

  A warm-up longer than a tenth of the phase is cut to that: a run shortened
  from the command line still reaches its learning rate.
  """
  steps = int(phase["steps"])
  warmup = min(int(phase.get("warmup", 0)), max(steps // 10, 1))
  peak = float(phase["lr"])
  return optax.warmup_cosine_decay_schedule(
    init_value=peak / 10 if warmup else peak,
    peak_value=peak,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=peak * float(phase.get("end_factor", 0.05)),
  )


def _decays(path) -> bool:
  """Weight decay is for matrices, not for norms, biases and positions."""
  return jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "embedding")


def make(config: Mapping[str, Any], phase, labels):
  """The optimizer of one phase.

  Args:
    config: fields b1, b2, weight_decay, clip_norm and `groups`, a mapping
      group name -> factor on the phase's learning rate.
    phase: the phase's fields; see `schedule`.
    labels: tree of group names like the params; `FROZEN` is not trained.

  Raises:
    errors.ConfigError: a label without a group in config.
  """
  groups = dict(config["groups"])
  used = {label for label in jax.tree.leaves(labels) if label != FROZEN}
  if missing := sorted(used - set(groups)):
    raise errors.ConfigError(
      f"Parameters are labelled {missing}, but config.optimizer.groups has"
      f" only {sorted(groups)}. Give each group a learning-rate factor."
    )
  base = schedule(phase)

  def adamw(factor):
    return optax.adamw(
      lambda step: base(step) * factor,
      b1=config["b1"],
      b2=config["b2"],
      weight_decay=config["weight_decay"],
      mask=lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: _decays(path), tree
      ),
    )

  by_group = {group: adamw(factor) for group, factor in groups.items()}
  kept = select(labels, labels)
  return optax.chain(
    optax.clip_by_global_norm(config["clip_norm"]),
    optax.multi_transform(by_group, kept),
  )


def select(tree, labels):
  """The trainable part of a tree: frozen leaves become None (no leaf)."""
  return jax.tree.map(
    lambda label, leaf: None if label == FROZEN else leaf, labels, tree
  )


def merge(trainable, params):
  """`params` with the leaves of `trainable` put in."""
  return jax.tree.map(
    lambda new, old: old if new is None else new,
    trainable,
    params,
    is_leaf=lambda x: x is None,
  )
