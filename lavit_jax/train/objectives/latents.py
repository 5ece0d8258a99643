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
  condition_dropout, weighting, min_snr, draws    see `denoising.eps_loss`
  ema_decay          of the mean weights, which are evaluated and exported
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import checkpoints, errors
from lavit_jax.data import bucket_rows, examples, latent_cache
from lavit_jax.infer import latents, schedules
from lavit_jax.models import unet, vae
from lavit_jax.train import conditions, denoising, latent_parts, lora, shapes
from lavit_jax.train import state as state_lib
from lavit_jax.train.objectives import base


class LatentsObjective(base.Objective):
  """Trains a `unet.UNet`, or its LoRA, in the latents of pictures.

  Parameters are `unet` (the whole, or its LoRA), `projection` and, for lowres,
  `uncond`; `state` has their exponential mean.
  """

  best_metric = "loss"
  best_mode = "min"
  free_rows = False  # all pictures of a batch are of one bucket

  def __init__(self, config, where=None):
    super().__init__(config, where)
    model = config.model
    self.kind, self.part = model.kind, f"{model.kind}_pixels"
    sizes = unet.UNetConfig(**model.unet.to_dict())
    if model.lora.rank:  # belongs to layers by their paths: see `lora.applied`
      sizes = dataclasses.replace(sizes, scan=False)
    self.unet = unet.UNet(sizes)
    self.schedule = schedules.Schedule(**model.schedule.to_dict())
    self.lora_scale = model.lora.alpha / max(model.lora.rank, 1)
    self._check()
    words = self.stored.words(config.model_dir, model.frozen_dtype)
    self.tokenizer = words.model
    self._told = self.stored.conditioner(
      config.model_dir, self.kind, model.condition, model.frozen_dtype
    )
    self.vae, params = self.stored.autoencoder(
      config.vae_from or config.start_from or config.model_dir, self.kind
    )
    self._vae_params = params
    semantic = self.stored.cast(self._told.semantic, model.frozen_dtype)
    self.frozen = words.frozen | {"semantic": semantic, "vae": params}
    if model.lora.rank:
      self.frozen["unet"] = self._frozen_unet()
    self._use_buckets()

  def _check(self):
    config = self.config
    latent_parts.check_unet(self.kind, self.unet.config, config.model.condition)
    for name in config.schedule:
      phase = config.phases[name]
      denoising.check(self.schedule, phase)
      if phase.selection not in conditions.SELECTIONS:
        raise errors.ConfigError(
          f"phases.{name}.selection={phase.selection!r}: expected one of"
          f" {conditions.SELECTIONS}."
        )
      if phase.sample_latents and config.data.latents_dir:
        raise errors.ConfigError(
          f"phases.{name}.sample_latents=True draws anew each time, but"
          " data.latents_dir holds the same always. Change one of them."
        )
    self.stored.check_start(config.start_from, self.part, self.unet.config)
    if latent_parts.same_directory(config.start_from, config.model_dir):
      raise errors.ConfigError(
        f"start_from and model_dir are both {config.model_dir}: the result"
        " would take the place of the weights it starts from. Give another"
        " model_dir with encoder, tokenizer and semantic decoder."
      )
    low = config.model.lora
    lacking = not (config.start_from or self.stored.outline)
    if low.rank and (low.alpha <= 0 or lacking):
      raise errors.ConfigError(
        f"model.lora={low.to_dict()} changes a trained U-Net: it needs an"
        " alpha above 0, and start_from, that U-Net's model directory. Set"
        " model.lora.rank=0 to train the whole."
      )

  def _start(self, top, dtype="float32"):
    """A branch of the part that the run starts from, or None."""
    folder = self.config.start_from
    return self.stored.branch(folder, self.part, top, dtype)

  def _frozen_unet(self):
    """The whole U-Net that a LoRA changes, checked to fit the config."""
    found = self._start("unet", self.config.model.frozen_dtype)
    boxed = jax.eval_shape(
      functools.partial(latent_parts.init_unet, self.unet), jax.random.key(0)
    )
    where = self.config.start_from
    base.check_same(where, state_lib.unbox(boxed), found or {}, "unet")
    return found

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
    data = self.config.data
    training, stored = seed is not None, None
    where = data.latents_dir if training else data.held_out_latents_dir
    if where:
      stored = latent_cache.LatentCache.load(
        where,
        source=examples.fingerprint(source),
        vae=latent_parts.fingerprint(self._vae_params, self.vae.config),
        buckets=data.buckets,
      )
    return bucket_rows.batches(
      source,
      data.buckets,
      self.config.batch_size,
      seed=seed,
      crop=data.crop if training else "center",
      latents=stored,
    )

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
    told = shapes.conditioner(self._told.model, dtype)
    made = {
      "encoder": shapes.encoder(config.vit, dtype),
      "tokenizer": latent_parts.used_words(shapes.words(config)),
      "semantic": told["decoder"],
      "vae": shapes.autoencoder(self.vae),
    }
    if self.config.model.lora.rank:
      made["unet"] = shapes.denoiser(self.unet, dtype)
    return made

  def batch_shapes(self):
    """Pictures of the largest bucket."""
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
    if self._told.projection is not None:
      start["projection"] = self._told.projection
    if folder and not self.config.model.lora.rank:
      start["unet"] = self._start("unet")
      if self.unet.config.scan and start["unet"] is not None:
        start["unet"] = unet.stacked(start["unet"])
    if folder and self.kind == "lowres":
      uncond = self._start("uncond")
      if uncond is not None:  # [1, U, D] officially
        start["uncond"] = uncond.reshape(-1, uncond.shape[-1])
    start = {k: v for k, v in start.items() if v is not None}
    for name, theirs in start.items():
      where = self.config.model_dir if name == "projection" else folder
      base.check_same(where, state.params[name], theirs, name)
    params = state.params | start
    return params, denoising.start_ema(params)

  def loss(self, phase, params, frozen, state, batch, rng):
    """Weighted mean of the squared error over valid pictures."""
    x_key, select_key, loss_key = jax.random.split(rng, 3)
    x = self._latents(frozen, batch, x_key if phase["sample_latents"] else None)
    sampled = phase["selection"] == "sampled"
    told = self._condition(
      params, frozen, batch, select_key if sampled else None
    )
    predict = self._predict(params, frozen)
    valid = batch["valid"]
    loss, metrics = denoising.eps_loss(
      predict, self.schedule, x, told, valid, loss_key, phase
    )
    state = denoising.update_ema(state, params, phase["ema_decay"])
    return loss, (state, metrics)

  def _latents(self, frozen, batch, rng=None):
    """float32[B, h, w, C] as the U-Net sees them; means without an rng."""
    factor = self.vae.config.scaling_factor
    if "latents" in batch:
      return batch["latents"].astype(jnp.float32) * factor
    mean, logvar = self.vae.apply(
      {"params": frozen["vae"]},
      conditions.to_unit(batch["target"]),
      method="encode",
    )
    return jax.lax.stop_gradient(vae.sample(mean, logvar, rng) * factor)

  def _condition(self, params, frozen, batch, rng=None):
    """What the U-Net is told of each picture: `tokens`, `pooled`, `sizes`."""
    ids, valid = conditions.words(self.tokenizer, frozen, batch["image"], rng)
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
    """The function that `denoising.eps_loss` asks for."""

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
    `pictures`, both one above the other.
    """
    del params
    rng, ema = jax.random.key(0), state["ema"]
    x = self._latents(frozen, batch)
    told = self._condition(ema, frozen, batch)
    phase = dict(self.last_phase) | {"condition_dropout": 0.0, "draws": 1}
    predict, valid = self._predict(ema, frozen), batch["valid"]
    loss, metrics = denoising.eps_loss(
      predict, self.schedule, x, told, valid, rng, phase
    )
    if shown := self.config.eval.sample_pictures:
      x, told, valid = jax.tree.map(lambda v: v[:shown], (x, told, valid))
      metrics |= self._drawn_metrics(ema, frozen, x, told, valid)
    return metrics | {"loss": loss}

  def _drawn_metrics(self, params, frozen, x, told, valid):
    """What is drawn with some weights, beside latents x and their pictures."""
    drawn = self.draw(params, frozen, told, x.shape[1:])
    of_latents = jnp.square(drawn - x).mean((1, 2, 3))
    real, drawn = (self.decode(frozen, z) for z in (x, drawn))
    of_pictures = jnp.square(drawn - real).mean((1, 2, 3))
    both = jnp.concatenate([real, drawn], axis=1)  # [B, 2 H, W, 3]
    return {
      "latent_mse": denoising.mean(of_latents, valid),
      "picture_mse": denoising.mean(of_pictures, valid),
      "pictures": jnp.round(both * 127.5 + 127.5).astype(jnp.uint8),
    }

  def draw(self, params, frozen, told, shape):
    """Latents float32[B, h, w, C] drawn without guidance, seeds 0 ... B - 1."""
    scale, count = self.vae.config.scale, len(told["tokens"])
    settings = latents.Settings(
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
      return latents.lowres(*common, uncond, seeds=seeds, guidance=1)
    return latents.highres(*common, told["pooled"], seeds=seeds, guidance=1)

  def decode(self, frozen, z):
    """Pictures float32[B, H, W, 3] in [-1, 1] of latents as drawn."""
    z = z / self.vae.config.scaling_factor
    made = self.vae.apply({"params": frozen["vae"]}, z, method="decode")
    return jnp.clip(made, -1.0, 1.0)

  def exports(self, params, state):
    """The U-Net with its autoencoder; the semantic decoder, if it changed."""
    del params
    ema = state["ema"]
    net = ema["unet"]
    if self.config.model.lora.rank:
      net = lora.merge(self._start("unet"), net, self.lora_scale)
    tree = {"unet": unet.unstacked(net), "vae": self._vae_params}
    if self.kind == "lowres":
      tree["uncond"] = ema["uncond"][None]  # [1, U, D], as officially
    made = {self.part: (tree, self._meta())}
    if self._told.meta is None or self._trains("projection"):
      semantic = {"decoder": self._told.semantic} | ema["projection"]
      model = self._told.model
      meta = self._told.meta or latent_parts.conditioner_meta(self.kind, model)
      made[self.kind] = (semantic, meta)
    return made

  def _trains(self, name):
    """Whether some phase trains a branch of the parameters."""
    phases = (self.config.phases[phase] for phase in self.config.schedule)
    prefixes = [prefix for phase in phases for prefix in phase.train]
    return any(
      prefix in ("", "all") or prefix.startswith(name) for prefix in prefixes
    )

  def _meta(self):
    """The meta of the part with the U-Net, its port notes kept if they fit."""
    meta = {
      "unet": dataclasses.asdict(self.unet.config) | {"scan": False},
      "vae": dataclasses.asdict(self.vae.config),
      "schedule": dataclasses.asdict(self.schedule),
    }
    if folder := self.config.start_from:
      theirs = checkpoints.read_meta(folder, self.part)
      same = json.loads(json.dumps(meta["schedule"]))
      if "port" in theirs and theirs.get("schedule") == same:
        meta["port"] = theirs["port"]
    return meta
