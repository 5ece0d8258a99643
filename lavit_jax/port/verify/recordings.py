"""What is made of the arrays of a directory of recordings; see `verify.py`.

Every check takes (the arrays of one file, the parts of the model) and gives
{name of an `out_*` array: (our array, "float" | "score" | "exact")}.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.infer.pixels import latent_space
from lavit_jax.infer.presets import official
from lavit_jax.models import layers, llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
)
from lavit_jax.port.verify import recorded_search


def floats(**values):
  """Results that are held to the tolerance of numbers."""
  return {f"out_{k}": (v, "float") for k, v in values.items()}


def exact(**values):
  """Results that must be equal."""
  return {f"out_{k}": (v, "exact") for k, v in values.items()}


def nhwc(recorded):
  """Recorded NCHW images as NHWC."""
  return jnp.asarray(recorded.transpose(0, 2, 3, 1))


def before_norm(module, variables, path, *args, **kwargs):
  """What the LayerNorm or RMSNorm at `path` of a module is given."""
  found = []

  def intercept(run, args, kwargs, context):
    if context.module.path == path:
      found.append(args[0])
    return run(*args, **kwargs)

  with nn.intercept_methods(intercept):
    module.apply(variables, *args, **kwargs)
  return found[0]


def first_layers(tree, name, depth):
  """Params with only the first layers of the stack `name`."""
  return dict(tree) | {name: jax.tree.map(lambda x: x[:depth], tree[name])}


def _encoder(a, parts):
  part = parts.part("encoder")
  config, params = vision.ViTConfig(**part.meta["vit"]), part.params
  net, pixels = vision.EvaVit(config), nhwc(a["in_pixels"])
  features, outputs = net.apply(
    {"params": params}, pixels, with_cls=True, return_layers=True
  )
  patches = vision.patchify(pixels, config.patch_size)
  embed = params["patch_embed"]
  patches = patches @ embed["kernel"] + embed["bias"]
  cls = jnp.broadcast_to(params["cls_token"], (len(pixels), 1, config.width))
  made = floats(
    features=features,
    patch_embed=patches,
    embed=jnp.concatenate([cls, patches], 1) + params["pos_embed"],
    **{f"layer_{i}": x for i, x in enumerate(outputs)},
  )
  if config.head_dim_out:
    head = net.apply({"params": params}, pixels, use_head=True)
    made |= floats(head=head)
  return made


def _selector(a, parts):
  model = parts.model
  log_probs = model.log_probs(a["in_features"])
  keep = selector.mask_from_noise(log_probs, a["in_gumbel"])
  return floats(logprobs=log_probs) | exact(
    keep=keep, keep_int=keep.astype(jnp.int32)
  )


def _merger(a, parts):
  model = parts.model
  params = model.visual["params"]["merger"]
  features, config = a["in_features"], model.config.merger
  norm = layers.LayerNorm(1e-5)
  made = floats(ln_vision=norm.apply({"params": params["ln_vision"]}, features))
  for name in [n.removeprefix("in_mask_") for n in a if n[:8] == "in_mask_"]:
    mask = a[f"in_mask_{name}"]
    made |= floats(
      **{
        name: model.merged(features, mask),
        f"und_{name}": model.merged(features, mask, reading=True),
      }
    )
    for i in range(config.depth):
      array = f"{name}_block_{i}"
      if f"out_{array}" in a:
        net = merger.TokenMerger(dataclasses.replace(config, depth=i + 1))
        some = {"params": first_layers(params, "blocks", i + 1)}
        made |= floats(
          **{array: before_norm(net, some, ("norm",), features, mask)}
        )
  return made


def _quantizer(a, parts):
  model = parts.model
  net = quantizer.VectorQuantizer(model.config.quantizer)
  params = {"params": model.visual["params"]["quantizer"]}
  codes = model.visual["codebook"]["codes"]
  z = net.apply(params, a["in_features"])
  ids = quantizer.lookup(z, codes)
  return floats(z=z, quantized=codes[ids]) | exact(ids=ids)


def _tokenize(a, parts):
  model = parts.model
  pixels, gumbel = nhwc(a["in_pixels"]), a["in_gumbel"]
  ids, valid = model.codes(pixels, gumbel)
  counts = valid.sum(1)
  marked = np.full((len(ids), ids.shape[1] + 2), -1)
  for row, line, count in zip(marked, ids, counts, strict=True):
    row[: count + 2] = [
      model.vocab.image_begin,
      *line[:count],
      model.vocab.image_end,
    ]
  codes = np.asarray(model.visual["codebook"]["codes"])
  embeds, read = model.read(pixels, gumbel)
  return exact(
    ids=np.where(valid, ids, -1),
    ids_special=marked,
    lengths=counts,
    token_nums=counts,
    embeds_lengths=np.asarray(read).sum(1),
  ) | floats(
    quantized=codes[ids[valid] - model.vocab.code_offset],
    embeds=np.where(np.asarray(read)[..., None], embeds, 0.0),
  )


def _decoder(a, parts):
  """The semantic decoders of which there are recordings."""
  made = {}
  prefix = "in_quantized"
  cases = [n.removeprefix(prefix) for n in a if n.startswith(prefix)]
  if any(n.startswith("out_lowres") for n in a):
    part = parts.part("lowres")
    net = latent_space.semantic("lowres", part.meta)
    for case in cases:
      codes = _padded(a, case, net.config.num_patches)
      outputs = net.apply({"params": part.params}, *codes)
      made |= floats(**{f"lowres{case}": outputs})
    codes = _padded(a, "", net.config.num_patches)
    made |= _decoder_blocks(net.config, part.params["decoder"], codes)
  if any(n.startswith(("out_prompt_embeds", "out_pooled")) for n in a):
    part = parts.part("highres")
    net = latent_space.semantic("highres", part.meta)
    for case in cases:
      codes = _padded(a, case, net.config.num_patches)
      condition, pooled = net.apply({"params": part.params}, *codes)
      made |= floats(
        **{f"prompt_embeds{case}": condition, f"pooled{case}": pooled}
      )
  return made


def _decoder_blocks(config, params, codes):
  """What each block of the decoder of lowres gives for the first case."""
  made = {}
  for i in range(config.depth):
    net = decoder.SemanticDecoder(dataclasses.replace(config, depth=i + 1))
    some = first_layers(params, "blocks", i + 1)
    block = before_norm(net, {"params": some}, ("norm",), *codes)
    made |= floats(**{f"lowres_block_{i}": block})
  return made


def _padded(a, case, capacity):
  """Recorded rows of all images, an image a row: vectors and valid."""
  rows, counts = a[f"in_quantized{case}"], a[f"in_token_nums{case}"]
  vectors = np.zeros((len(counts), capacity, rows.shape[1]), np.float32)
  valid = np.arange(capacity) < counts[:, None]
  vectors[valid] = rows
  return vectors, valid


def _llm(a, parts):
  model = parts.model
  config, params = model.llama_config, model.language["llm"]
  variables, cols = {"params": params}, a["in_cols"]
  ids, mask = a["in_ids"], a["in_attention_mask"].astype(bool)
  net, rows = model.llm, config.vocab_size
  logits = net.apply(variables, ids)[..., :rows]
  padded = net.apply(
    variables,
    np.zeros(mask.shape, np.int32),
    embeds=a["in_embeds"],
    use_embeds=np.ones_like(mask),
    mask=mask,
  )[..., :rows]
  lse = jax.nn.logsumexp
  made = floats(
    logits_cols=logits[..., cols],
    logits_last=logits[:, -1],
    logits_lse=lse(logits, axis=-1),
    hidden_final=net.apply(variables, ids, return_hidden=True),
    embeds_logits_cols=padded[..., cols] * mask[..., None],
    embeds_logits_last=padded[:, -1],
    embeds_logits_lse=lse(padded, axis=-1) * mask,
  )
  positions = np.where(mask, llama.positions_of(jnp.asarray(mask)), 1)
  made |= exact(position_ids=positions)
  for i in range(config.depth):
    net = llama.Llama(dataclasses.replace(config, depth=i + 1))
    some = {"params": first_layers(params, "layers", i + 1)}
    layer = before_norm(net, some, ("norm",), ids, return_hidden=True)
    made |= floats(**{f"layer_{i}": layer})
  return made


def _preprocess(a, parts):
  """Images of the folder `preprocess`, at the sizes of the arrays."""
  del parts
  made = {}
  for name in a:
    stem = f"img{name.removeprefix('out_').removesuffix('_small')}"
    (path,) = (a.folder / "preprocess").glob(f"{stem}.*")
    pixels = official.preprocess(path, dict.__getitem__(a, name).shape[-1])
    made |= floats(**{name.removeprefix("out_"): pixels.transpose(2, 0, 1)})
  return made


CHECKS = {
  "encoder": _encoder,
  "selector": _selector,
  "merger": _merger,
  "quantizer": _quantizer,
  "tokenize": _tokenize,
  "decoder": _decoder,
  "llm": _llm,
  "preprocess": _preprocess,
  "caption": recorded_search.caption,
  "vqa": recorded_search.answer,
  "t2i_tokens": recorded_search.draw,
}
