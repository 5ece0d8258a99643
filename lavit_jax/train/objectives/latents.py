"""Stage `latents`: Stable Diffusion's U-Nets learn to redraw from codes.

Paper section 3.2 and appendix A: || eps - eps_theta(z_t, t, x_rec) ||^2 in the
latents of a frozen autoencoder, from the weights of Stable Diffusion 1.5
(`kind` "lowres": 512 x 512, conditioned on N tokens) or SDXL ("highres": six
aspect ratios, conditioned on N tokens, a pooled vector and six numbers: sizes
and crop corner). Encoder, tokenizer, semantic decoder and autoencoder are
frozen; the projections of the semantic decoder train if a phase says so. With
`model.lora.rank` the U-Net is frozen too, and low-rank changes of its attention
train in its place.

Settings of a phase:
  train              groups of `unet` (or its LoRA), `projection`, and `uncond`
  selection          "expected" or "sampled", as in the tokenizer's training
  sample_latents     whether latents are sampled from the autoencoder's
                     distribution; else their means are taken
  condition_dropout, weighting, min_snr, draws    see `denoising.eps_sums`
  ema_decay          of the mean weights, which are evaluated and exported
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from lavit_jax.core import errors, sharding
from lavit_jax.data import faults
from lavit_jax.data.batching import bucket_rows
from lavit_jax.diffusion import denoising, schedules, stable_diffusion
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet
from lavit_jax.models.tokenizer import selector
from lavit_jax.train import phases
from lavit_jax.train.objectives import base, diffusion
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  caches,
  conditioning,
  latent_checks,
  latent_networks,
  latent_parts,
)
from lavit_jax.train.objectives.frozen import artifacts as artifacts_lib


class LatentsObjective(diffusion.DiffusionObjective):
  """Trains a `unet.UNet`, or its LoRA, in the latents of images.

  Parameters are `unet` (all weights, or the LoRA), `projection` and, for
  lowres, `uncond`; extra is their exponential mean.
  """

  batch_size_may_change = False  # all images of a batch are of one bucket

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    artifacts: artifacts_lib.Artifacts | None = None,
  ):
    super().__init__(config, artifacts)
    model = config.model
    self.kind, self.part = model.kind, f"{model.kind}_pixels"
    net = unet.UNetConfig(**model.unet.to_dict())
    if model.lora.rank:  # its layers have paths: see `lora.applied`
      net = dataclasses.replace(net, scan=False)
    self.unet: Any = unet.UNet(net)
    self.schedule = schedules.NoiseSchedule(**model.schedule.to_dict())
    self.lora_scale = model.lora.alpha / max(model.lora.rank, 1)
    self._check()
    self.networks = latent_networks.LatentNetworks(config, self.artifacts)
    self.tokenizer, self.vae = self.networks.tokenizer, self.networks.vae
    self.conditioner = self.networks.conditioner
    if self.artifacts.is_abstract:
      return
    if model.lora.rank:
      shapes = sharding.unbox(abstract_params.denoiser(self.unet))
      branches.check({"unet": self._start("unet")}, {"unet": shapes})
    self._train_data = self._batches(self.source, config.seed)
    self._held_out_data = self._batches(self.held_out, None)

  def _check(self) -> None:
    """Raises ConfigError for settings that do not fit each other."""
    config = self.config
    latent_checks.check_unet(
      self.kind, self.unet.config, config.model.condition
    )
    for name in config.schedule:
      settings = config.phases[name]
      denoising.check(self.schedule, settings)
      conditioning.check(name, settings.selection)
      if settings.sample_latents and config.data.latents_dir:
        raise errors.ConfigError(
          f"phases.{name}.sample_latents=True samples new latents each time,"
          " but data.latents_dir has fixed ones. Change one of them."
        )
    self.artifacts.check_start(config, self.unet.config, self.schedule)
    latent_checks.check_directories(
      config, has_start=bool(config.start_from or self.artifacts.is_abstract)
    )

  def _start(self, top: str) -> branches.Branch:
    """Returns a branch of the part that the run starts from."""
    return branches.Branch(self.config.start_from, self.part, top)

  def provenance(self) -> dict[str, str]:
    """Returns data, caches and all frozen networks."""
    is_part = self.conditioner.meta is not None
    return (
      super().provenance()
      | self.artifacts.tokenizer_provenance(self.config)
      | latent_parts.provenance(self.config, is_part)
      | caches.latents_provenance(self.config.data)
    )

  # Data.

  def _batches(self, source: Any, seed: int | None) -> Any:
    """Makes batches of a source: endless ones with a seed, else each once."""
    data, training = self.config.data, seed is not None
    cache = caches.latents(
      data,
      training,
      source,
      self.networks.stored_vae,
      lambda: latent_parts.read_tree(self.networks.vae_branch),
    )
    return bucket_rows.batches(
      source,
      data.buckets,
      self.config.batch_size,
      seed=seed,
      crop=data.crop if training else "center",
      latents=cache,
      limit_share=faults.share_of(data),
    )

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns images of the largest bucket."""
    data, count = self.config.data, self.config.batch_size
    height, width = max(data.buckets, key=lambda pair: pair[0] * pair[1])
    side, vae = data.image_size, self.vae.config
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
      "image": ((count, side, side, 3), np.uint8),
      "valid": ((count,), np.float32),
      "index": ((count,), np.int64),
      "sizes": ((count, 6), np.float32),
      "target": ((count, height, width, 3), np.uint8),
    }
    if data.latents_dir:
      del shapes["target"]
      size = (height // vae.scale, width // vae.scale, vae.latent_channels)
      shapes["latents"] = ((count, *size), np.float16)
    return abstract_params.arrays(shapes)

  # Parameters.

  def init(self, rng: jax.Array) -> tuple[base.Params, base.Extra]:
    """Draws the parameters; extra: their exponential mean."""
    unet_key, projection_key, uncond_key = jax.random.split(rng, 3)
    params = {"projection": self.networks.init_projection(projection_key)}
    rank = self.config.model.lora.rank
    init = functools.partial(latent_parts.init_unet, self.unet)
    if rank:
      boxed = jax.eval_shape(init, unet_key)
      params["unet"] = lora.init(unet_key, boxed, rank)
    else:
      params["unet"] = init(unet_key)
    if self.kind == "lowres":
      shape = (self.config.model.uncond_tokens, self.unet.config.cross_dim)
      uncond = 0.02 * jax.random.normal(uncond_key, shape)
      axes = ("position", "embed")
      params["uncond"] = nn.LogicallyPartitioned(uncond, axes)
    return params, denoising.start_ema(params)

  def begin_phase(
    self, phase: phases.Phase, state: Any
  ) -> tuple[base.Params, base.Extra]:
    """Reads U-Net and `uncond` of start_from, and stored projections."""
    if phase.start:
      return state.params, state.extra
    start, folder = {}, self.config.start_from
    if folder and not self.config.model.lora.rank:
      start["unet"] = latent_parts.read_tree(self._start("unet"))
      if self.unet.config.scan and start["unet"] is not None:
        start["unet"] = unet.stacked(start["unet"])
    if folder and self.kind == "lowres":
      uncond = latent_parts.read_tree(self._start("uncond"))
      if uncond is not None:  # [1, U, D] officially
        start["uncond"] = uncond.reshape(-1, uncond.shape[-1])
    start = {k: v for k, v in start.items() if v is not None}
    for name, stored in start.items():
      branches.check_same(folder, state.params[name], stored, name)
    if self.conditioner.projection is not None:
      projection = {"projection": self.conditioner.projection}
      start |= self.artifacts.load_like(projection, state.params)
    params = state.params | start
    return params, denoising.start_ema(params)

  def frozen_shapes(self) -> base.Frozen:
    """Returns the frozen networks; under LoRA the U-Net too."""
    shapes = self.networks.shapes()
    if self.config.model.lora.rank:
      dtype = self.config.model.frozen_dtype
      shapes["unet"] = abstract_params.denoiser(self.unet, dtype)
    return shapes

  def frozen_branches(self) -> dict[str, branches.Branch]:
    """Returns where the frozen networks are stored."""
    stored = self.networks.branches()
    if self.config.model.lora.rank:
      stored["unet"] = self._start("unet")
    return stored

  # The loss.

  def draws(
    self, phase: phases.Phase, batch: base.Batch, rng: jax.Array
  ) -> base.Draws:
    """Draws noise of latents, of the selection and of the steps."""
    x_key, select_key, loss_key = jax.random.split(rng, 3)
    rows = len(batch["image"])
    drawn = denoising.draws(self.schedule, rows, phase.settings, loss_key)
    if phase["sample_latents"]:
      drawn["latents"] = jax.random.split(x_key, rows)
    if phase["selection"] == "sampled":
      shape = (rows, self.tokenizer.config.num_patches)
      drawn["gumbel"] = selector.gumbel(select_key, shape)
    return drawn

  def sums(
    self,
    phase: phases.Phase,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
    draws: base.Draws,
  ) -> tuple[base.Sums, base.Stats]:
    """Sums the weighted squared errors of valid images; no stats."""
    del extra
    sums = denoising.eps_sums(
      self._predict(params, frozen),
      self.schedule,
      self.networks.latents(frozen, batch, draws.get("latents")),
      self.networks.conditions(
        params["projection"], frozen, batch, draws.get("gumbel")
      ),
      batch["valid"],
      draws,
      phase.settings,
    )
    return sums, {}

  def _predict(
    self, params: base.Params, frozen: base.Frozen
  ) -> denoising.Predict:
    """Returns the U-Net as `denoising.eps_sums` calls it."""

    def predict(z, t, conditions, drop):
      uncond = params.get("uncond")
      inputs = latent_parts.unet_inputs(self.kind, conditions, uncond, drop)
      return self._denoise(params, frozen, z, t, inputs)

    return predict

  def _denoise(self, params, frozen, z, t, inputs) -> jax.Array:
    """Runs the U-Net, with its LoRA if there is one."""
    low = params["unet"] if self.config.model.lora.rank else None
    weights = params["unet"] if low is None else frozen["unet"]
    with lora.applied(low, self.lora_scale):
      return self.unet.apply({"params": weights}, z, t, **inputs)

  # Evaluation and result.

  def held_out_metrics(
    self,
    params: base.Params,
    frozen: base.Frozen,
    extra: base.Extra,
    batch: base.Batch,
  ) -> dict[str, Any]:
    """Measures errors of the mean weights, always under the same noise.

    The first `eval.sample_pictures` of a batch are also drawn, in
    `eval.sample_steps` steps without guidance, and compared with what the
    autoencoder makes of the real ones: `latent_mse`, `picture_mse`, and
    `images`, the real image above the drawn one.
    """
    del params
    rng, ema = jax.random.key(0), extra["ema"]
    x = self.networks.latents(frozen, batch)
    conditions = self.networks.conditions(ema["projection"], frozen, batch)
    phase = self.last_phase.with_settings(condition_dropout=0.0, draws=1)
    predict, valid = self._predict(ema, frozen), batch["valid"]
    _, metrics = denoising.eps_loss(
      predict, self.schedule, x, conditions, valid, rng, phase.settings
    )
    if count := self.config.eval.sample_pictures:
      first = jax.tree.map(lambda v: v[:count], (x, conditions, valid))
      metrics |= self._sample_metrics(ema, frozen, *first)
    return metrics

  def _sample_metrics(self, params, frozen, x, conditions, valid):
    """Compares images that are drawn with those of their latents x."""
    drawn = self.sample(params, frozen, conditions, x.shape[1:])
    latent_error = jnp.square(drawn - x).mean((1, 2, 3))
    real, drawn = (self.networks.decode(frozen, z) for z in (x, drawn))
    image_error = jnp.square(drawn - real).mean((1, 2, 3))
    both = jnp.concatenate([real, drawn], axis=1)  # [B, 2 H, W, 3]
    return {
      "latent_mse": denoising.mean(latent_error, valid),
      "picture_mse": denoising.mean(image_error, valid),
      "images": jnp.round(both * 127.5 + 127.5).astype(jnp.uint8),
    }

  def sample(
    self,
    params: base.Params,
    frozen: base.Frozen,
    conditions: dict[str, jax.Array],
    shape: tuple[int, ...],
  ) -> jax.Array:
    """Draws latents without guidance, with seeds 0 ... B - 1.

    Args:
      params: of the stage.
      frozen: see `load_frozen`.
      conditions: see `LatentNetworks.conditions`.
      shape: (h, w, C) of an image's latents.

    Returns:
      float32[B, h, w, C].
    """
    scale, tokens = self.vae.config.scale, conditions["tokens"]
    settings = stable_diffusion.Settings(
      height=shape[0] * scale,
      width=shape[1] * scale,
      channels=shape[2],
      factor=scale,
    )
    denoise = functools.partial(self._denoise, params, frozen)
    common = (denoise, self.schedule, settings, tokens)
    options: dict[str, Any] = {
      "steps": self.config.eval.sample_steps,
      "seeds": jnp.arange(len(tokens)),
      "guidance": 1,
    }
    if self.kind == "lowres":
      return stable_diffusion.lowres(*common, params["uncond"], **options)
    return stable_diffusion.highres(*common, conditions["pooled"], **options)

  def export(
    self, params: base.Params, extra: base.Extra
  ) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns U-Net and autoencoder; the semantic decoder if it is changed."""
    del params
    ema = extra["ema"]
    net = ema["unet"]
    if self.config.model.lora.rank:
      boxed = abstract_params.denoiser(self.unet)
      net = self.artifacts.load_with_lora(
        self._start("unet"), boxed, net, self.lora_scale
      )
    tree = {"unet": unet.unstacked(net)}
    tree["vae"] = latent_parts.read_tree(self.networks.vae_branch)
    if self.kind == "lowres":
      tree["uncond"] = ema["uncond"][None]  # [1, U, D], as officially
    parts = {self.part: (tree, self._meta())}
    stored = self.conditioner
    if stored.meta is None or phases.trains(self.config, "projection"):
      decoder = latent_parts.read_tree(self.networks.branches()["semantic"])
      meta = stored.meta or latent_parts.conditioner_meta(
        self.kind, stored.model
      )
      parts[self.kind] = ({"decoder": decoder} | ema["projection"], meta)
    return parts

  def _meta(self) -> dict[str, Any]:
    """Returns the part.json entries of the part with the U-Net."""
    meta = {
      "unet": dataclasses.asdict(self.unet.config) | {"scan": False},
      "vae": dataclasses.asdict(self.networks.stored_vae),
      "schedule": dataclasses.asdict(self.schedule),
    }
    return latent_parts.with_port(meta, self.config.start_from, self.part)
