"""The pixel decoder that is trained here without latents, kind `pixels`."""

import os
from collections.abc import Sequence

import jax
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import sampling, schedules, solvers
from lavit_jax.infer.loading import visual
from lavit_jax.infer.pixels import options
from lavit_jax.models.pixels import pixel_decoder

STEPS = 20
# The options of `PixelOptions` that it takes.
_OPTIONS = (
  "decoder",
  "steps",
  "solver",
  "decoder_guidance_scale",
  "ratio",
  "size",
)


class PixelSpaceDecoder:
  """Decodes square images from reconstructed features, in float32."""

  kind = "pixels"
  batch_sizes = (1, 4, 16, 64)

  def __init__(self, directory: str | os.PathLike):
    """Reads the part `pixels` of a model directory.

    Raises:
      errors.CheckpointError: it is missing or damaged.
    """
    part = checkpoints.load_part(directory, "pixels")
    config = pixel_decoder.PixelDecoderConfig(**part.meta["pixels"])
    self._decoder = pixel_decoder.PixelDecoder(config)
    self._schedule = schedules.NoiseSchedule(**part.meta["schedule"])
    self._variables = {"params": part.params}
    self._listener = options.Listener()

  def check(self, settings: options.PixelOptions) -> None:
    """Raises UsageError for options that the decoder does not take."""
    settings.require_only(self.kind, _OPTIONS)
    self._plan(settings)
    ratio, size = settings.ratio, settings.size
    side = self._decoder.config.image_size
    given = repr(ratio) if size is None else " x ".join(map(str, size))
    if ratio not in (None, "1:1") or size not in (None, (side, side)):
      raise errors.UsageError(
        f"The pixel decoder of this model makes squares of {side} pixels, not"
        f" {given}. Leave the ratio or size out."
      )

  def decode(
    self,
    tokens: visual.VisualTokenizer,
    codes: Sequence[np.ndarray],
    seeds: np.ndarray,
    settings: options.PixelOptions,
    progress: options.Progress | None = None,
  ) -> np.ndarray:
    """Returns float32[B, H, W, 3] in [0, 1]; see `decoders.PixelDecoder`."""
    guidance = settings.decoder_guidance_scale
    solver, steps = self._plan(settings)
    with self._listener.forwarding(progress) as callback:
      images = sampling.draw(
        self._decoder,
        self._schedule,
        self._variables,
        tokens.features_of(codes),
        seeds,
        steps=steps,
        solver=solver,
        guide=guidance not in (None, 1),
        guidance=1.0 if guidance is None else guidance,
        progress=callback,
      )
      images = np.asarray(images)
      jax.effects_barrier()
    return images

  def _plan(self, settings):
    """Returns the solver and its steps; UsageError for too many steps."""
    solver = solvers.named(settings.solver, official=False)
    count = settings.steps or STEPS
    return solver, sampling.planned(solver, self._schedule, count)
