"""Model FLOPs of one global training step, counted from configs.

The rule:

  A product float[m, k] x float[k, n] is 2 m n k; a 3 x 3 convolution is one of
    k = 9 channels at every place, those at the edge too. All else (norms,
    softmax, activations, the optimizer, look-ups of embeddings) is nothing.
  Causal attention counts the keys that are seen: (s + 1) / 2 of a document of
    s tokens. Other masks hide data, not work, and count whole.
  Gradients are 2 x forward where parameters train: of inputs and of
    parameters. Where parameters are frozen and gradient passes through them
    (below LoRA, before a frozen head) they are 1 x forward, and 2 x in
    attention, whose products have two inputs. What is frozen before all that
    trains, such as the encoder, costs its forward pass.
  The head counts every position, and the ids in use. What remat recomputes,
    and what an implementation does in vain (masked blocks of keys, padding
    rows of the vocabulary), is not counted.

`network_flops` has the networks one by one.
"""

import math
from collections.abc import Mapping

import jax

from lavit_jax.core import sharding
from lavit_jax.cost import networks as net
from lavit_jax.models.pixels import unet
from lavit_jax.train import optimizer


def of_step(
  objective, phase, *, segment: float | None = None
) -> dict[str, float]:
  """FLOPs of a step of a whole batch, all devices together, by network.

  Args:
    objective: of any stage; one of shapes alone will do.
    phase: its settings, a phase of a run or a mapping.
    segment: length of the packed document that a token is in, its mean over
      tokens; None: whole rows. Only stage `pretrain` packs.

  Returns:
    {"encoder": ..., "llm": ..., ...}; their sum is the whole.
  """
  counters = {
    "encoder": _encoder,
    "tokenizer": _tokenizer,
    "pixels": _pixels,
    "autoencoder": _autoencoder,
    "latents": _latents,
    "pretrain": lambda *args: _pretrain(*args, segment),
  }
  batch = objective.batch_shapes()
  parts = counters[objective.config.stage](objective, phase, batch)
  return {name: float(value) for name, value in parts.items() if value}


def trained(objective, phase) -> frozenset[str]:
  """Top-level names of the parameters that a phase trains at least partly."""
  params, _ = jax.eval_shape(objective.init, jax.random.key(0))
  labels = objective.labels(phase, sharding.unbox(params))
  return frozenset(
    name
    for name, tree in labels.items()
    if any(label != optimizer.FROZEN for label in jax.tree.leaves(tree))
  )


def _by_order(costs: Mapping[str, net.Cost], trains) -> dict[str, float]:
  """FLOPs of networks that follow each other, the first ones first."""
  flows, made = False, {}
  for name, cost in costs.items():
    if name in trains:
      made[name], flows = cost.trained, True
    else:
      made[name] = cost.passed if flows else cost.forward
  return made


def _count(shape: tuple[int, ...]) -> int:
  """Images of an array [..., H, W, 3]."""
  return math.prod(shape[:-3])


def _encoder(objective, phase, batch):
  length = batch["text"].shape[1]
  count = _count(batch["image"].shape)
  costs = net.contrast(objective.model_config, count, length)
  names = {"encoder": "vit", "head": "captioner", "contrast": "pixel_head"}
  trains = trained(objective, phase)
  return {
    name: cost.trained if names.get(name, name) in trains else cost.forward
    for name, cost in costs.items()
  }


def _autoencoder(objective, phase, batch):
  count, height, width, _ = batch["image"].shape
  config = objective.vae.config
  costs = {
    "encoder": count * net.vae_encode(config, height, width),
    "decoder": count * net.vae_decode(config, height, width),
  }
  return _by_order(costs, trained(objective, phase))


def _tokenizer(objective, phase, batch):
  config, trains = objective.model_config, trained(objective, phase)
  count, num = _count(batch["image"].shape), config.num_patches
  soft = phase["mask"] == "gumbel"
  form = "soft" if soft else config.merger_form
  keys = num if soft else objective.config.data.capacity
  merged = net.merge(config.merger, count, num, keys, form)
  costs = {
    "selector": net.select(config.selector, count * num),
    "merger": merged,
    "quantizer": net.quantize(config.quantizer, count * keys),
    "decoder": net.decode(config.decoder, count, keys),
  }
  if phase["mask"] == "random":
    del costs["selector"]
  if not soft:  # the mask is a constant
    trains = trains - {"selector"}
  parts = {"encoder": net.vit(config.vit, count).forward}
  parts |= _by_order(costs, trains)
  if "selector" in trains and "merger" not in trains:
    # Gradient comes by the mask: keys of a frozen merger are constants.
    parts["merger"] -= net.merge_keys(config.merger, count, num).forward
  if phase.get("quantize", False):
    found = net.lookup(config.quantizer, count * keys)
    parts["quantizer"] += found.forward
  return parts


