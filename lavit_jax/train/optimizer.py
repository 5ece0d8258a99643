"""AdamW with warm-up, cosine decay and learning-rate groups."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lavit_jax import errors

FROZEN = "frozen"
MOMENTS = ("float32", "bfloat16", "factored")


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
      group name -> factor on the phase's learning rate; `moments`, one of
      `MOMENTS`, if it is there.
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
    return optax.chain(
      _moments(config),
      optax.add_decayed_weights(
        config["weight_decay"],
        mask=lambda tree: jax.tree_util.tree_map_with_path(
          lambda path, _: _decays(path), tree
        ),
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
