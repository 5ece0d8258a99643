"""The official pixel decoders: visual tokens to latents to images.

LaVIT, arXiv 2309.04669, section 3.2. Three networks run in sequence: the
semantic decoder (part `lowres` or `highres`), the U-Net in the loop of a
solver (`diffusion/stable_diffusion.py`), and the decoder of an autoencoder,
image by image because it needs most of the memory. The last two are in the
part `KIND_pixels`.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import (
  sampling,
  schedules,
  solvers,
  stable_diffusion,
)
from lavit_jax.infer.loading import visual
from lavit_jax.infer.pixels import options
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder

KINDS = ("lowres", "highres")
STEPS = 25
GUIDANCE = {
  "lowres": stable_diffusion.LOWRES_GUIDANCE,
  "highres": stable_diffusion.HIGHRES_GUIDANCE,
}


def semantic(
  kind: str, meta: Mapping[str, Any], dtype: str = "float32"
) -> decoder.LowresDecoder | decoder.HighresDecoder:
  """Returns the semantic decoder that the metadata of a part describe."""
  config = decoder.DecoderConfig(**meta["decoder"] | {"dtype": dtype})
  if kind == "lowres":
    return decoder.LowresDecoder(config, meta["condition_dim"])
  dims = tuple(meta["condition_dims"])
  return decoder.HighresDecoder(config, dims, meta["pooled_dim"])


class LatentSpaceDecoder:
  """A pixel decoder that denoises latents.

  Attributes:
    kind: "lowres" or "highres".
    side: pixels a side of the square that it makes by default.
    factor: pixels a side of a latent position; sizes are multiples of it.
    schedule: of the noise.
    params: `semantic` (decoder), `unet`, `vae`, and of lowres `uncond`.
  """

  batch_sizes = (1, 2, 4)

  def __init__(
    self, directory: str | os.PathLike, kind: str, dtype: str = "float32"
  ):
    """Reads both parts of a model directory.

    Args:
      directory: a model directory.
      kind: one of KINDS.
      dtype: of the computation.

    Raises:
      errors.CheckpointError: a part is missing or damaged, or lacks a network.
    """
    conditioner = checkpoints.load_part(directory, kind, dtype=dtype)
    pixels = checkpoints.load_part(
      directory,
      f"{kind}_pixels",
      dtype=dtype,
      branches={"vae": _vae_dtype(directory, kind, dtype)},
    )
    _check_networks(directory, kind, pixels)
    self.kind, self._dtype = kind, dtype
    self._semantic = semantic(kind, conditioner.meta, dtype)
    config = unet.UNetConfig(**pixels.meta["unet"] | {"dtype": dtype})
    # A scan compiles faster, but runs slower on a CPU.
    scan = jax.default_backend() != "cpu"
    self._unet = unet.UNet(dataclasses.replace(config, remat="none", scan=scan))
    self._vae = vae.AutoencoderKL(
      vae.VaeConfig(**pixels.meta["vae"] | {"dtype": dtype})
    )
    self.schedule = schedules.NoiseSchedule(**pixels.meta["schedule"])
    self.side = self._vae.config.sample_size
    self.factor = self._vae.config.scale
    self.params = {"semantic": conditioner.params, **pixels.params}
    if scan:
      self.params["unet"] = unet.stacked(self.params["unet"])
    self._listener = options.Listener()

  def condition(
    self, vectors: jax.typing.ArrayLike, valid: jax.typing.ArrayLike
  ) -> Any:
    """Computes the conditioning of the U-Net from visual tokens.

    Args:
      vectors: float[B, K, d], of the codebook.
      valid: bool[B, K].

    Returns:
      The tokens float[B, N, D]; for highres a pair of these and the pooled
      vector float[B, P].
    """
    return self._condition(self.params["semantic"], vectors, valid)

  @functools.cached_property
  def _condition(self):
    return jax.jit(
      lambda params, *codes: self._semantic.apply({"params": params}, *codes)
    )

  def check(self, settings: options.PixelOptions) -> None:
    """Raises UsageError for options that the decoder does not take."""
    if self.kind == "lowres":
      fields = [field.name for field in dataclasses.fields(settings)]
      conditions = ("original_size", "crop")
      takes = tuple(name for name in fields if name not in conditions)
      settings.require_only(self.kind, takes)
    self._steps(self._settings(settings), settings.steps)
    tile = settings.tile
    if tile is not None and tile % self.factor:
      raise errors.UsageError(
        f"tile={tile}: expected a multiple of {self.factor} pixels."
      )

  def _steps(self, static, count) -> sampling.Steps:
    """Returns the steps of a solver; UsageError for too many."""
    return sampling.planned(static.solver, self.schedule, count or STEPS)

  def _settings(
    self, settings: options.PixelOptions
  ) -> stable_diffusion.Settings:
    height, width = settings.size or (self.side, self.side)
    if settings.ratio is not None:
      height, width = stable_diffusion.size_of(
        settings.ratio, self.side, self.factor
      )
    return stable_diffusion.Settings(
      height=height,
      width=width,
      solver=solvers.named(settings.solver),
      dtype=self._dtype,
      channels=self._vae.config.latent_channels,
      factor=self.factor,
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
    vectors, valid = tokens.vectors_of(codes)
    return self.draw(vectors, valid, seeds, settings, progress=progress)

  def draw(
    self,
    vectors: jax.typing.ArrayLike,
    valid: jax.typing.ArrayLike,
    seeds: jax.typing.ArrayLike,
    settings: options.PixelOptions = options.PixelOptions(),
    *,
    noise: jax.typing.ArrayLike | None = None,
    progress: options.Progress | None = None,
  ) -> np.ndarray:
    """Decodes images from the vectors of visual tokens.

    Args:
      vectors: float[B, K, d], of the codebook.
      valid: bool[B, K], False for padding, which comes last.
      seeds: int[B], of the noise.
      settings: options; `decoder` is ignored.
      noise: float[B, h, w, C], the first latents, in place of the seeds.
      progress: called with (steps done, steps) after each step.

    Returns:
      float32[B, H, W, 3] in [0, 1].

    Raises:
      errors.UsageError: options that the decoder does not take.
    """
    self.check(settings)
    guidance = settings.decoder_guidance_scale
    guidance = GUIDANCE[self.kind] if guidance is None else guidance
    static = self._settings(settings)
    steps = self._steps(static, settings.steps)
    sizes = {
      "original_size": settings.original_size or (static.height, static.width),
      "crop": settings.crop,
    }
    with self._listener.forwarding(progress) as callback:
      images = self._draw(
        self.params,
        vectors,
        valid,
        steps,
        np.asarray(seeds),
        np.float32(guidance),
        noise,
        jax.tree.map(np.float32, sizes),
        settings=dataclasses.replace(static, progress=callback),
        alone=guidance == 1,
        tile=settings.tile and settings.tile // self.factor,
      )
      images = np.asarray(images)
      jax.effects_barrier()
    return images

  @functools.cached_property
  def _draw(self):
    def draw(params, vectors, valid, *arrays, settings, alone, tile):
      steps, seeds, guidance, noise, sizes = arrays
      variables = {"params": params["semantic"]}
      condition = self._semantic.apply(variables, vectors, valid)
      common = {
        "steps": steps,
        "seeds": seeds,
        "guidance": 1 if alone else guidance,
        "noise": noise,
      }

      def denoise(z, t, conditions):
        return self._unet.apply({"params": params["unet"]}, z, t, **conditions)

      first = (denoise, self.schedule, settings)
      if self.kind == "lowres":
        pair = (condition, params["uncond"])
        z = stable_diffusion.lowres(*first, *pair, **common)
      else:
        z = stable_diffusion.highres(*first, *condition, **common, **sizes)
      return self._decode(params["vae"], z, tile)

    names = ("settings", "alone", "tile")
    return jax.jit(draw, static_argnames=names)

  def _decode(self, params, z, tile):
    """Returns images in [0, 1] of scaled latents, one after the other."""
    variables = {"params": params}
    z = z / self._vae.config.scaling_factor

    def one(z):
      if tile is None:
        image = self._vae.apply(variables, z[None], method="decode")
      else:
        image = vae.decode_tiled(self._vae, variables, z[None], tile=tile)
      return image[0].astype(jnp.float32)

    images = jax.lax.map(one, z)
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)


def _vae_dtype(directory, kind, dtype):
  """Returns the dtype of the autoencoder's weights."""
  meta = checkpoints.read_meta(directory, f"{kind}_pixels")
  if "vae" not in meta:
    return dtype  # `_check_networks` refuses it
  return vae.VaeConfig(**meta["vae"] | {"dtype": dtype}).compute_dtype


def _check_networks(directory, kind, pixels):
  """Raises CheckpointError unless the part has all its networks."""
  wanted = ["unet", "vae"] + ["uncond"] * (kind == "lowres")
  missing = [name for name in wanted if name not in pixels.params]
  if missing:
    raise errors.CheckpointError(
      f"The part {kind}_pixels of {directory} has no {', '.join(missing)}, and"
      " cannot decode without. Import it again, or train it: stage latents of"
      " 'lavit train'."
    )
