"""The loss and the EMA of weights that `pixels` and `latents` share."""

import jax

from lavit_jax.core import averages
from lavit_jax.diffusion import denoising
from lavit_jax.train import phases
from lavit_jax.train.objectives import base


class DiffusionObjective(base.Objective):
  """A stage whose `sums` are those of `denoising.eps_sums`."""

  best_metric = "loss"
  best_mode = "min"

  def nonlinear_sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> base.Sums:
    """Counts valid images times the noise levels drawn for each."""
    del params, frozen, extra, draws
    return denoising.norms(batch["valid"], phase.settings)

  def combine(
    self, phase: phases.Phase, sums: base.Sums
  ) -> tuple[jax.Array, averages.Metrics]:
    """Takes the mean over images and noise levels."""
    del phase
    return denoising.combine(sums)

  def update_extra(
    self,
    phase: phases.Phase,
    extra: base.Extra,
    stats: base.Stats,
    params: base.Params,
  ) -> tuple[base.Extra, averages.Metrics]:
    """Moves the exponential mean of the weights towards the new ones."""
    del stats
    return denoising.update_ema(extra, params, phase["ema_decay"]), {}
