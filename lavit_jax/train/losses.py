"""Losses: arrays in, scalars out, everything summed in float32."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from lavit_jax.core import averages
from lavit_jax.models import layers
from lavit_jax.models.tokenizer import selector
from lavit_jax.train import cross_entropy

# Language model.


def next_token_blocked(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  block: int = 512,
  vocab_size: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Computes the cross-entropy of `hidden @ head.T` without all its logits.

  The sequence is cut into blocks; the logits of a block live only while its
  loss and gradient are computed. At full size all logits would be L * V = 2048
  * 48512 float32, 0.4 GB a row, and several copies of it. Over a mesh the
  vocabulary is split over `tensor`, and each device gathers its rows of the
  head once, not once a block.

  Args:
    hidden: float[B, L, D], after the last norm.
    head: float[V, D], one row an id.
    targets: int[B, L]; any id where the weight is 0.
    weights: float[B, L]; 0 at positions without a target. No gradient.
    block: positions of each row in a block; the last one is padded.
    vocab_size: rows of `head` in use, 0 for all; the others are no classes.

  Returns:
    (sum of weighted nll float32[], nll float32[B, L]). The nll is 0 where the
    weight is 0, and has no gradient. For the mean divide by the sum of weights,
    at least 1.
  """
  block = min(block, targets.shape[1])
  used = vocab_size or head.shape[0]
  weights = weights.astype(jnp.float32)
  total, nll = cross_entropy.weighted_nll(
    block, used, hidden, head, targets, weights
  )
  return total, jax.lax.stop_gradient(nll)


# Tokenizer.


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the cosine similarity float32[...] of float[..., C] vectors.

  It is 0 where one of the vectors is zero.
  """
  a = layers.l2_normalize(a.astype(jnp.float32))
  b = layers.l2_normalize(b.astype(jnp.float32))
  return (a * b).sum(-1)


def image_sums(
  features: jax.Array, mean: jax.Array, mask: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
  """Counts valid images, and sums their kept shares and variances.

  Args:
    features: float[B, N, D] of the encoder.
    mean: float[N, D], the mean features of each position.
    mask: float[B, N], 1 for kept patches.
    valid: float[B], 1 or 0.

  Returns:
    float32[] each: `images`, `kept` and `variance`.
  """
  variance = jnp.square(features - mean).mean((1, 2))
  return {
    "images": valid.sum(),
    "kept": (mask.mean(1) * valid).sum(),
    "variance": (variance * valid).sum(),
  }


def reconstruction_sums(
  features: jax.Array, x_rec: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
  """Sums reconstruction errors, means over patches, over valid images.

  Args:
    features: float[B, N, D] of the encoder.
    x_rec: float[B, N, D], reconstructed.
    valid: float[B], 1 or 0.

  Returns:
    float32[] each: `cosine`, of 1 - cos (paper, section 3.1), and `error`, of
    the mean squared error.
  """
  distance = 1.0 - cosine(features, x_rec)  # [B, N]
  difference = features.astype(jnp.float32) - x_rec.astype(jnp.float32)
  error = jnp.square(difference).mean(-1)  # [B, N]
  return {
    "cosine": (distance.mean(1) * valid).sum(),
    "error": (error.mean(1) * valid).sum(),
  }


def reconstruction_loss(
  sums: Mapping[str, jax.Array], detail_weight: float
) -> jax.Array:
  """Computes 1 - cos over patches (paper) plus the weighted detail term.

  The detail term is the squared error relative to the features' variance
  around each position's mean. On raw features a constant scores a high cosine,
  and every patch counts alike; here patches count by how far they are from
  their position's mean, which is where objects are.

  Args:
    sums: of `reconstruction_sums` and `image_sums`.
    detail_weight: factor of the detail term.

  Returns:
    float32[].
  """
  detail = sums["error"] / jnp.maximum(sums["variance"], 1e-12)
  distance = averages.ratio(sums["cosine"], sums["images"])
  return distance + detail_weight * detail


def selection_sums(
  log_probs: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
  """Sums statistics of the selector's probabilities over valid images.

  Args:
    log_probs: float[B, N, 2] of the selector.
    valid: float[B], 1 or 0.

  Returns:
    float32[] each: `entropy` of pi, its mean over patches; `p` and `p_squared`
    of p(keep) over all patches, and `patches`, their number.
  """
  p_keep = jnp.exp(log_probs[..., selector.KEEP])
  entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean(1)
  return {
    "entropy": (entropy * valid).sum(),
    "p": (p_keep.sum(1) * valid).sum(),
    "p_squared": (jnp.square(p_keep).sum(1) * valid).sum(),
    "patches": valid.sum() * p_keep.shape[1],
  }


def selection_loss(
  sums: Mapping[str, jax.Array],
  *,
  rate: float,
  rate_weight: float,
  entropy_weight: float,
) -> jax.Array:
  """Computes the rate term lambda (rho - mean(M))^2 (paper) plus pi's entropy.

  Args:
    sums: of `selection_sums` and `image_sums`.
    rate: rho, the share of patches to keep.
    rate_weight: lambda.
    entropy_weight: factor of the entropy.

  Returns:
    float32[].
  """
  kept = averages.ratio(sums["kept"], sums["images"])
  entropy = averages.ratio(sums["entropy"], sums["images"])
  return rate_weight * jnp.square(rate - kept) + entropy_weight * entropy


def p_keep_std(sums: Mapping[str, jax.Array]) -> averages.Std:
  """Returns the standard deviation of p(keep) over patches, as a metric.

  Args:
    sums: of `selection_sums`; no gradient passes.
  """
  return averages.Std(
    total=jax.lax.stop_gradient(sums["p"]),
    sum_of_squares=jax.lax.stop_gradient(sums["p_squared"]),
    count=sums["patches"],
  )


# Encoder.


def contrast_loss(
  image: jax.Array, text: jax.Array, scale: jax.Array, pairs: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes symmetric InfoNCE over the pairs of a global batch.

  Args:
    image: float[B, E] of unit norm.
    text: float[B, E] of unit norm.
    scale: float[], inverse temperature.
    pairs: float[B], 1 for an image with a caption, else 0. Rows that are no
      pair are no negatives of others either.

  Returns:
    (loss float[], share of images whose own text is the nearest float[]).
  """
  logits = scale * image @ text.T  # [B, B]
  both = (pairs[:, None] > 0) & (pairs[None, :] > 0)
  logits = jnp.where(both, logits, -1e9)
  labels = jnp.arange(logits.shape[0])
  cross_entropy_of = optax.softmax_cross_entropy_with_integer_labels
  total = cross_entropy_of(logits, labels) + cross_entropy_of(logits.T, labels)
  hits = (jnp.argmax(logits, axis=1) == labels) * pairs
  ratio, count = averages.ratio, pairs.sum()
  return ratio((0.5 * total * pairs).sum(), count), ratio(hits.sum(), count)


