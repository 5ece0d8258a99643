"""Stage `latents`: Stable Diffusion's U-Nets learn to redraw from words.

Paper section 3.2 and appendix A: || eps - eps_theta(z_t, t, x_rec) ||^2 in the
latents of a frozen autoencoder, from the weights of Stable Diffusion 1.5
(`kind` "lowres": 512 x 512, told by N tokens) or SDXL ("highres": six ratios,
told by N tokens, a pooled vector and six numbers of size and place). Encoder,
tokenizer, semantic decoder and autoencoder are frozen; the projections of the
semantic decoder train if a phase says so. With `model.lora.rank` the U-Net is
frozen too, and low-rank changes of its attention train in its place.

A phase has, beside what every phase has:
  train              groups of `unet` (or its LoRA), `projection`, and `uncond`
  selection          "expected" or "sampled", as in the tokenizer's training
  sample_latents     draw latents from what the autoencoder gives; else means
  condition_dropout, weighting, min_snr, draws    see `denoising.eps_sums`
  ema_decay          of the mean weights, which are evaluated and exported
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import errors, sharding
from lavit_jax.data import faults
from lavit_jax.data.batching import bucket_rows
from lavit_jax.diffusion import denoising, schedules, stable_diffusion
from lavit_jax.models import lora
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import selector, tokenizer
from lavit_jax.train import phases
from lavit_jax.train.objectives import base, conditioning, diffusion
from lavit_jax.train.objectives.frozen import (
  abstract_params,
  branches,
  caches,
  latent_parts,
  precision,
)


class LatentsObjective(diffusion.DiffusionObjective):
  """Trains a `unet.UNet`, or its LoRA, in the latents of images.

  Parameters are `unet` (the whole, or its LoRA), `projection` and, for lowres,
  `uncond`; `state` has their exponential mean.
  """

  batch_size_may_change = False  # all images of a batch are of one bucket

  def __init__(self, config, where=None):
    super().__init__(config, where)
    model = config.model
    self.kind, self.part = model.kind, f"{model.kind}_pixels"
    sizes = unet.UNetConfig(**model.unet.to_dict())
    if model.lora.rank:  # belongs to layers by their paths: see `lora.applied`
      sizes = dataclasses.replace(sizes, scan=False)
    self.unet = unet.UNet(sizes)
    self.schedule = schedules.NoiseSchedule(**model.schedule.to_dict())
    self.lora_scale = model.lora.alpha / max(model.lora.rank, 1)
    self._check()
    self._use_networks()
    if model.lora.rank and not self.stored.outline:
      wanted = sharding.unbox(abstract_params.denoiser(self.unet))
      branches.check({"unet": self._start("unet")}, {"unet": wanted})
    self._use_buckets()

  def _use_networks(self):
    """The frozen ones, computed as the run says."""
    config, where = self.config, self.config.model_dir
    words = self.stored.words(where)
    told = self.stored.conditioner(where, self.kind, config.model.condition)
    semantic = told.model.config
    where = config.vae_from or config.start_from or where
    # As it is stored, and so to be written again.
    self._vae_config = self.stored.autoencoder(where, self.kind)
    self._vae_branch = branches.Branch(where, self.part, "vae")
    made = {"encoder": words.vit, "tokenizer": words, "decoder": semantic}
    learns = phases.trains(config, "projection")  # in the decoder's dtype
    made = precision.applied(
      config,
      trained=("decoder",) if learns else (),
      **made,
      vae=self._vae_config,
    )
    self.tokenizer = tokenizer.DynamicVisualTokenizer(
      dataclasses.replace(made["tokenizer"], vit=made["encoder"])
    )
    model = told.model.clone(config=made["decoder"])
    self._told = dataclasses.replace(told, model=model)
    self.vae = vae.AutoencoderKL(made["vae"])

  def _check(self):
    config = self.config
    latent_parts.check_unet(self.kind, self.unet.config, config.model.condition)
    for name in config.schedule:
      phase = config.phases[name]
      denoising.check(self.schedule, phase)
      conditioning.check(name, phase)
      if phase.sample_latents and config.data.latents_dir:
        raise errors.ConfigError(
          f"phases.{name}.sample_latents=True draws anew each time, but"
          " data.latents_dir holds the same always. Change one of them."
        )
    self.stored.check_start(config, self.unet.config, self.schedule)
    starts = bool(config.start_from or self.stored.outline)
    latent_parts.check_directories(config, starts=starts)

  def _start(self, top):
    """A branch of the part that the run starts from."""
    return branches.Branch(self.config.start_from, self.part, top)

  def _use_buckets(self):
    data, found = self.config.data, self.tokenizer.config.vit.image_size
    if data.image_size != found:
      raise errors.ConfigError(
        f"data.image_size={data.image_size}, but the encoder of"
        f" {self.config.model_dir} sees {found} pixels a side. Set"
        f" data.image_size={found}."
      )
    latent_parts.check_buckets(data.buckets, self.vae.config)
    self.batch_examples = self.config.batch_size
    if self.stored.outline:
      return
    self._train_data = self._batches(self.source, self.config.seed)
    self._held_out_data = self._batches(self.held_out, None)

  def _batches(self, source, seed):
    """Batches of a source: the endless ones with a seed, else once each."""
    data, training = self.config.data, seed is not None
    stored = caches.latents(
      data,
      training,
      source,
      self.images_of[not training],
      self._vae_config,
      lambda: latent_parts.read_tree(self._vae_branch),
    )
    return bucket_rows.batches(
      source,
      data.buckets,
      self.config.batch_size,
      seed=seed,
      crop=data.crop if training else "center",
      latents=stored,
      limit_share=faults.share_of(data),
    )

  def made_of(self):
    """Data, caches, all that is frozen."""
    found = super().made_of() | self.words_made_of()
    found |= latent_parts.made_of(self.config, self._told.meta is not None)
    return found | caches.made_of_latents(self.config.data)

  def init(self, rng):
    """Boxed parameters; extra: their exponential mean and its updates."""
    unet_key, told_key, uncond_key = jax.random.split(rng, 3)
    params = {"projection": self._init_projection(told_key)}
    settings = self.config.model.lora
    init = functools.partial(latent_parts.init_unet, self.unet)
    if settings.rank:
      boxed = jax.eval_shape(init, unet_key)
      params["unet"] = lora.init(unet_key, boxed, settings.rank)
    else:
      params["unet"] = init(unet_key)
    if self.kind == "lowres":
      shape = (self.config.model.uncond_tokens, self.unet.config.cross_dim)
      uncond = 0.02 * jax.random.normal(uncond_key, shape)
      axes = ("position", "embed")
      params["uncond"] = nn.LogicallyPartitioned(uncond, axes)
    return params, denoising.start_ema(params)

  def _init_projection(self, rng):
    """What comes after the semantic decoder, boxed."""
    model = self._told.model
    shape = (1, model.config.num_patches)
    vectors = jnp.zeros((*shape, model.config.code_dim))
    made = dict(model.init(rng, vectors, jnp.ones(shape, bool))["params"])
    del made["decoder"]
    return made

  def frozen_shapes(self):
    """Encoder, tokenizer, semantic decoder, autoencoder; under LoRA U-Net."""
    config, dtype = self.tokenizer.config, self.config.model.frozen_dtype
    told = abstract_params.conditioner(self._told.model, dtype)
    made = {
      "encoder": abstract_params.encoder(config.vit, dtype),
      "tokenizer": latent_parts.used_words(abstract_params.words(config)),
      "semantic": told["decoder"],
      "vae": abstract_params.autoencoder(self.vae),
    }
    if self.config.model.lora.rank:
      made["unet"] = abstract_params.denoiser(self.unet, dtype)
    return made

  def frozen_branches(self):
    """Where they are: see `_use_networks`."""
    where = self.config.model_dir
    made = {
      "encoder": branches.Branch(where, "encoder"),
      "tokenizer": branches.Branch(where, "tokenizer"),
      "semantic": self._told.semantic,
      "vae": self._vae_branch,
    }
    if self.config.model.lora.rank:
      made["unet"] = self._start("unet")
    return made

  def batch_shapes(self):
    """Images of the largest bucket."""
    data, count = self.config.data, self.config.batch_size
    height, width = max(data.buckets, key=lambda pair: pair[0] * pair[1])
    side, vae = data.image_size, self.vae.config
    made = {
      "image": ((count, side, side, 3), np.uint8),
      "valid": ((count,), np.float32),
      "index": ((count,), np.int64),
      "sizes": ((count, 6), np.float32),
      "target": ((count, height, width, 3), np.uint8),
    }
    if data.latents_dir:
      del made["target"]
      size = (height // vae.scale, width // vae.scale, vae.latent_channels)
      made["latents"] = ((count, *size), np.float16)
    return base.abstract(made)

  def begin_phase(self, phase, state):
    """The weights of config.start_from, and of the part `kind` if it is."""
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
    for name, theirs in start.items():
      base.check_same(folder, state.params[name], theirs, name)
    if self._told.projection is not None:
      found = {"projection": self._told.projection}
      start |= self.load_start(found, state.params)
    params = state.params | start
    return params, denoising.start_ema(params)

  def draws(self, phase, batch, rng):
    """Noise of latents, of the selection and of the steps."""
    x_key, select_key, loss_key = jax.random.split(rng, 3)
    rows = len(batch["image"])
    drawn = denoising.draws(self.schedule, rows, phase, loss_key)
    if phase["sample_latents"]:
      drawn["latents"] = jax.random.split(x_key, rows)
    if phase["selection"] == "sampled":
      shape = (rows, self.tokenizer.config.num_patches)
      drawn["gumbel"] = selector.gumbel(select_key, shape)
    return drawn

  def sums(self, phase, params, frozen, state, batch, draws):
    """The weighted squared error of valid images."""
    del state
    x = self._latents(frozen, batch, draws.get("latents"))
    told = self._condition(params, frozen, batch, draws.get("gumbel"))
    given = self._predict(params, frozen), self.schedule, x, told
    return denoising.eps_sums(*given, batch["valid"], draws, phase), {}

  def _latents(self, frozen, batch, keys=None):
    """float32[B, h, w, C] as the U-Net sees them; means without keys [B]."""
    factor = self.vae.config.scaling_factor
    if "latents" in batch:
      return batch["latents"].astype(jnp.float32) * factor
    mean, logvar = self.vae.apply(
      {"params": frozen["vae"]},
      conditioning.to_unit(batch["target"]),
      method="encode",
    )
    noise = None if keys is None else denoising.normal(keys, mean.shape[1:])
    return jax.lax.stop_gradient(vae.sample(mean, logvar, noise) * factor)

  def _condition(self, params, frozen, batch, gumbel=None):
    """What the U-Net is told of each image: `tokens`, `pooled`, `sizes`."""
    ids, valid = conditioning.words(
      self.tokenizer, frozen, batch["image"], gumbel
    )
    codes = frozen["tokenizer"]["codebook"]["codes"]
    told = self._told.model.apply(
      {"params": {"decoder": frozen["semantic"]} | params["projection"]},
      jnp.take(codes, ids, axis=0),
      valid,
    )
    if self.kind == "lowres":
      return {"tokens": told}
    tokens, pooled = told
    return {"tokens": tokens, "pooled": pooled, "sizes": batch["sizes"]}

  def _predict(self, params, frozen):
    """The function that `denoising.eps_sums` asks for."""

    def predict(z, t, told, drop):
      uncond = params.get("uncond")
      given = latent_parts.tell(self.kind, told, uncond, drop)
      return self._denoise(params, frozen, z, t, given)

    return predict

  def _denoise(self, params, frozen, z, t, given):
    """The U-Net's output, with its LoRA if there is one."""
    low = params["unet"] if self.config.model.lora.rank else None
    weights = params["unet"] if low is None else frozen["unet"]
    with lora.applied(low, self.lora_scale):
      return self.unet.apply({"params": weights}, z, t, **given)

  def held_out_metrics(self, params, frozen, state, batch):
    """Errors of the mean weights, always under the same noise.

    The first `eval.sample_pictures` of a batch are also drawn, in
    `eval.sample_steps` steps without guidance, and held to what the
    autoencoder makes of the real ones: `latent_mse`, `picture_mse`, and
    `images`, both one above the other.
    """
    del params
    rng, ema = jax.random.key(0), state["ema"]
    x = self._latents(frozen, batch)
    told = self._condition(ema, frozen, batch)
    phase = dict(self.last_phase) | {"condition_dropout": 0.0, "draws": 1}
    predict, valid = self._predict(ema, frozen), batch["valid"]
    _, metrics = denoising.eps_loss(
      predict, self.schedule, x, told, valid, rng, phase
    )
    if shown := self.config.eval.sample_pictures:
      x, told, valid = jax.tree.map(lambda v: v[:shown], (x, told, valid))
      metrics |= self._drawn_metrics(ema, frozen, x, told, valid)
    return metrics

  def _drawn_metrics(self, params, frozen, x, told, valid):
    """What is drawn with some weights, beside latents x and their images."""
    drawn = self.draw(params, frozen, told, x.shape[1:])
    of_latents = jnp.square(drawn - x).mean((1, 2, 3))
    real, drawn = (self.decode(frozen, z) for z in (x, drawn))
    of_images = jnp.square(drawn - real).mean((1, 2, 3))
    both = jnp.concatenate([real, drawn], axis=1)  # [B, 2 H, W, 3]
    return {
      "latent_mse": denoising.mean(of_latents, valid),
      "picture_mse": denoising.mean(of_images, valid),
      "images": jnp.round(both * 127.5 + 127.5).astype(jnp.uint8),
    }

  def draw(self, params, frozen, told, shape):
    """Latents float32[B, h, w, C] drawn without guidance, seeds 0 ... B - 1."""
    scale, count = self.vae.config.scale, len(told["tokens"])
    settings = stable_diffusion.Settings(
      height=shape[0] * scale,
      width=shape[1] * scale,
      steps=self.config.eval.sample_steps,
      channels=shape[2],
      factor=scale,
    )
    denoise = functools.partial(self._denoise, params, frozen)
    common = (denoise, self.schedule, settings, told["tokens"])
    seeds = jnp.arange(count)
    if self.kind == "lowres":
      uncond = params["uncond"]
      return stable_diffusion.lowres(*common, uncond, seeds=seeds, guidance=1)
    return stable_diffusion.highres(
      *common, told["pooled"], seeds=seeds, guidance=1
    )

  def decode(self, frozen, z):
    """Images float32[B, H, W, 3] in [-1, 1] of latents as drawn."""
    z = z / self.vae.config.scaling_factor
    made = self.vae.apply({"params": frozen["vae"]}, z, method="decode")
    return jnp.clip(made, -1.0, 1.0)

  def exports(self, params, state):
    """The U-Net with its autoencoder; the semantic decoder, if it changed."""
    del params
    ema = state["ema"]
    net = ema["unet"]
    if self.config.model.lora.rank:
      boxed = abstract_params.denoiser(self.unet)
      net = self.with_lora(self._start("unet"), boxed, net, self.lora_scale)
    tree = {"unet": unet.unstacked(net)}
    tree["vae"] = latent_parts.read_tree(self._vae_branch)
    if self.kind == "lowres":
      tree["uncond"] = ema["uncond"][None]  # [1, U, D], as officially
    made = {self.part: (tree, self._meta())}
    if self._told.meta is None or phases.trains(self.config, "projection"):
      own = latent_parts.read_tree(self._told.semantic)
      semantic = {"decoder": own} | ema["projection"]
      model = self._told.model
      meta = self._told.meta or latent_parts.conditioner_meta(self.kind, model)
      made[self.kind] = (semantic, meta)
    return made

  def _meta(self):
    """The meta of the part with the U-Net."""
    meta = {
      "unet": dataclasses.asdict(self.unet.config) | {"scan": False},
      "vae": dataclasses.asdict(self._vae_config),
      "schedule": dataclasses.asdict(self.schedule),
    }
    return latent_parts.with_port(meta, self.config.start_from, self.part)
