"""What stages `pixels` and `latents` share: the loss, the mean weights."""

from lavit_jax.diffusion import denoising
from lavit_jax.train.objectives import base


class DiffusionObjective(base.Objective):
  """A stage whose `sums` are those of `denoising.eps_sums`."""

  best_metric = "loss"
  best_mode = "min"

  def norms(self, phase, params, frozen, state, batch, draws):
    """Images, as often as they are drawn."""
    del params, frozen, state, draws
    return denoising.norms(batch["valid"], phase)

  def combine(self, phase, sums):
    """The mean over images and their draws."""
    del phase
    return denoising.combine(sums)

  def update_extra(self, phase, state, seen, params):
    """The mean weights follow the new ones."""
    del seen
    return denoising.update_ema(state, params, phase["ema_decay"]), {}
