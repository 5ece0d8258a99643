"""AdamW with warm-up, cosine decay and learning-rate groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import errors

FROZEN = "frozen"
MOMENTS = ("float32", "bfloat16", "factored")
STACKS = ("layers", "qkv")  # axes along which whole matrices lie side by side


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


def learning_rate(phase, opt_state) -> jax.Array:
  """The phase's rate float[] that the next update uses, before its groups.

  Updates are counted by the optimizer: one that was left out is none.
  """
  of_schedule = lambda path, _: (
    getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
  )
  counts = optax.tree.get_all_with_path(opt_state, "count", of_schedule)
  return jnp.asarray(schedule(phase)(counts[0][1]), jnp.float32)


def decays(names: Sequence[str | None], config: Mapping[str, Any]) -> bool:
  """Whether a parameter is pulled towards zero.

  All matrices are, also those that lie in one array (`STACKS`); norms, biases
  and what stands at a position (position and query embeddings, class tokens)
  are not. Rows of a look-up table get no gradient while their word is not met,
  and would only shrink (they are left out in OLMo 2, arXiv 2501.00656, too).

  Args:
    names: logical axes of the parameter.
    config: `decay_embeddings` for look-up tables and `decay_lora` for low-rank
      changes, whose decay is towards the model they change; False if absent.
  """
  axes = [name for name in names if name not in STACKS]
  if len(axes) < 2 or not {"norm", "position"}.isdisjoint(axes):
    return False
  if "lookup" in axes:
    return bool(config.get("decay_embeddings", False))
  if "rank" in axes:
    return bool(config.get("decay_lora", False))
  return True


def decayed(config, boxed):
  """`decays` of a tree of boxed parameters, as a tree of bools.

  Raises:
    errors.ConfigError: a parameter without logical axes.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)

  def one(path, box):
    if not is_box(box):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise errors.ConfigError(
        f"Parameter {name} has no logical axes, by which weight decay goes."
        " Make it with nn.with_logical_partitioning."
      )
    return decays(box.names, config)

  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def make(config: Mapping[str, Any], phase, labels, boxed):
  """The optimizer of one phase.

  Args:
    config: fields b1, b2, weight_decay (see `decays`), clip_norm and `groups`,
      a mapping group name -> factor on the phase's learning rate; `moments`,
      one of `MOMENTS`, if it is there.
    phase: the phase's fields; see `schedule`.
    labels: tree of group names like the params; `FROZEN` is not trained.
    boxed: (abstract) parameters with their logical axes.

  Raises:
    errors.ConfigError: a label without a group in config, a parameter without
      logical axes, or unknown moments.
  """
  groups = dict(config["groups"])
  used = {label for label in jax.tree.leaves(labels) if label != FROZEN}
  if missing := sorted(used - set(groups)):
    raise errors.ConfigError(
      f"Parameters are labelled {missing}, but config.optimizer.groups has"
      f" only {sorted(groups)}. Give each group a learning-rate factor."
    )
  base = schedule(phase)
  mask = select(decayed(config, boxed), labels)

  def adamw(factor):
    return optax.chain(
      _moments(config),
      optax.add_decayed_weights(
        config["weight_decay"],
        mask=mask,
      ),
      optax.scale_by_learning_rate(lambda step: base(step) * factor),
    )

  by_group = {group: adamw(factor) for group, factor in groups.items()}
  kept = select(labels, labels)
  return optax.chain(
    optax.clip_by_global_norm(config["clip_norm"]),
    optax.multi_transform(by_group, kept),
  )


def _moments(config) -> optax.GradientTransformation:
  """Adam's, their memory as config.moments says (absent: "float32").

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
