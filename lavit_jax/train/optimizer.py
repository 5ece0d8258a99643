"""AdamW with warm-up, cosine decay and learning-rate groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import errors
from lavit_jax.train import phases

FROZEN = "frozen"  # label of parameters that a phase does not train
MOMENTS = ("float32", "bfloat16", "factored")
# Logical axes along which whole matrices lie side by side in one array.
STACKS = ("layers", "qkv")


def lr_schedule(phase: phases.Phase) -> optax.Schedule:
  """Returns linear warm-up to `lr`, then cosine decay to `lr * end_factor`.

  The schedule counts steps of the phase. A warm-up longer than a tenth of the
  phase is cut to that: a run shortened from the command line still reaches its
  learning rate.
  """
  warmup = min(phase.warmup, max(phase.steps // 10, 1))
  return optax.warmup_cosine_decay_schedule(
    init_value=phase.lr / 10 if warmup else phase.lr,
    peak_value=phase.lr,
    warmup_steps=warmup,
    decay_steps=max(phase.steps, warmup + 1),
    end_value=phase.lr * phase.end_factor,
  )


def learning_rate(phase: phases.Phase, opt_state: Any) -> jax.Array:
  """Returns the rate float32[] of the next update, before group factors.

  The optimizer counts its updates; a skipped update does not count.
  """
  is_schedule = lambda path, _: (
    getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
  )
  counts = optax.tree.get_all_with_path(opt_state, "count", is_schedule)
  return jnp.asarray(lr_schedule(phase)(counts[0][1]), jnp.float32)


def labels_of(phase: phases.Phase, params: Any) -> Any:
  """Assigns each parameter its learning-rate group.

  `phase.train` maps prefixes of paths ("merger", "selector/head", "" for
  everything) to groups; the longest prefix that matches counts. Parameters that
  none matches are `FROZEN`.

  Args:
    phase: of the run.
    params: (abstract) parameters, unboxed.

  Returns:
    A tree like `params` of group names.

  Raises:
    errors.ConfigError: a prefix matches no parameter.
  """
  rules = sorted(phase.train.items(), key=lambda rule: -len(rule[0]))
  used = set()

  def label(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for prefix, group in rules:
      if phases.has_prefix(name, prefix):
        used.add(prefix)
        return group
    return FROZEN

  labels = jax.tree_util.tree_map_with_path(label, params)
  if unused := sorted({prefix for prefix, _ in rules} - used):
    raise errors.ConfigError(
      f"Phase setting train={dict(phase.train)} names {unused}, which no"
      f" parameter path starts with. Top-level names: {sorted(params)}."
    )
  return labels


def decays(names: Sequence[str | None], config: Mapping[str, Any]) -> bool:
  """Returns whether weight decay applies to a parameter.

  It applies to all matrices, also to those stacked in one array (`STACKS`). It
  does not apply to norms, biases and per-position parameters (position and
  query embeddings, class tokens). Rows of a look-up table get no gradient
  until their id occurs and would only shrink, so they are off by default (as
  in OLMo 2, arXiv 2501.00656).

  Args:
    names: logical axes of the parameter.
    config: `decay_embeddings` for look-up tables and `decay_lora` for low-rank
      changes, whose decay is towards the model they change; absent is False.
  """
  axes = [name for name in names if name not in STACKS]
  if len(axes) < 2 or not {"norm", "position"}.isdisjoint(axes):
    return False
  if "lookup" in axes:
    return bool(config.get("decay_embeddings", False))
  if "rank" in axes:
    return bool(config.get("decay_lora", False))
  return True


def decay_mask(config: Mapping[str, Any], boxed: Any) -> Any:
  """Applies `decays` to a tree of boxed parameters; returns a tree of bools.

  Raises:
    errors.ConfigError: a parameter has no logical axes.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def one(path, box):
    if not is_box(box):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise errors.ConfigError(
        f"Parameter {name} has no logical axes, which decide on its weight"
        " decay. Make it with nn.with_logical_partitioning."
      )
    return decays(box.names, config)

  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def make(
  config: Mapping[str, Any], phase: phases.Phase, labels: Any, boxed: Any
) -> optax.GradientTransformation:
  """Builds the optimizer of one phase.

  Args:
    config: fields b1, b2, weight_decay (see `decays`), clip_norm, `groups`, a
      mapping from group to factor on the phase's learning rate, and optionally
      `moments`, one of `MOMENTS`.
    phase: whose learning-rate schedule is followed.
    labels: tree of group names like the parameters; `FROZEN` is not trained.
    boxed: (abstract) parameters with their logical axes.

  Raises:
    errors.ConfigError: a label has no group in config, a parameter has no
      logical axes, or `moments` is unknown.
  """
  groups = dict(config["groups"])
  used = {label for label in jax.tree.leaves(labels) if label != FROZEN}
  if missing := sorted(used - set(groups)):
    raise errors.ConfigError(
      f"Parameters are labelled {missing}, but config.optimizer.groups has"
      f" only {sorted(groups)}. Give each group a learning-rate factor."
    )
  rate = lr_schedule(phase)
  mask = select(decay_mask(config, boxed), labels)

  def adamw(factor):
    return optax.chain(
      _moments(config),
      optax.add_decayed_weights(
        config["weight_decay"],
        mask=mask,
      ),
      optax.scale_by_learning_rate(lambda step: rate(step) * factor),
    )

  by_group = {group: adamw(factor) for group, factor in groups.items()}
  return optax.chain(
    optax.clip_by_global_norm(config["clip_norm"]),
    optax.multi_transform(by_group, select(labels, labels)),
  )


def _moments(config: Mapping[str, Any]) -> optax.GradientTransformation:
  """Builds Adam's moments, stored as config.moments says (default "float32").

  "bfloat16" halves the first moment; the second stays float32, for in bfloat16
  its changes of 1 - b2 would round to nothing. "factored" has the first in
  bfloat16 and of the second only sums over rows and columns (Adafactor,
  Shazeer and Stern, arXiv 1804.04235): 2 bytes a parameter in place of 8.
  """
  kind, b1, b2 = config.get("moments", "float32"), config["b1"], config["b2"]
  if kind == "float32":
    return optax.scale_by_adam(b1=b1, b2=b2)
  if kind == "bfloat16":
    return optax.scale_by_adam(b1=b1, b2=b2, mu_dtype="bfloat16")
  if kind == "factored":
    return optax.chain(
      optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
      optax.clip_by_block_rms(1.0),
      optax.ema(b1, debias=True, accumulator_dtype="bfloat16"),
    )
  raise errors.ConfigError(
    f"optimizer.moments={kind!r}: expected one of {MOMENTS}."
  )


def select(tree: Any, labels: Any) -> Any:
  """Returns the trainable part of a tree; frozen leaves become None."""
  return jax.tree.map(
    lambda label, leaf: None if label == FROZEN else leaf, labels, tree
  )


def merge(trainable: Any, params: Any) -> Any:
  """Returns `params` with the leaves of `trainable` that are not None."""
  return jax.tree.map(
    lambda new, old: old if new is None else new,
    trainable,
    params,
    is_leaf=lambda x: x is None,
  )
