"""Mean features and first codebook, computed before phases of `tokenizer`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.models.tokenizer import quantizer
from lavit_jax.train import phases
from lavit_jax.train.objectives import base

_MEAN_BATCHES = 8


def mean_features(
  shape: tuple[int, int],
  encode: Callable[[Any, jax.Array], jax.Array],
) -> base.Fold:
  """Computes `feature_mean`, the mean over images of each patch's features.

  Args:
    shape: (N, D) of an image's features.
    encode: (parameters of the encoder, image uint8[B, H, W, 3]) -> features
      float[B, N, D].
  """

  def start():
    return {"sums": jnp.zeros(shape), "images": jnp.zeros(())}

  def add(carry, number, state, frozen, batch):
    del number, state
    features = encode(frozen["encoder"], batch["image"])
    valid = batch["valid"]
    sums = (features * valid[:, None, None]).sum(0, dtype=jnp.float32)
    more = {"sums": sums, "images": valid.sum()}
    return jax.tree.map(jnp.add, carry, more)

  def finish(carry, state):
    del state
    count = jnp.maximum(carry["images"], 1.0)
    return {"feature_mean": carry["sums"] / count}

  return base.Fold(
    name="feature_mean",
    batches=_MEAN_BATCHES,
    start=start,
    add=add,
    finish=finish,
  )


def kmeans(
  phase: phases.Phase,
  config: quantizer.QuantizerConfig,
  shape: tuple[int, int],
  project: Callable[..., tuple[jax.Array, jax.Array]],
) -> base.Fold:
  """Computes `codebook` by k-means over the vectors of kept patches.

  Args:
    phase: that begins; its settings `kmeans_batches` and `kmeans_iters`.
    config: of the quantizer.
    shape: (B, K): rows of a batch, vectors of an image.
    project: (params, frozen, batch) -> (unit vectors float[B, K, dim],
      valid bool[B, K]).
  """
  batches: int = phase["kmeans_batches"]
  axes = (None, "act_batch", None)

  def start():
    z = jnp.zeros((batches, *shape, config.code_dim))
    weights = jnp.zeros((batches, *shape))
    return {
      "z": nn.LogicallyPartitioned(z, (*axes, None)),
      "weights": nn.LogicallyPartitioned(weights, axes),
    }

  def add(carry, number, state, frozen, batch):
    z, valid = project(state.params, frozen, batch)
    rows = {"z": z, "weights": valid * batch["valid"][:, None]}
    put = lambda whole, x: jax.lax.dynamic_update_index_in_dim(
      whole, x.astype(whole.dtype), number, 0
    )
    return jax.tree.map(put, carry, rows)

  def finish(carry, state) -> dict[str, Any]:
    run_rng = jax.random.wrap_key_data(state.rng)
    codebook = quantizer.kmeans_init(
      jax.random.fold_in(run_rng, phase.start + 1),
      carry["z"].reshape(batches, -1, config.code_dim),
      carry["weights"].reshape(batches, -1),
      config.num_codes,
      phase["kmeans_iters"],
    )
    return {"codebook": codebook}

  return base.Fold(
    name="kmeans", batches=batches, start=start, add=add, finish=finish
  )
