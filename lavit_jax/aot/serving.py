"""Lowers programs of inference: prefill, the next token, one U-Net step."""

from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.core import compiler_options, errors, sharding
from lavit_jax.cost import jaxpr, scopes
from lavit_jax.models import llama
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives.frozen import abstract_params, latent_parts

PROGRAMS = ("prefill", "decode", "unet")
_LENGTH = 2048  # of a prompt, or of all before the next token
_NETWORKS = {"llm": "^Llama/", "head": r"^Llama\.logits", "unet": "^UNet"}

# A lowered program, and its model FLOPs by network.
Program = tuple[jax.stages.Lowered, dict[str, float]]


def lower(
  program: str, objective: base.Objective, mesh: jax.sharding.Mesh
) -> Program:
  """Lowers one program for a mesh, with weights in bfloat16.

  Args:
    program: one of `PROGRAMS`: a prompt of 2048 tokens a row, the next token
      after as many, or one step of the U-Net with guidance.
    objective: of a stage that has the network, and of its batch size.
    mesh: its devices may be those of a topology that is only described.

  Returns:
    (the lowered program, model FLOPs by network).

  Raises:
    errors.UsageError: the stage has no such network.
  """
  network = "unet" if hasattr(objective, "unet") else "llama_config"
  is_unet = network == "unet"
  if (program == "unet") != is_unet or not hasattr(objective, network):
    raise errors.UsageError(
      f"--program {program} is not of stage {objective.config.stage!r}: prefill"
      " and decode are of pretrain, unet of latents."
    )
  with sharding.use(mesh):
    if program == "unet":
      return _unet(objective, mesh)
    return _llm(program, objective, mesh)


def _rows(mesh, *axes):
  """Returns the sharding of rows, and of further axes."""
  spec = jax.sharding.PartitionSpec(("data", "fsdp"), *axes)
  return jax.sharding.NamedSharding(mesh, spec)


def _llm(program: str, objective: Any, mesh) -> Program:
  """Lowers the LLM on a prompt ("prefill") or on one token ("decode")."""
  config = objective.llama_config.served()
  rows = objective.config.batch_size
  model = llama.Llama(config)
  params = sharding.abstract(abstract_params.llm(config, "bfloat16"), mesh)
  length = _LENGTH if program == "prefill" else 1
  cache = jax.eval_shape(lambda: llama.init_cache(config, rows, _LENGTH + 1))
  heads = jax.sharding.PartitionSpec(None, ("data", "fsdp"), "tensor")
  layout = {
    "k": jax.sharding.NamedSharding(mesh, heads),
    "v": jax.sharding.NamedSharding(mesh, heads),
    "valid": _rows(mesh),
    "index": sharding.replicated(mesh),
  }
  cache = _with_layout(cache, layout)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=_rows(mesh))

  def run(params, tokens, cache=None):
    variables = {"params": params}
    out = model.apply(variables, tokens, cache=cache, return_hidden=True)
    hidden, cache = out if cache is not None else (out, None)
    last = hidden[:, -1:]
    return model.apply(variables, last, method="logits"), cache

  options = compiler_options.of_mesh(mesh, objective.config)
  jitted = jax.jit(run, donate_argnums=2, compiler_options=options)
  # A prompt attends to itself alone, not to the whole cache.
  inputs = (tokens,) if program == "prefill" else (tokens, cache)
  flops = scopes.by_network(jaxpr.count(run, params, *inputs), _NETWORKS)
  flops["head"] *= config.vocab_size / config.padded_vocab
  return jitted.lower(params, tokens, cache), flops


def _unet(objective: Any, mesh) -> Program:
  """Lowers one step of the U-Net, with and without conditions (guidance)."""
  net, batch = objective.unet, objective.batch_shapes()
  config, count = net.config, 2 * objective.config.batch_size
  params = sharding.abstract(abstract_params.denoiser(net, "bfloat16"), mesh)
  scale = objective.vae.config.scale
  height, width = (side // scale for side in batch["target"].shape[1:3])
  tokens = objective.tokenizer.config.num_patches
  row = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    (count, *shape), dtype, sharding=_rows(mesh)
  )
  conditions = {"condition": row(tokens, config.cross_dim)}
  if added := config.details.added_dim:
    numbers = latent_parts.SIZE_NUMBERS
    pooled = added - numbers * config.details.added_time_dim
    conditions |= {"pooled": row(pooled), "sizes": row(numbers)}
  z, t = row(height, width, config.in_channels), row(dtype=jnp.int32)
  run = lambda params, z, t, inputs: net.apply(
    {"params": params}, z, t, **inputs
  )
  options = compiler_options.of_mesh(mesh, objective.config)
  jitted = jax.jit(run, compiler_options=options)
  counts = jaxpr.count(run, params, z, t, conditions)
  flops = scopes.by_network(counts, _NETWORKS)
  return jitted.lower(params, z, t, conditions), flops


def _with_layout(tree, layout):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    layout,
  )
