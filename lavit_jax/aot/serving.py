"""Programs of inference at their sizes: prefill, one token, one U-Net step."""

import jax
import jax.numpy as jnp

from lavit_jax.core import compiler_options, errors, sharding
from lavit_jax.cost import networks
from lavit_jax.models import llama
from lavit_jax.train.objectives.frozen import abstract_params

PROGRAMS = ("prefill", "decode", "unet")
_LENGTH = 2048  # places of the cache: a prompt, or all before the next token


def lower(what: str, objective, mesh: jax.sharding.Mesh):
  """Lowers one program for a mesh, with weights in bfloat16.

  Args:
    what: one of `PROGRAMS`: a prompt of 2048 tokens a row, the next token
      after as many, or the U-Net with guidance.
    objective: of a stage that has the network; its batch is taken.
    mesh: of devices that may not be there.

  Returns:
    (`jax.stages.Lowered`, model FLOPs by network).

  Raises:
    errors.UsageError: the stage has no such network.
  """
  has = "unet" if hasattr(objective, "unet") else "llama_config"
  if (what == "unet") != (has == "unet") or not hasattr(objective, has):
    raise errors.UsageError(
      f"--program {what} is not of stage {objective.config.stage!r}: prefill"
      " and decode are of pretrain, unet of latents."
    )
  with sharding.use(mesh):
    if what == "unet":
      return _unet(objective, mesh)
    return _llm(what, objective, mesh)


def _rows(mesh, *axes):
  spec = jax.sharding.PartitionSpec(("data", "fsdp"), *axes)
  return jax.sharding.NamedSharding(mesh, spec)


def _llm(what, objective, mesh):
  config = objective.llama_config.served()
  rows = objective.config.batch_size
  model = llama.Llama(config)
  params = sharding.abstract(abstract_params.llm(config, "bfloat16"), mesh)
  length = _LENGTH if what == "prefill" else 1
  cache = jax.eval_shape(lambda: llama.init_cache(config, rows, _LENGTH + 1))
  heads = jax.sharding.PartitionSpec(None, ("data", "fsdp"), "tensor")
  layout = {
    "k": jax.sharding.NamedSharding(mesh, heads),
    "v": jax.sharding.NamedSharding(mesh, heads),
    "valid": _rows(mesh),
    "index": sharding.replicated(mesh),
  }
  cache = _placed(cache, layout)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=_rows(mesh))

  def run(params, tokens, cache):
    variables = {"params": params}
    hidden, cache = model.apply(
      variables, tokens, cache=cache, return_hidden=True
    )
    last = hidden[:, -1:]
    return model.apply(variables, last, method="logits"), cache

  options = compiler_options.of_mesh(mesh, objective.config)
  made = jax.jit(run, donate_argnums=2, compiler_options=options)
  cost = networks.llama_layers(
    config, rows * length, _LENGTH if what == "prefill" else 2 * _LENGTH
  )
  head = networks.llama_head(config, rows)
  return made.lower(params, tokens, cache), {
    "llm": cost.forward,
    "head": head.forward,
  }


def _unet(objective, mesh):
  net, batch = objective.unet, objective.batch_shapes()
  config, count = net.config, 2 * objective.config.batch_size  # guidance
  params = sharding.abstract(abstract_params.denoiser(net, "bfloat16"), mesh)
  scale = objective.vae.config.scale
  height, width = (side // scale for side in batch["target"].shape[1:3])
  tokens = objective.tokenizer.config.num_patches
  row = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    (count, *shape), dtype, sharding=_rows(mesh)
  )
  given = {"condition": row(tokens, config.cross_dim)}
  if added := config.details.added_dim:
    numbers = 6 * config.details.added_time_dim
    given |= {"pooled": row(added - numbers), "sizes": row(6)}
  z, t = row(height, width, config.in_channels), row(dtype=jnp.int32)
  made = jax.jit(
    lambda params, z, t, given: net.apply({"params": params}, z, t, **given),
    compiler_options=compiler_options.of_mesh(mesh, objective.config),
  )
  cost = networks.denoise(config, height, width, tokens)
  return made.lower(params, z, t, given), {"unet": (count * cost).forward}


def _placed(tree, layout):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    layout,
  )
