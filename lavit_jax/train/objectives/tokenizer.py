"""Stage `tokenizer`: selector, merger, codebook and decoder, encoder frozen.

Paper section 3.1: mean over patches of 1 - cos(x, x_rec), the rate term
lambda (rho - mean(M))^2, and the quantizer's commitment. A phase says where
its mask comes from and whether codes are on:

  mask "random"   keep rate drawn a picture from `keep_range`: merger and
                  decoder learn to live with any mask, gathered (fast)
  mask "gumbel"   the selector's, sampled straight-through; the all-positions
                  form, so that gradient reaches the mask of dropped patches
  mask "sampled"  the frozen selector's, sampled, gathered
  mask "expected" the frozen selector's, deterministic, gathered
"""

import dataclasses

import jax
import jax.numpy as jnp

from lavit_jax import errors, fingerprints, images
from lavit_jax.models import quantizer, selector, tokenizer, vision
from lavit_jax.train import branches, losses, precision, shapes
from lavit_jax.train.objectives import base

MASKS = ("random", "gumbel", "sampled", "expected")


class TokenizerObjective(base.Objective):
  """Trains a `tokenizer.DynamicVisualTokenizer` on pictures alone."""

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
    return {"encoder": shapes.encoder(self.model_config.vit, dtype)}

  def made_of(self):
    """Data and encoder."""
    encoder = fingerprints.of_part(self.config.model_dir, "encoder")
    return super().made_of() | {"encoder": encoder}

  def frozen_branches(self):
    """The encoder."""
    return {"encoder": branches.Branch(self.config.model_dir, "encoder")}

  def batch_shapes(self):
    """Pictures alone."""
    return self.image_shapes()

  def begin_phase(self, phase, state, frozen, batch_at):
    """Mean features before the first phase; k-means before codes come on."""
    extra = dict(state.extra)
    if phase.start == 0:
      features = self._some_features(phase, frozen, batch_at, 8)
      extra["feature_mean"] = jnp.concatenate(features).mean(0)
    if phase.get("kmeans_iters", 0):
      features = self._some_features(
        phase, frozen, batch_at, phase["kmeans_batches"]
      )
      extra["codebook"] = self._kmeans(phase, state, features)
    return state.params, extra

  def _some_features(self, phase, frozen, batch_at, count):
    encode = jax.jit(self._features)
    return [
      encode(frozen["encoder"], batch_at(phase.start + i)["image"])
      for i in range(count)
    ]

  def _kmeans(self, phase, state, features):
    """Codebook statistics from the projections of kept tokens."""

    @jax.jit
    def project(params, features):
      mask = self._mask("expected", phase, params, features, None)[0]
      return self._project_compact(params, features, mask)

    found = [project(state.params, chunk) for chunk in features]
    z, valid = (jnp.concatenate(x) for x in zip(*found, strict=True))
    rng = jax.random.fold_in(
      jax.random.wrap_key_data(state.rng), phase.start + 1
    )
    config = self.model_config.quantizer
    return quantizer.kmeans_init(
      rng,
      z.reshape(-1, config.code_dim),
      valid.reshape(-1).astype(jnp.float32),
      config.num_codes,
      phase["kmeans_iters"],
    )

  def _features(self, encoder, image):
    """float[B, N, D] of uint8[B, H, W, 3], no gradient."""
    return jax.lax.stop_gradient(
      tokenizer.encode_images(
        self.model_config, encoder, images.normalize(image)
      )
    )

  def _mask(self, kind, phase, params, features, rng):
    """(mask float[B, N], log_probs float[B, N, 2] or None) of a phase."""
    shape = features.shape[:2]
    if kind == "random":
      share_rng, rng = jax.random.split(rng)
      low, high = phase["keep_range"]
      share = jax.random.uniform(share_rng, shape[:1], minval=low, maxval=high)
      return selector.random_mask(rng, shape, share).astype(jnp.float32), None
    log_probs = self.model.apply({"params": params}, features, method="select")
    if kind == "gumbel":
      mask = selector.sample_mask(log_probs, rng, phase["temperature"])
    elif kind == "sampled":
      mask = jax.lax.stop_gradient(selector.sample_mask(log_probs, rng))
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

  def loss(self, phase, params, frozen, state, batch, rng):
    """Cosine reconstruction + rate + entropy + commitment, by phase."""
    valid = batch["valid"]
    mask_rng, revive_rng = jax.random.split(rng)
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._mask(
      phase["mask"], phase, params, features, mask_rng
    )
    soft = phase["mask"] == "gumbel"
    x_rec, z, ids, weights = self._reconstruct(
      phase, params, state["codebook"], features, mask, soft
    )
    recon = self._recon_loss(phase, state, features, x_rec, valid)
    metrics = {"recon_loss": recon, "kept_share": mask.mean()}
    loss = recon
    if soft:
      extra, more = self._selection_loss(phase, mask, log_probs, valid)
      loss, metrics = loss + extra, metrics | more
    if ids is not None:
      weights = weights * valid[:, None]
      codes = state["codebook"]["codes"]
      commit = quantizer.commitment(z, codes, ids) * weights
      commit = commit.sum() / jnp.maximum(weights.sum(), 1.0)
      loss = loss + phase["commitment"] * commit
      state, more = self._update_codes(
        phase, state, z, ids, weights, revive_rng
      )
      metrics |= more | {"commitment": commit}
    return loss, (state, metrics)

  def _recon_loss(self, phase, state, features, x_rec, valid):
    """1 - cos over patches (paper), and the detail term, weighted.

    The detail term is the squared error relative to the features' variance
    round each position's mean. On raw features a constant scores a high
    cosine, and every patch counts alike; here patches count by how far they
    are from what is usual at their place, which is where objects are.
    """
    mean = state["feature_mean"]
    cosine = 1.0 - losses.cosine(features, x_rec)  # [B, N]
    error = jnp.square(features - x_rec).mean(-1)
    usual = jnp.square(features - mean).mean()
    detail = error / jax.lax.stop_gradient(usual)
    each = (cosine + phase["detail_weight"] * detail).mean(1)
    return (each * valid).sum() / jnp.maximum(valid.sum(), 1.0)

  def _selection_loss(self, phase, mask, log_probs, valid):
    """The rate term over the batch mean, and the entropy of pi."""
    count = jnp.maximum(valid.sum(), 1.0)
    p_keep = jnp.exp(log_probs[..., selector.KEEP])
    rate = (mask.mean(1) * valid).sum() / count
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean(1)
    entropy = (entropy * valid).sum() / count
    loss = (
      phase["rate_weight"] * jnp.square(phase["rate"] - rate)
      + phase["entropy_weight"] * entropy
    )
    return loss, {"entropy": entropy, "p_keep_std": p_keep.std()}

  def _update_codes(self, phase, state, z, ids, weights, rng):
    """EMA of the codebook, and new places for codes that died."""
    config = self.model_config.quantizer
    stats = quantizer.ema_update(
      state["codebook"], z, ids, weights, config.decay
    )
    stats, revived = quantizer.revive_dead(
      stats, z, weights, rng, phase["revive_below"]
    )
    counts = quantizer.code_counts(ids, weights, config.num_codes)
    share, perplexity = quantizer.usage(counts)
    metrics = {
      "codes_in_batch": share,
      "perplexity_in_batch": perplexity,
      "codes_revived": revived,
    }
    return dict(state) | {"codebook": stats}, metrics

  def held_out_metrics(self, params, frozen, state, batch):
    """Deterministic selection: gain over the mean feature, share kept.

    Before codes come on the reconstruction is from the vectors themselves.
    """
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._mask("expected", {}, params, features, None)
    mean = state["feature_mean"]
    cos_mean = losses.cosine(features, jnp.broadcast_to(mean, features.shape))
    gain = lambda cos: (cos.mean() - cos_mean.mean()) / (1 - cos_mean.mean())
    metrics = {
      "kept_share": mask.mean(),
      "cos_mean": cos_mean.mean(),
      "p_keep_std": jnp.exp(log_probs[..., selector.KEEP]).std(),
    }
    for name, quantize in (("gain_no_codes", False), ("recon_gain", True)):
      x_rec, _, _, _ = self._reconstruct(
        {"quantize": quantize}, params, state["codebook"], features, mask, False
      )
      metrics[name] = gain(losses.cosine(features, x_rec))
    return metrics

  def export(self, params, state):
    """Parameters of the four parts, the codebook and the mean features."""
    stored = {
      "params": params,
      "codebook": {"codes": state["codebook"]["codes"]},
      "feature_mean": state["feature_mean"],
    }
    return stored, {"tokenizer": dataclasses.asdict(self.model_config)}