def caption_loss(
  logits: jax.Array, text: jax.Array, weights: jax.Array
) -> jax.Array:
  """Computes the mean nll of captions.

  Args:
    logits: float[B, T, V].
    text: int[B, T].
    weights: float[B, T].

  Returns:
    float[], the weighted mean.
  """
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, text)
  return averages.ratio((nll * weights).sum(), weights.sum())


def pixel_loss(
  patches: jax.Array, target: jax.Array, valid: jax.Array
) -> jax.Array:
  """Computes the mean squared error of patches.

  Args:
    patches: float[B, N, P], predicted pixels.
    target: float[B, N, P].
    valid: float[B], weights of the images.

  Returns:
    float[], the weighted mean over images.
  """
  error = jnp.square(patches - target).mean((1, 2))
  return averages.ratio((error * valid).sum(), valid.sum())


def whitening_loss(features: jax.Array, valid: jax.Array) -> jax.Array:
  """Measures how far features are from white around each position's mean.

  It is the mean squared entry of (covariance - identity) over batch and
  patches, plus the squared channel means (variance and covariance terms of
  VICReg, Bardes et al. 2022, with both sides of the variance).

  Args:
    features: float[B, N, D].
    valid: float[B]; images of 0 are left out.

  Returns:
    float32[].
  """
  width = features.shape[-1]
  features = features.astype(jnp.float32)
  weights = valid[:, None, None]
  count = jnp.maximum(valid.sum(), 1.0)
  mean = (features * weights).sum(0) / count  # [N, D]
  flat = ((features - mean) * jnp.sqrt(weights)).reshape(-1, width)
  covariance = flat.T @ flat / (count * features.shape[1])
  excess = jnp.square(covariance - jnp.eye(width)).sum() / width
  return excess + jnp.square(mean.mean(0)).mean()
