"""Stage `tokenizer`: selector, merger, codebook and decoder, encoder frozen.

Paper section 3.1: mean over patches of 1 - cos(x, x_rec), the rate term
lambda (rho - mean(M))^2, and the quantizer's commitment. A phase says where
its mask comes from and whether codes are on:

  mask "random"   keep rate drawn an image from `keep_range`: merger and
                  decoder learn to live with any mask, gathered (fast)
  mask "gumbel"   the selector's, sampled straight-through; the all-positions
                  form, so that gradient reaches the mask of dropped patches
  mask "sampled"  the frozen selector's, sampled, gathered
  mask "expected" the frozen selector's, deterministic, gathered
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.core import averages, errors, image_io
from lavit_jax.core.storage import fingerprints
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import quantizer, selector, tokenizer
from lavit_jax.train import boundaries, losses
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  precision,
)

MASKS = ("random", "gumbel", "sampled", "expected")


class TokenizerObjective(base.Objective):
  """Trains a `tokenizer.DynamicVisualTokenizer` on images alone."""

  part = "tokenizer"
  best_metric = "recon_gain"
  best_mode = "max"

  def __init__(self, config, where=None):
    super().__init__(config, where)
    meta = self.stored.meta(config.model_dir, "encoder")
    vit = vision.ViTConfig(**meta["vit"])
    vit = precision.applied(config, encoder=vit)["encoder"]
    self.model_config = tokenizer.config_from_dict(
      config.model.tokenizer.to_dict() | {"vit": vit}
    )
    self.model = tokenizer.DynamicVisualTokenizer(self.model_config)
    self.use_images()

  def init(self, rng):
    """Boxed parameters; extra: codebook statistics, mean features, counts."""
    config = self.model_config
    grid, width = config.num_patches, config.width
    variables = self.model.init(
      rng, jnp.zeros((1, grid, width)), jnp.ones((1, grid))
    )
    codes = config.quantizer
    codebook = quantizer.init_stats(
      jax.random.fold_in(rng, 1), codes.num_codes, codes.code_dim
    )
    return variables["params"], {
      "codebook": codebook,
      "feature_mean": jnp.zeros((grid, width)),
    }

  def frozen_shapes(self):
    """The encoder."""
    dtype = self.config.model.get("frozen_dtype", "float32")
    return {"encoder": abstract_params.encoder(self.model_config.vit, dtype)}

  def made_of(self):
    """Data and encoder."""
    encoder = fingerprints.of_part(self.config.model_dir, "encoder")
    return super().made_of() | {"encoder": encoder}

  def frozen_branches(self):
    """The encoder."""
    return {"encoder": branches.Branch(self.config.model_dir, "encoder")}

  def batch_shapes(self):
    """Images alone."""
    return self.image_shapes()

  def folds(self, phase):
    """Mean features before the first phase; k-means before codes come on."""
    found = []
    if phase.start == 0:
      found.append(self._mean_features())
    if phase.get("kmeans_iters", 0):
      found.append(self._kmeans(phase))
    return tuple(found)

  def _mean_features(self):
    """The mean over images, float[N, D], of some batches."""
    config = self.model_config
    grid, width = config.num_patches, config.width

    def start():
      return {"sums": jnp.zeros((grid, width)), "images": jnp.zeros(())}

    def add(carried, number, state, frozen, batch):
      del number, state
      features = self._features(frozen["encoder"], batch["image"])
      valid = batch["valid"]
      sums = (features * valid[:, None, None]).sum(0, dtype=jnp.float32)
      more = {"sums": sums, "images": valid.sum()}
      return jax.tree.map(jnp.add, carried, more)

    def finish(carried, state):
      del state
      count = jnp.maximum(carried["images"], 1.0)
      return {"feature_mean": carried["sums"] / count}

    return boundaries.Fold(
      name="feature_mean", batches=8, start=start, add=add, finish=finish
    )

  def _kmeans(self, phase):
    """Codebook statistics from the projections of kept tokens."""
    config = self.model_config.quantizer
    batches, images = phase["kmeans_batches"], self.config.batch_size
    shape = (batches, images, self.config.data.capacity)
    axes = (None, "act_batch", None)

    def start():
      z, weights = jnp.zeros((*shape, config.code_dim)), jnp.zeros(shape)
      return {
        "z": nn.LogicallyPartitioned(z, (*axes, None)),
        "weights": nn.LogicallyPartitioned(weights, axes),
      }

    def add(carried, number, state, frozen, batch):
      features = self._features(frozen["encoder"], batch["image"])
      mask = self._mask("expected", phase, state.params, features, None)[0]
      z, valid = self._project_compact(state.params, features, mask)
      more = {"z": z, "weights": valid * batch["valid"][:, None]}
      put = lambda whole, x: jax.lax.dynamic_update_index_in_dim(
        whole, x.astype(whole.dtype), number, 0
      )
      return jax.tree.map(put, carried, more)

    def finish(carried, state):
      rng = jax.random.fold_in(
        jax.random.wrap_key_data(state.rng), phase.start + 1
      )
      codebook = quantizer.kmeans_init(
        rng,
        carried["z"].reshape(batches, -1, config.code_dim),
        carried["weights"].reshape(batches, -1),
        config.num_codes,
        phase["kmeans_iters"],
      )
      return {"codebook": codebook}

    return boundaries.Fold(
      name="kmeans", batches=batches, start=start, add=add, finish=finish
    )

  def _features(self, encoder, image):
    """float[B, N, D] of uint8[B, H, W, 3], no gradient."""
    return jax.lax.stop_gradient(
      tokenizer.encode_images(
        self.model_config, encoder, image_io.normalize(image)
      )
    )

  def draws(self, phase, batch, rng):
    """The random mask, or the noise of the selector's; a lot of each token."""
    rows, grid = len(batch["image"]), self.model_config.num_patches
    mask_rng, revive_rng = jax.random.split(rng)
    drawn = {}
    if phase["mask"] == "random":
      share_rng, mask_rng = jax.random.split(mask_rng)
      low, high = phase["keep_range"]
      share = jax.random.uniform(share_rng, (rows,), minval=low, maxval=high)
      drawn["mask"] = selector.random_mask(mask_rng, (rows, grid), share)
    elif phase["mask"] in ("gumbel", "sampled"):
      drawn["gumbel"] = selector.gumbel(mask_rng, (rows, grid))
    if self._revives(phase):
      soft = phase["mask"] == "gumbel"
      shape = rows, grid if soft else self.config.data.capacity
      lots = jax.random.permutation(revive_rng, shape[0] * shape[1])
      drawn["lot"] = 1 + lots.reshape(shape)
    return drawn

  @staticmethod
  def _revives(phase):
    return phase.get("quantize", False) and phase["revive_below"] > 0

  def _mask(self, kind, phase, params, features, draws):
    """(mask float[B, N], log_probs float[B, N, 2] or None) of a phase."""
    if kind == "random":
      return draws["mask"].astype(jnp.float32), None
    log_probs = self.model.apply({"params": params}, features, method="select")
    if kind == "gumbel":
      mask = selector.mask_from_noise(
        log_probs, draws["gumbel"], phase["temperature"]
      )
    elif kind == "sampled":
      mask = jax.lax.stop_gradient(
        selector.mask_from_noise(log_probs, draws["gumbel"])
      )
    elif kind == "expected":
      mask = selector.expected_count_mask(log_probs).astype(jnp.float32)
    else:
      raise errors.ConfigError(
        f"phase mask={kind!r} is unknown; expected one of {MASKS}."
      )
    return mask, log_probs

  def _project_compact(self, params, features, mask):
    """Unit vectors float[B, K, dim] of kept tokens, and which are tokens."""
    tokens, valid, _ = self.model.apply(
      {"params": params},
      features,
      mask > 0.5,
      self.config.data.capacity,
      method="merge_compact",
    )
    z = self.model.apply({"params": params}, tokens, method="project")
    return z, valid

  def _reconstruct(self, phase, params, codebook, features, mask, soft):
    """x_rec, and z, ids, weights of the tokens (ids None without codes)."""
    variables = {"params": params}
    ids = None
    if soft:
      merged = self.model.apply(variables, features, mask, method="merge")
      z = self.model.apply(variables, merged, method="project")
      weights = jax.lax.stop_gradient(mask)
    else:
      z, valid = self._project_compact(params, features, mask)
      weights = valid.astype(jnp.float32)
    vectors = z
    if phase.get("quantize", False):
      vectors, ids = quantizer.quantize(z, codebook["codes"])
    if soft:
      x_rec = self.model.apply(variables, vectors, mask, method="decode_soft")
    else:
      x_rec = self.model.apply(variables, vectors, valid, method="decode")
    return x_rec, z, ids, weights

  def norms(self, phase, params, frozen, state, batch, draws):
    """What the loss is not linear in; the encoder is run for it, and again."""
    features = self._features(frozen["encoder"], batch["image"])
    mask, _ = self._mask(phase["mask"], phase, params, features, draws)
    found = self._norms(state, features, mask, batch["valid"])
    if phase.get("quantize", False):
      count = mask.sum(1)
      if phase["mask"] != "gumbel":  # gathered
        count = jnp.minimum(count, self.config.data.capacity)
      found["tokens"] = (count * batch["valid"]).sum()
    return found

  def _norms(self, state, features, mask, valid):
    """Sums over valid images: their number, kept share, and variance."""
    usual = jnp.square(features - state["feature_mean"]).mean((1, 2))
    return {
      "images": valid.sum(),
      "kept": (mask.mean(1) * valid).sum(),
      "variance": (usual * valid).sum(),
    }

  def sums(self, phase, params, frozen, state, batch, draws):
    """The terms of the loss over valid images; what chose the codes."""
    valid, soft = batch["valid"], phase["mask"] == "gumbel"
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._mask(phase["mask"], phase, params, features, draws)
    x_rec, z, ids, weights = self._reconstruct(
      phase, params, state["codebook"], features, mask, soft
    )
    sums = self._norms(state, features, mask, valid)
    sums |= reconstruction_sums(features, x_rec, valid)
    if soft:
      sums |= selection_sums(log_probs, valid)
    if ids is None:
      return sums, {}
    weights = weights * valid[:, None]
    codes = state["codebook"]["codes"]
    commitment = quantizer.commitment(z, codes, ids) * weights
    sums |= {"commitment": commitment.sum(), "tokens": weights.sum()}
    seen = {"assigned": quantizer.assigned(z, ids, weights, len(codes))}
    if self._revives(phase):
      seen["fresh"] = quantizer.candidates(z, draws["lot"], weights, len(codes))
    return sums, seen

  def combine(self, phase, sums):
    """Cosine reconstruction + rate + entropy + commitment, by phase."""
    mean, count = averages.mean, sums["images"]
    recon = reconstruction_loss(sums, phase["detail_weight"])
    loss = recon
    metrics = {
      "recon_loss": mean(recon * count, count),
      "kept_share": mean(sums["kept"], count),
    }
    if "entropy" in sums:
      loss = loss + selection_loss(sums, phase)
      metrics |= {
        "entropy": mean(sums["entropy"], count),
        "p_keep_std": _spread(sums),
      }
    if "commitment" in sums:
      commitment = averages.ratio(sums["commitment"], sums["tokens"])
      loss = loss + phase["commitment"] * commitment
      metrics["commitment"] = mean(sums["commitment"], sums["tokens"])
    return loss, metrics | {"loss": mean(loss * count, count)}

  def merge_seen(self, a, b):
    """Sums add up; of the candidates for dead codes the first are kept."""
    add = lambda x, y: jax.tree.map(jnp.add, x, y)
    merges = {"assigned": add, "fresh": quantizer.merge_candidates}
    return {name: merges[name](a[name], b[name]) for name in a}

  def update_extra(self, phase, state, seen, params):
    """EMA of the codebook, and new places for codes that died."""
    del params
    if not seen:
      return state, {}
    stats = quantizer.ema_update(
      state["codebook"], seen["assigned"], self.model_config.quantizer.decay
    )
    share, perplexity = quantizer.usage(seen["assigned"]["counts"])
    metrics = {
      "codes_in_batch": averages.of_step(share),
      "perplexity_in_batch": averages.of_step(perplexity),
    }
    if "fresh" in seen:
      stats, revived = quantizer.revive_dead(
        stats, seen["fresh"], phase["revive_below"]
      )
      metrics["codes_revived"] = averages.Sum(revived)
    return dict(state) | {"codebook": stats}, metrics

  def held_out_metrics(self, params, frozen, state, batch):
    """Deterministic selection: gain over the mean feature, share kept.

    Before codes come on the reconstruction is from the vectors themselves.
    """
    valid = batch["valid"]
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._mask("expected", {}, params, features, None)
    total = lambda x: (x.mean(1) * valid).sum()  # of float[B, N]
    usual = jnp.broadcast_to(state["feature_mean"], features.shape)
    images, cos_mean = valid.sum(), total(losses.cosine(features, usual))
    metrics = {
      "kept_share": averages.mean(total(mask), images),
      "cos_mean": averages.mean(cos_mean, images),
      "p_keep_std": _spread(selection_sums(log_probs, valid)),
    }
    for name, quantize in (("gain_no_codes", False), ("recon_gain", True)):
      x_rec, _, _, _ = self._reconstruct(
        {"quantize": quantize}, params, state["codebook"], features, mask, False
      )
      gained = total(losses.cosine(features, x_rec)) - cos_mean
      metrics[name] = averages.mean(gained, images - cos_mean)
    return metrics

  def export(self, params, state):
    """Parameters of the four parts, the codebook and the mean features."""
    stored = {
      "params": params,
      "codebook": {"codes": state["codebook"]["codes"]},
      "feature_mean": state["feature_mean"],
    }
    return stored, {"tokenizer": dataclasses.asdict(self.model_config)}


