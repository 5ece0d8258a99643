"""The pixel decoder that is trained here without latents."""

from collections.abc import Sequence

import jax
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import sampling, schedules, solvers
from lavit_jax.infer import visual
from lavit_jax.infer.pixels import options
from lavit_jax.models.pixels import pixel_decoder

STEPS = 20
_TAKES = (
  "decoder",
  "steps",
  "solver",
  "decoder_guidance_scale",
  "ratio",
  "size",
)


class PixelSpaceDecoder:
  """The part `pixels`: squares from reconstructed features, in float32."""

  kind = "pixels"
  batch_sizes = (1, 4, 16, 64)

  def __init__(self, directory):
    part = checkpoints.load_part(directory, "pixels")
    config = pixel_decoder.PixelDecoderConfig(**part.meta["pixels"])
    self._decoder = pixel_decoder.PixelDecoder(config)
    self._schedule = schedules.NoiseSchedule(**part.meta["schedule"])
    self._variables = {"params": part.params}
    self._listener = options.Listener()

  def check(self, how: options.PixelOptions) -> None:
    """UsageError for options that it cannot follow."""
    how.only_for(self.kind, _TAKES)
    side = self._decoder.config.image_size
    if how.ratio not in (None, "1:1") or how.size not in (None, (side, side)):
      raise errors.UsageError(
        f"The pixel decoder of this model draws squares of {side} pixels:"
        f" leave out ratio={how.ratio!r} and size={how.size}."
      )

  def paint(
    self,
    tokens: visual.VisualTokenizer,
    codes: Sequence[np.ndarray],
    seeds: np.ndarray,
    how: options.PixelOptions,
    progress: options.Progress | None = None,
  ) -> np.ndarray:
    """float32[B, H, W, 3] in [0, 1]; see `pixels/decoders.py`."""
    guidance = how.decoder_guidance_scale
    with self._listener.telling(progress) as tell:
      images = sampling.draw(
        self._decoder,
        self._schedule,
        self._variables,
        tokens.features_of(codes),
        seeds,
        steps=how.steps or STEPS,
        solver=solvers.named(how.solver, official=False),
        guide=guidance not in (None, 1),
        guidance=1.0 if guidance is None else guidance,
        progress=tell,
      )
      images = np.asarray(images)
      jax.effects_barrier()
    return images