def _pixels(objective, phase, batch):
  count = _count(batch["image"].shape)
  config, words = objective.decoder_config, objective.tokenizer_config
  draws, side = int(phase["draws"]), config.image_size // config.patch
  made = net.denoise(config.unet, side, side, config.num_patches)
  told = net.pixel_condition(config, count * draws)
  return {
    "encoder": net.vit(words.vit, count).forward,
    "tokenizer": net.words(words, count).forward
    + net.decode(words.decoder, count, words.num_patches).forward,
    "condition": told.trained,
    "unet": (count * draws * made).trained,
  }


def _latents(objective, phase, batch):
  count = _count(batch["image"].shape)
  words, told = objective.tokenizer.config, objective._told.model
  trains, vae = trained(objective, phase), objective.vae.config
  cost = net.condition(told, count)
  learns = "projection" in trains
  parts = {
    "encoder": net.vit(words.vit, count).forward,
    "tokenizer": net.words(words, count).forward,
    "decoder": net.decode(told.config, count, words.num_patches).forward,
    "projection": cost.trained if learns else cost.forward,
  }
  if "latents" in batch:
    size = batch["latents"].shape[1:3]
  else:
    height, width = batch["target"].shape[1:3]
    size = (height // vae.scale, width // vae.scale)
    parts["vae"] = count * net.vae_encode(vae, height, width).forward
  tokens = told.config.num_patches
  rank = objective.config.model.lora.rank
  one = _unet(objective.unet.config, size, tokens, "unet" in trains, rank)
  parts["unet"] = count * int(phase["draws"]) * one
  return parts


def _unet(config: unet.UNetConfig, size, tokens, learns, rank) -> float:
  """FLOPs of one image; under LoRA of a rank that is not 0 frozen.

  What comes before the first attention then needs no gradient.
  """
  parts = net.unet_parts(config, *size, tokens)
  if learns and not rank:
    return sum(cost.trained for _, cost in parts)
  kinds = [kind for kind, _ in parts]
  first = kinds.index("transformer")
  whole = sum(cost.forward for _, cost in parts[:first])
  whole += sum(c.passed for kind, c in parts[first:] if kind != "time")
  return whole + (_unet_lora(config, size, tokens, rank) if learns else 0)


def _unet_lora(config: unet.UNetConfig, size, tokens, rank) -> float:
  """The low-rank changes of every attention's four projections."""
  places, total = size[0] * size[1], net.Cost()
  last = len(config.channels) - 1
  for level, width in enumerate(config.channels):
    count = (2 * config.depths[level] + 1) * config.attention[level]
    count += config.mid_attention and level == last
    square = net.dense(places, width, rank) + net.dense(places, rank, width)
    across = net.dense(tokens, config.cross_dim, rank)
    across += net.dense(tokens, rank, width)
    layer = 6 * square + 2 * across  # attn1: 4 squares; attn2: q and out
    total += count * config.transformer_layers[level] * layer
    places = -(-size[0] // 2 ** (level + 1)) * -(-size[1] // 2 ** (level + 1))
  return total.trained


def _pretrain(objective, phase, batch, segment):
  config, llm = objective.tokenizer_config, objective.llama_config
  trains = trained(objective, phase)
  images = _count(batch["pixels"].shape)
  rows, length = batch["tokens"].shape
  queries, num = objective.capacity, config.num_patches
  costs = {
    "merger": net.merge(
      config.merger, images, num, queries, config.merger_form
    ),
    "projection": net.dense(images * queries, config.width, llm.width),
    "llm": net.llama_layers(llm, rows * length, segment or length),
    "head": net.llama_head(llm, rows * length),
  }
  if objective.lora["rank"]:
    costs = {"lora": _llama_lora(objective, rows * length)} | costs
  trains |= {"head"} if "llm" in trains else set()
  encoder = {"encoder": net.vit(config.vit, images).forward}
  return encoder | _by_order(costs, trains)


def _llama_lora(objective, tokens) -> net.Cost:
  """The low-rank changes of the LLM, whose shapes say what they cost."""
  params, _ = jax.eval_shape(objective.init, jax.random.key(0))
  leaves = jax.tree.leaves(sharding.unbox(params["lora"]))
  return net.Cost(2.0 * tokens * sum(leaf.size for leaf in leaves))