def reconstruction_sums(features, x_rec, valid):
  """Sums over valid images of the mean over patches.

  Args:
    features: float[B, N, D] of the encoder.
    x_rec: float[B, N, D].
    valid: float[B].

  Returns:
    {"cosine": of 1 - cos (paper), "error": of the mean squared error}.
  """
  cosine = 1.0 - losses.cosine(features, x_rec)  # [B, N]
  wide = lambda x: x.astype(jnp.float32)
  error = jnp.square(wide(features) - wide(x_rec)).mean(-1)
  return {
    "cosine": (cosine.mean(1) * valid).sum(),
    "error": (error.mean(1) * valid).sum(),
  }


def reconstruction_loss(sums, detail_weight: float):
  """1 - cos over patches (paper), and the detail term, weighted: float[].

  The detail term is the squared error relative to the features' variance
  round each position's mean. On raw features a constant scores a high cosine,
  and every patch counts alike; here patches count by how far they are from
  what is usual at their place, which is where objects are.
  """
  detail = sums["error"] / jnp.maximum(sums["variance"], 1e-12)
  return averages.ratio(sums["cosine"], sums["images"]) + (
    detail_weight * detail
  )


def selection_sums(log_probs, valid):
  """Sums over valid images for float[B, N, 2] of the selector.

  Returns:
    {"entropy": of pi, its mean over patches; "p", "p_squared": of p(keep) over
    patches; "patches": their number}.
  """
  p_keep = jnp.exp(log_probs[..., selector.KEEP])
  entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean(1)
  return {
    "entropy": (entropy * valid).sum(),
    "p": (p_keep.sum(1) * valid).sum(),
    "p_squared": (jnp.square(p_keep).sum(1) * valid).sum(),
    "patches": valid.sum() * p_keep.shape[1],
  }


def selection_loss(sums, phase):
  """The rate term lambda (rho - mean(M))^2 (paper), and the entropy of pi."""
  kept = averages.ratio(sums["kept"], sums["images"])
  entropy = averages.ratio(sums["entropy"], sums["images"])
  return (
    phase["rate_weight"] * jnp.square(phase["rate"] - kept)
    + phase["entropy_weight"] * entropy
  )


def _spread(sums):
  """Standard deviation of p(keep) over patches."""
  return averages.Std(
    total=jax.lax.stop_gradient(sums["p"]),
    sum_of_squares=jax.lax.stop_gradient(sums["p_squared"]),
    count=sums["patches"],
  )
