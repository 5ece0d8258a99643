"""Stage `tokenizer`: selector, merger, codebook and decoder, encoder frozen.

Paper section 3.1: mean over patches of 1 - cos(x, x_rec), the rate term
lambda (rho - mean(M))^2, and the quantizer's commitment. A phase's setting
`mask` says where its mask M comes from:

  "random"    share of kept patches drawn from `keep_range` for each image:
              merger and decoder learn to live with any mask; gathered (fast)
  "gumbel"    from the selector, sampled straight-through; the form with all
              positions, so that gradient reaches the mask of dropped patches
  "sampled"   from the frozen selector, sampled; gathered
  "expected"  from the frozen selector, deterministic; gathered

With `quantize` the vectors are quantized, and the codebook is updated by EMA.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from lavit_jax.core import averages, errors, image_io
from lavit_jax.core.storage import fingerprints
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import quantizer, selector, tokenizer
from lavit_jax.train import losses, phases
from lavit_jax.train.objectives import base, tokenizer_folds
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  precision,
)
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib

MASKS = ("random", "gumbel", "sampled", "expected")


class TokenizerObjective(base.Objective):
  """Trains a `tokenizer.DynamicVisualTokenizer` on images alone."""

  part = "tokenizer"
  best_metric = "recon_gain"
  best_mode = "max"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    meta = self.artifacts.meta(config.model_dir, "encoder")
    vit = vision.ViTConfig(**meta["vit"])
    vit = precision.applied(config, encoder=vit)["encoder"]
    self.model_config = tokenizer.config_from_dict(
      config.model.tokenizer.to_dict() | {"vit": vit}
    )
    self.model: Any = tokenizer.DynamicVisualTokenizer(self.model_config)
    self._train_data, self._held_out_data = self.artifacts.image_batches(
      config, (self.source, self.held_out)
    )

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws the parameters; extra: codebook statistics, mean features."""
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

  def frozen_shapes(self) -> base.Frozen:
    """Returns the encoder."""
    dtype = self.config.model.get("frozen_dtype", "float32")
    return {"encoder": abstract_params.encoder(self.model_config.vit, dtype)}

  def frozen_branches(self) -> dict[str, branches.Branch]:
    """Returns the encoder."""
    return {"encoder": branches.Branch(self.config.model_dir, "encoder")}

  def provenance(self) -> dict[str, str]:
    """Returns data and encoder."""
    encoder = fingerprints.of_part(self.config.model_dir, "encoder")
    return super().provenance() | {"encoder": encoder}

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns images alone."""
    return abstract_params.image_batch(self.config)

  def folds(self, phase: phases.Phase) -> tuple[base.Fold, ...]:
    """Mean features before the first phase; k-means before codes come on."""
    folds, config = [], self.model_config
    if phase.start == 0:
      shape = (config.num_patches, config.width)
      folds.append(tokenizer_folds.mean_features(shape, self._features))
    if phase.get("kmeans_iters", 0):
      shape = (self.config.batch_size, self.config.data.capacity)
      folds.append(
        tokenizer_folds.kmeans(
          phase, config.quantizer, shape, self._project_expected
        )
      )
    return tuple(folds)

  def _project_expected(self, params, frozen, batch):
    """Projects the patches that the selector keeps, deterministically."""
    features = self._features(frozen["encoder"], batch["image"])
    mask, _ = self._mask("expected", params, features, {})
    return self._project_compact(params, features, mask)

  def _features(self, encoder: Any, image: jax.Array) -> jax.Array:
    """Encodes uint8[B, H, W, 3] to float[B, N, D]; no gradient."""
    return jax.lax.stop_gradient(
      tokenizer.encode_images(
        self.model_config, encoder, image_io.normalize(image)
      )
    )

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws a random mask or the selector's noise; lots for dead codes."""
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
    if _revives(phase):
      soft = phase["mask"] == "gumbel"
      shape = rows, grid if soft else self.config.data.capacity
      lots = jax.random.permutation(revive_rng, shape[0] * shape[1])
      drawn["lot"] = 1 + lots.reshape(shape)
    return drawn

  def _mask(
    self,
    kind: str,
    params: base.Params,
    features: jax.Array,
    draws: base.Draws,
    temperature: float = 1.0,
  ) -> tuple[jax.Array, Any]:
    """Returns (mask float[B, N], log_probs float[B, N, 2] of the selector).

    The latter are None for a random mask.
    """
    if kind == "random":
      return draws["mask"].astype(jnp.float32), None
    log_probs = self.model.apply({"params": params}, features, method="select")
    if kind == "gumbel":
      mask = selector.mask_from_noise(log_probs, draws["gumbel"], temperature)
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

  def _phase_mask(self, phase, params, features, draws):
    temperature = phase["temperature"] if phase["mask"] == "gumbel" else 1.0
    return self._mask(phase["mask"], params, features, draws, temperature)

  def _project_compact(self, params, features, mask):
    """Gathers kept patches: unit vectors float[B, K, dim], valid[B, K]."""
    tokens, valid, _ = self.model.apply(
      {"params": params},
      features,
      mask > 0.5,
      self.config.data.capacity,
      method="merge_compact",
    )
    z = self.model.apply({"params": params}, tokens, method="project")
    return z, valid

  def _reconstruct(self, params, codebook, features, mask, *, soft, quantize):
    """Reconstructs features from the kept patches.

    Args:
      params: of the stage.
      codebook: its statistics.
      features: float[B, N, D].
      mask: float[B, N].
      soft: in the form with all positions; else kept patches are gathered.
      quantize: whether vectors are replaced by codes.

    Returns:
      (x_rec float[B, N, D]; z float[B, K, dim], ids int[B, K] and weights
      float[B, K] of the tokens; ids are None if they are not quantized).
    """
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
    if quantize:
      vectors, ids = quantizer.quantize(z, codebook["codes"])
    if soft:
      x_rec = self.model.apply(variables, vectors, mask, method="decode_soft")
    else:
      x_rec = self.model.apply(variables, vectors, valid, method="decode")
    return x_rec, z, ids, weights

  def nonlinear_sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> base.Sums:
    """Counts images and tokens, and sums kept shares and variances.

    It runs the encoder, which `sums` then runs again.
    """
    features = self._features(frozen["encoder"], batch["image"])
    mask, _ = self._phase_mask(phase, params, features, draws)
    sums = losses.image_sums(
      features, extra["feature_mean"], mask, batch["valid"]
    )
    if phase.get("quantize", False):
      count = mask.sum(1)
      if phase["mask"] != "gumbel":  # gathered
        count = jnp.minimum(count, self.config.data.capacity)
      sums["tokens"] = (count * batch["valid"]).sum()
    return sums

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Sums the loss's terms over valid images; stats: vectors of each code."""
    valid, soft = batch["valid"], phase["mask"] == "gumbel"
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._phase_mask(phase, params, features, draws)
    x_rec, z, ids, weights = self._reconstruct(
      params,
      extra["codebook"],
      features,
      mask,
      soft=soft,
      quantize=phase.get("quantize", False),
    )
    sums = losses.image_sums(features, extra["feature_mean"], mask, valid)
    sums |= losses.reconstruction_sums(features, x_rec, valid)
    if soft:
      sums |= losses.selection_sums(log_probs, valid)
    if ids is None:
      return sums, {}
    weights = weights * valid[:, None]
    codes = extra["codebook"]["codes"]
    commitment = quantizer.commitment(z, codes, ids) * weights
    sums |= {"commitment": commitment.sum(), "tokens": weights.sum()}
    stats = {"assigned": quantizer.assigned(z, ids, weights, len(codes))}
    if _revives(phase):
      lots = draws["lot"]
      stats["fresh"] = quantizer.candidates(z, lots, weights, len(codes))
    return sums, stats

  def combine(
    self, phase: phases.Phase, sums: base.Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Adds reconstruction, rate, entropy and commitment, as the phase has."""
    mean, count = averages.mean, sums["images"]
    recon = losses.reconstruction_loss(sums, phase["detail_weight"])
    loss = recon
    metrics: averages.Metrics = {
      "recon_loss": mean(recon * count, count),
      "kept_share": mean(sums["kept"], count),
    }
    if "entropy" in sums:
      loss = loss + losses.selection_loss(
        sums,
        rate=phase["rate"],
        rate_weight=phase["rate_weight"],
        entropy_weight=phase["entropy_weight"],
      )
      metrics |= {
        "entropy": mean(sums["entropy"], count),
        "p_keep_std": losses.p_keep_std(sums),
      }
    if "commitment" in sums:
      commitment = averages.ratio(sums["commitment"], sums["tokens"])
      loss = loss + phase["commitment"] * commitment
      metrics["commitment"] = mean(sums["commitment"], sums["tokens"])
    return loss, metrics | {"loss": mean(loss * count, count)}

  def merge_stats(self, a: base.Stats, b: base.Stats) -> base.Stats:
    """Adds sums; of the candidates for dead codes the highest lots stay."""
    add = lambda x, y: jax.tree.map(jnp.add, x, y)
    merges = {"assigned": add, "fresh": quantizer.merge_candidates}
    return {name: merges[name](a[name], b[name]) for name in a}

  def update_extra(
    self,
    phase: phases.Phase,
    extra: base.Extra,
    stats: base.Stats,
    params: base.Params,
  ) -> tuple[base.Extra, averages.Metrics]:
    """Moves the codebook by EMA, and dead codes to vectors of the batch."""
    del params
    if not stats:
      return extra, {}
    codebook = quantizer.ema_update(
      extra["codebook"], stats["assigned"], self.model_config.quantizer.decay
    )
    share, perplexity = quantizer.usage(stats["assigned"]["counts"])
    metrics: averages.Metrics = {
      "codes_in_batch": averages.of_step(share),
      "perplexity_in_batch": averages.of_step(perplexity),
    }
    if "fresh" in stats:
      codebook, revived = quantizer.revive_dead(
        codebook, stats["fresh"], phase["revive_below"]
      )
      metrics["codes_revived"] = averages.Sum(revived)
    return dict(extra) | {"codebook": codebook}, metrics

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Measures the gain in cosine over the mean features, and the share kept.

    The selection is deterministic. `recon_gain` is with codes, `gain_no_codes`
    with the vectors themselves.
    """
    valid = batch["valid"]
    features = self._features(frozen["encoder"], batch["image"])
    mask, log_probs = self._mask("expected", params, features, {})
    total = lambda x: (x.mean(1) * valid).sum()  # of float[B, N]
    mean = jnp.broadcast_to(extra["feature_mean"], features.shape)
    images, cos_mean = valid.sum(), total(losses.cosine(features, mean))
    metrics = {
      "kept_share": averages.mean(total(mask), images),
      "cos_mean": averages.mean(cos_mean, images),
      "p_keep_std": losses.p_keep_std(losses.selection_sums(log_probs, valid)),
    }
    for name, quantize in (("gain_no_codes", False), ("recon_gain", True)):
      x_rec, _, _, _ = self._reconstruct(
        params,
        extra["codebook"],
        features,
        mask,
        soft=False,
        quantize=quantize,
      )
      gain = total(losses.cosine(features, x_rec)) - cos_mean
      metrics[name] = averages.mean(gain, images - cos_mean)
    return metrics

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns the four parts' parameters, codebook and mean features."""
    stored = {
      "params": params,
      "codebook": {"codes": extra["codebook"]["codes"]},
      "feature_mean": extra["feature_mean"],
    }
    meta = {"tokenizer": dataclasses.asdict(self.model_config)}
    return {self.part: (stored, meta)}


def _revives(phase: phases.Phase) -> bool:
  """Returns whether the phase replaces codes that are not used."""
  return phase.get("quantize", False) and phase["revive_below"] > 0
