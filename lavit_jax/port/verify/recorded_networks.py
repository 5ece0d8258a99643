"""Checks of the recorded networks that read and write tokens; see `verify.py`.

Each check takes the arrays of one file and the parts of the model, and returns
`results.Results` for the file's `out_*` arrays.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.infer.pixels import latent_space
from lavit_jax.infer.presets import official
from lavit_jax.models import layers, llama
from lavit_jax.models.attention import context as context_lib
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
)
from lavit_jax.port.verify import results


def _norm_input(module, variables, path, *args, **kwargs):
  """Returns the input of the LayerNorm or RMSNorm at `path` of a module."""

  @jax.jit
  def run_module(variables, args):
    inputs = []

    def intercept(run, args, kwargs, context):
      if context.module.path == path:
        inputs.append(args[0])
      return run(*args, **kwargs)

    with nn.intercept_methods(intercept):
      module.apply(variables, *args, **kwargs)
    return inputs[0]

  return run_module(variables, args)


def _first_layers(tree, name, depth):
  """Returns params with only the first layers of the stack `name`."""
  return dict(tree) | {name: jax.tree.map(lambda x: x[:depth], tree[name])}


def _encoder(arrays, parts) -> results.Results:
  part = parts.part("encoder")
  config, params = vision.ViTConfig(**part.meta["vit"]), part.params
  net, pixels = vision.EvaVit(config), results.nhwc(arrays["in_pixels"])
  features, outputs = official.apply(
    net, {"params": params}, pixels, with_cls=True, return_layers=True
  )
  patches = vision.patchify(pixels, config.patch_size)
  embed = params["patch_embed"]
  patches = patches @ embed["kernel"] + embed["bias"]
  cls = jnp.broadcast_to(params["cls_token"], (len(pixels), 1, config.width))
  checked = results.floats(
    features=features,
    patch_embed=patches,
    embed=jnp.concatenate([cls, patches], 1) + params["pos_embed"],
    **{f"layer_{i}": x for i, x in enumerate(outputs)},
  )
  if config.head_dim_out:
    head = official.apply(net, {"params": params}, pixels, use_head=True)
    checked |= results.floats(head=head)
  return checked


def _selector(arrays, parts) -> results.Results:
  model = parts.model
  log_probs = model.log_probs(arrays["in_features"])
  keep = selector.mask_from_noise(log_probs, arrays["in_gumbel"])
  return results.floats(logprobs=log_probs) | results.exact(
    keep=keep, keep_int=keep.astype(jnp.int32)
  )


def _merger(arrays, parts) -> results.Results:
  model = parts.model
  params = model.visual["params"]["merger"]
  features, config = arrays["in_features"], model.config.merger
  norm = layers.LayerNorm(1e-5)
  checked = results.floats(
    ln_vision=norm.apply({"params": params["ln_vision"]}, features)
  )
  for name in [
    n.removeprefix("in_mask_") for n in arrays if n[:8] == "in_mask_"
  ]:
    mask = arrays[f"in_mask_{name}"]
    checked |= results.floats(
      **{
        name: model.merged(features, mask),
        f"und_{name}": model.merged(features, mask, reading=True),
      }
    )
    for i in range(config.depth):
      array = f"{name}_block_{i}"
      if f"out_{array}" in arrays:
        net = merger.TokenMerger(dataclasses.replace(config, depth=i + 1))
        truncated = {"params": _first_layers(params, "blocks", i + 1)}
        checked |= results.floats(
          **{array: _norm_input(net, truncated, ("norm",), features, mask)}
        )
  return checked


def _quantizer(arrays, parts) -> results.Results:
  model = parts.model
  net = quantizer.VectorQuantizer(model.config.quantizer)
  params = {"params": model.visual["params"]["quantizer"]}
  codes = model.visual["codebook"]["codes"]
  z = official.apply(net, params, arrays["in_features"])
  ids = quantizer.lookup(z, codes)
  return results.floats(z=z, quantized=codes[ids]) | results.exact(ids=ids)


def _tokenize(arrays, parts) -> results.Results:
  model = parts.model
  pixels, gumbel = results.nhwc(arrays["in_pixels"]), arrays["in_gumbel"]
  ids, valid = model.codes(pixels, gumbel)
  counts = valid.sum(1)
  with_marks = np.full((len(ids), ids.shape[1] + 2), -1)
  for row, image_ids, count in zip(with_marks, ids, counts, strict=True):
    row[: count + 2] = [
      model.vocab.image_begin,
      *image_ids[:count],
      model.vocab.image_end,
    ]
  codes = np.asarray(model.visual["codebook"]["codes"])
  embeds, read = model.read(pixels, gumbel)
  return results.exact(
    ids=np.where(valid, ids, -1),
    ids_special=with_marks,
    lengths=counts,
    token_nums=counts,
    embeds_lengths=np.asarray(read).sum(1),
  ) | results.floats(
    quantized=codes[ids[valid] - model.vocab.code_offset],
    embeds=np.where(np.asarray(read)[..., None], embeds, 0.0),
  )


def _decoder(arrays, parts) -> results.Results:
  """Checks the semantic decoders of which there are recordings."""
  checked: results.Results = {}
  prefix = "in_quantized"
  cases = [n.removeprefix(prefix) for n in arrays if n.startswith(prefix)]
  if any(n.startswith("out_lowres") for n in arrays):
    part = parts.part("lowres")
    net = latent_space.semantic("lowres", part.meta)
    for case in cases:
      codes = _padded(arrays, case, net.config.num_patches)
      outputs = official.apply(net, {"params": part.params}, *codes)
      checked |= results.floats(**{f"lowres{case}": outputs})
    codes = _padded(arrays, "", net.config.num_patches)
    checked |= _decoder_blocks(net.config, part.params["decoder"], codes)
  if any(n.startswith(("out_prompt_embeds", "out_pooled")) for n in arrays):
    part = parts.part("highres")
    net = latent_space.semantic("highres", part.meta)
    for case in cases:
      codes = _padded(arrays, case, net.config.num_patches)
      variables = {"params": part.params}
      condition, pooled = official.apply(net, variables, *codes)
      checked |= results.floats(
        **{f"prompt_embeds{case}": condition, f"pooled{case}": pooled}
      )
  return checked


def _decoder_blocks(config, params, codes) -> results.Results:
  """Returns the output of each block of lowres for the first case."""
  checked: results.Results = {}
  for i in range(config.depth):
    net = decoder.SemanticDecoder(dataclasses.replace(config, depth=i + 1))
    truncated = _first_layers(params, "blocks", i + 1)
    block = _norm_input(net, {"params": truncated}, ("norm",), *codes)
    checked |= results.floats(**{f"lowres_block_{i}": block})
  return checked


def _padded(arrays, case, capacity):
  """Returns one row an image: float[B, N, D] vectors and bool[B, N] valid.

  They are recorded as the rows of all images in one, and their counts.
  """
  rows, counts = arrays[f"in_quantized{case}"], arrays[f"in_token_nums{case}"]
  vectors = np.zeros((len(counts), capacity, rows.shape[1]), np.float32)
  valid = np.arange(capacity) < counts[:, None]
  vectors[valid] = rows
  return vectors, valid


def _llm(arrays, parts) -> results.Results:
  model = parts.model
  config, params = model.llama_config, model.language["llm"]
  variables, cols = {"params": params}, arrays["in_cols"]
  ids, mask = arrays["in_ids"], arrays["in_attention_mask"].astype(bool)
  net, rows = model.llm, config.vocab_size
  logits = official.apply(net, variables, ids)[..., :rows]
  padded = official.apply(
    net,
    variables,
    np.zeros(mask.shape, np.int32),
    embeds=arrays["in_embeds"],
    use_embeds=np.ones_like(mask),
    mask=mask,
  )[..., :rows]
  lse = jax.nn.logsumexp
  checked = results.floats(
    logits_cols=logits[..., cols],
    logits_last=logits[:, -1],
    logits_lse=lse(logits, axis=-1),
    hidden_final=official.apply(net, variables, ids, return_hidden=True),
    embeds_logits_cols=padded[..., cols] * mask[..., None],
    embeds_logits_last=padded[:, -1],
    embeds_logits_lse=lse(padded, axis=-1) * mask,
  )
  positions = np.where(mask, context_lib.positions_of(jnp.asarray(mask)), 1)
  checked |= results.exact(position_ids=positions)
  for i in range(config.depth):
    net = llama.Llama(dataclasses.replace(config, depth=i + 1))
    truncated = {"params": _first_layers(params, "layers", i + 1)}
    layer = _norm_input(net, truncated, ("norm",), ids, return_hidden=True)
    checked |= results.floats(**{f"layer_{i}": layer})
  return checked


def _preprocess(arrays, parts) -> results.Results:
  """Checks images of the folder `preprocess`, at the sizes of the arrays."""
  del parts
  checked: results.Results = {}
  for name in arrays:
    stem = f"img{name.removeprefix('out_').removesuffix('_small')}"
    (path,) = (arrays.folder / "preprocess").glob(f"{stem}.*")
    pixels = official.preprocess(path, arrays[name].shape[-1])
    checked |= results.floats(
      **{name.removeprefix("out_"): pixels.transpose(2, 0, 1)}
    )
  return checked


CHECKS = {
  "encoder": _encoder,
  "selector": _selector,
  "merger": _merger,
  "quantizer": _quantizer,
  "tokenize": _tokenize,
  "decoder": _decoder,
  "llm": _llm,
  "preprocess": _preprocess,
}
