"""The official pixel decoders: words to conditions, latents, images.

LaVIT, arXiv 2309.04669, section 3.2. Three networks after one another: the
semantic decoder (part `lowres` or `highres`), the U-Net in a solver's loop
(`diffusion/stable_diffusion.py`), and the autoencoder, whose decoder runs
image by image: it needs most of the memory. The latter two are of the
part `KIND_pixels`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors
from lavit_jax.core.storage import checkpoints
from lavit_jax.diffusion import schedules, solvers, stable_diffusion
from lavit_jax.infer import visual
from lavit_jax.infer.pixels import options
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import decoder

KINDS = ("lowres", "highres")
STEPS = 25
GUIDANCE = {
  "lowres": stable_diffusion.LOWRES_GUIDANCE,
  "highres": stable_diffusion.HIGHRES_GUIDANCE,
}


def semantic(kind: str, meta, dtype: str = "float32"):
  """The `decoder.LowresDecoder` or `HighresDecoder` of a part's meta."""
  config = decoder.DecoderConfig(**meta["decoder"] | {"dtype": dtype})
  if kind == "lowres":
    return decoder.LowresDecoder(config, meta["condition_dim"])
  dims = tuple(meta["condition_dims"])
  return decoder.HighresDecoder(config, dims, meta["pooled_dim"])


class LatentSpaceDecoder:
  """A pixel decoder that draws in latents.

  Attributes:
    kind: "lowres" or "highres".
    side: pixels a side of the square it draws by default.
    factor: pixels a side of a latent place; sizes are multiples of it.
    schedule: of its noise.
    params: `told` of the semantic decoder, `unet`, `vae`, of lowres `uncond`.
  """

  batch_sizes = (1, 2, 4)

  def __init__(self, directory, kind: str, dtype: str = "float32"):
    """Reads both parts.

    Raises:
      errors.CheckpointError: a part is missing or damaged, or lacks a network.
    """
    told = checkpoints.load_part(directory, kind, dtype=dtype)
    pixels = checkpoints.load_part(
      directory,
      f"{kind}_pixels",
      dtype=dtype,
      branches={"vae": _vae_dtype(directory, kind, dtype)},
    )
    _check_networks(directory, kind, pixels)
    self.kind, self._dtype = kind, dtype
    self._semantic = semantic(kind, told.meta, dtype)
    config = unet.UNetConfig(**pixels.meta["unet"] | {"dtype": dtype})
    # Compiles faster where compiling takes long; runs slower on a CPU.
    scan = jax.default_backend() != "cpu"
    self._unet = unet.UNet(dataclasses.replace(config, remat="none", scan=scan))
    self._vae = vae.AutoencoderKL(
      vae.VaeConfig(**pixels.meta["vae"] | {"dtype": dtype})
    )
    self.schedule = schedules.NoiseSchedule(**pixels.meta["schedule"])
    self.side = self._vae.config.sample_size
    self.factor = self._vae.config.scale
    self.params = {"told": told.params, **pixels.params}
    if scan:
      self.params["unet"] = unet.stacked(self.params["unet"])
    self._listener = options.Listener()

  def told(self, vectors, valid):
    """What the semantic decoder makes of words.

    Args:
      vectors: float[B, K, d], of the codebook.
      valid: bool[B, K].

    Returns:
      The tokens float[B, N, D]; of highres a pair of these and the pooled
      vector float[B, P].
    """
    return self._told(self.params["told"], vectors, valid)

  @functools.cached_property
  def _told(self):
    return jax.jit(
      lambda params, *codes: self._semantic.apply({"params": params}, *codes)
    )

  def check(self, how: options.PixelOptions) -> None:
    """UsageError for options that it cannot follow."""
    if self.kind == "lowres":
      fields = [field.name for field in dataclasses.fields(how)]
      told = ("original_size", "crop")
      how.only_for(self.kind, tuple(n for n in fields if n not in told))
    self._settings(how)
    if how.tile is not None and (how.tile < 1 or how.tile % self.factor):
      raise errors.UsageError(
        f"tile={how.tile}: expected a multiple of {self.factor} pixels."
      )

  def _settings(self, how) -> stable_diffusion.Settings:
    height, width = how.size or (self.side, self.side)
    if how.ratio is not None:
      height, width = stable_diffusion.size_of(
        how.ratio, self.side, self.factor
      )
    return stable_diffusion.Settings(
      height=height,
      width=width,
      steps=how.steps or STEPS,
      solver=solvers.named(how.solver),
      dtype=self._dtype,
      channels=self._vae.config.latent_channels,
      factor=self.factor,
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
    return self.draw(*tokens.vectors_of(codes), seeds, how, progress=progress)

  def draw(
    self,
    vectors,
    valid,
    seeds,
    how: options.PixelOptions = options.PixelOptions(),
    *,
    noise=None,
    progress: options.Progress | None = None,
  ) -> np.ndarray:
    """Images of words.

    Args:
      vectors: float[B, K, d], of the codebook.
      valid: bool[B, K], False for padding, which comes last.
      seeds: int[B].
      how: all but its `decoder`.
      noise: float[B, h, w, C] to start from, instead of the seeds' own.
      progress: called with (steps done, steps) after each step.

    Returns:
      float32[B, H, W, 3] in [0, 1].

    Raises:
      errors.UsageError: options that it cannot follow.
    """
    self.check(how)
    guidance = how.decoder_guidance_scale
    guidance = GUIDANCE[self.kind] if guidance is None else guidance
    settings = self._settings(how)
    numbers = {
      "original_size": how.original_size or (settings.height, settings.width),
      "crop": how.crop,
    }
    with self._listener.telling(progress) as tell:
      images = self._draw(
        self.params,
        jnp.asarray(vectors),
        jnp.asarray(valid),
        jnp.asarray(seeds),
        jnp.asarray(guidance, jnp.float32),
        noise,
        jax.tree.map(jnp.float32, numbers),
        settings=dataclasses.replace(settings, progress=tell),
        alone=guidance == 1,
        tile=how.tile and how.tile // self.factor,
      )
      images = np.asarray(images)
      jax.effects_barrier()
    return images

  @functools.cached_property
  def _draw(self):
    def draw(params, vectors, valid, seeds, guidance, noise, numbers, **static):
      settings, tile = static["settings"], static["tile"]
      told = self._semantic.apply({"params": params["told"]}, vectors, valid)
      common = {
        "seeds": seeds,
        "guidance": 1 if static["alone"] else guidance,
        "noise": noise,
      }

      def denoise(z, t, given):
        return self._unet.apply({"params": params["unet"]}, z, t, **given)

      first = (denoise, self.schedule, settings)
      if self.kind == "lowres":
        z = stable_diffusion.lowres(*first, told, params["uncond"], **common)
      else:
        z = stable_diffusion.highres(*first, *told, **common, **numbers)
      return self._decode(params["vae"], z, tile)

    names = ("settings", "alone", "tile")
    return jax.jit(draw, static_argnames=names)

  def _decode(self, params, z, tile):
    """Images in [0, 1] of latents as drawn, one after the other."""
    variables = {"params": params}
    z = z / self._vae.config.scaling_factor

    def one(z):
      if tile is None:
        made = self._vae.apply(variables, z[None], method="decode")
      else:
        made = vae.decode_tiled(self._vae, variables, z[None], tile=tile)
      return made[0].astype(jnp.float32)

    made = jax.lax.map(one, z)
    return jnp.clip(made / 2 + 0.5, 0.0, 1.0)


def _vae_dtype(directory, kind, dtype):
  """That of the autoencoder's weights."""
  meta = checkpoints.read_meta(directory, f"{kind}_pixels")
  if "vae" not in meta:
    return dtype  # `_check_networks` refuses it
  return vae.VaeConfig(**meta["vae"] | {"dtype": dtype}).compute_dtype


def _check_networks(directory, kind, pixels):
  """CheckpointError unless the part has all that it draws with."""
  wanted = ["unet", "vae"] + ["uncond"] * (kind == "lowres")
  missing = [name for name in wanted if name not in pixels.params]
  if missing:
    raise errors.CheckpointError(
      f"The part {kind}_pixels of {directory} has no {', '.join(missing)}:"
      " nothing can be drawn by it. Import it again, or train it: stage"
      " latents of 'lavit train'."
    )
