"""Our side of the training steps: the step that `lavit train` compiles."""

import contextlib
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from lavit_jax.commands import train as train_command
from lavit_jax.core import averages, sharding
from lavit_jax.cost import chips, jaxpr
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.train import losses, lowering, optimizer, phases
from lavit_jax.train import step as step_lib
from lavit_jax.train.objectives import base
from lavit_jax.train.objectives import tokenizer as tokenizer_stage
from lavit_jax.train.objectives.frozen import artifacts
from side_by_side import steps


def _phase_fields(**settings):
  """An entry of config.phases whose learning rate stays as it is."""
  plan = {"steps": 1000, "lr": steps.LR, "warmup": 0, "end_factor": 1.0}
  return plan | settings


def _phase(fields):
  return phases.Phase.from_fields("codes", 0, fields["steps"], fields)


def make(folder, sizes) -> int:
  """Writes the parameters that both sides start from; how many there are."""
  objective = build(sizes, 1)[0]
  params, extra = jax.jit(
    lambda: sharding.unbox(objective.init(jax.random.key(0)))
  )()
  tree = {"params": params, "extra": extra}
  count = sum(x.size for x in jax.tree.leaves(params))
  if isinstance(sizes, steps.Tokenizer):
    net = vision.EvaVit(objective.model_config.vit)
    pixels = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
    init = lambda key: sharding.unbox(net.init(key, pixels))["params"]
    tree["frozen"] = {"encoder": jax.jit(init)(jax.random.key(1))}
  flat = traverse_util.flatten_dict(tree, sep="/")
  np.savez(steps.weights_path(folder), **jax.device_get(flat))
  return count


class Llm(base.Objective):
  """Next words of rows without images, as stage `pretrain` learns them."""

  def __init__(self, sizes: steps.Llama, config):
    self.config, self._sizes = config, sizes
    fields = dataclasses.asdict(sizes)
    del fields["length"]
    self._llama = llama.LlamaConfig(**fields, num_kv_heads=sizes.num_heads)
    self._model = llama.Llama(self._llama)

  def init(self, rng):
    """Boxed parameters; no other state."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return self._model.init(rng, ids)["params"], {}

  def labels(self, phase, params):
    """Everything trains."""
    return jax.tree.map(lambda _: "base", params)

  def nonlinear_sums(self, phase, params, frozen, extra, batch, draws):
    """The weights, by which `combine` divides."""
    del phase, params, frozen, extra, draws
    return {"weights": _weights(batch).sum()}

  def batch_shapes(self):
    """Those of the rows that both sides are given."""
    rows = self._sizes.batch(self.config.batch_size)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)

  def held_out_metrics(self, params, frozen, extra, batch):
    """The loss."""
    sums, _ = self.sums(None, params, frozen, extra, batch, {})
    return self.combine(None, sums)[1]

  def export(self, params, extra):
    """The language model."""
    del extra
    return {"llm": (params, {"llama": dataclasses.asdict(self._llama)})}

  def sums(self, phase, params, frozen, extra, batch, draws):
    """The nll of all words; the loss is never all logits at once."""
    del phase, frozen, extra, draws
    hidden = self._model.apply(
      {"params": params},
      batch["tokens"],
      segment_ids=batch.get("segments"),
      return_hidden=True,
    )
    weights = _weights(batch)
    total, _ = losses.next_token_blocked(
      hidden,
      params["head"],
      batch["targets"],
      weights,
      vocab_size=self._llama.vocab_size,
    )
    return {"nll": total, "weights": weights.sum()}, {}

  def combine(self, phase, sums):
    """Their mean."""
    del phase
    nll, weights = sums["nll"], sums["weights"]
    metrics = {"loss": averages.mean(nll, weights)}
    return averages.ratio(nll, weights), metrics


def _weights(batch):
  return batch.get("weights", jnp.ones(batch["tokens"].shape))


def build(sizes, batch: int):
  """(objective, phase) of what is trained."""
  config = ml_collections.ConfigDict({"seed": 0, "batch_size": batch})
  config.optimizer = steps.OPTIMIZER | {"groups": {"base": 1.0}}
  if isinstance(sizes, steps.Llama):
    return Llm(sizes, config), _phase(_phase_fields())
  fields = _phase_fields(
    mask="expected",
    quantize=True,
    train={"merger": "base", "quantizer": "base", "decoder": "base"},
    detail_weight=sizes.detail_weight,
    commitment=sizes.commitment,
    revive_below=0.0,  # chance has no part
  )
  parts = _tokenizer(sizes)
  config.stage, config.model_dir = "tokenizer", ""
  config.model = {"tokenizer": {k: v for k, v in parts.items() if k != "vit"}}
  config.data = {"image_size": sizes.image_size, "capacity": sizes.capacity}
  config.assumed = {"tokenizer": parts}
  config.phases, config.schedule = {"codes": fields}, ("codes",)
  where = artifacts.AbstractArtifacts(config)
  return tokenizer_stage.TokenizerObjective(config, where), _phase(fields)


def _tokenizer(sizes: steps.Tokenizer):
  """The config of all parts as dictionaries."""
  shared = {
    "width": sizes.width,
    "num_heads": sizes.num_heads,
    "mlp_dim": sizes.mlp_dim,
    "dtype": sizes.dtype,
  }
  config = tokenizer.TokenizerConfig(
    vit=vision.ViTConfig(
      image_size=sizes.image_size,
      patch_size=sizes.patch_size,
      depth=sizes.vit_depth,
      **shared,
    ),
    selector=selector.SelectorConfig(width=sizes.width),
    merger=merger.MergerConfig(depth=sizes.merger_depth, **shared),
    quantizer=quantizer.QuantizerConfig(
      width=sizes.width,
      num_codes=sizes.num_codes,
      code_dim=sizes.code_dim,
      decay=sizes.decay,
    ),
    decoder=decoder.DecoderConfig(
      depth=sizes.decoder_depth,
      num_patches=sizes.num_patches,
      code_dim=sizes.code_dim,
      out_dim=sizes.width,
      **shared,
    ),
  )
  return dataclasses.asdict(config)


def start(objective, phase, tree):
  """(compiled step, its first state, frozen, the mesh) on all devices.

  Args:
    objective: of `build`.
    phase: likewise.
    tree: of `steps.read`.
  """
  mesh = sharding.make_mesh({"fsdp": -1})
  boxed = jax.eval_shape(step_lib.init_fn(objective, 0))
  params = tree["params"]
  labels = objective.labels(phase, params)
  tx = optimizer.make(objective.config.optimizer, phase, labels, boxed.params)
  state = sharding.unbox(boxed).replace(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(optimizer.select(params, labels)),
    extra=tree.get("extra", {}),
    rng=jax.random.key_data(jax.random.key(0)),
  )
  layout = sharding.layout_of(sharding.abstract(boxed, mesh)).replace(
    opt_state=sharding.layout_of(
      lowering.optimizer_state(tx, boxed.params, labels, mesh)
    )
  )
  state = jax.device_put(state, layout)
  frozen = jax.device_put(tree.get("frozen", {}), sharding.replicated(mesh))
  step = step_lib.jit_step(objective, phase, labels, tx, mesh, layout)
  return step, state, frozen, mesh


def _model_flops(objective, phase, tree, batch) -> float:
  """Model FLOPs of a step: products of the loss, and of its gradient."""
  params = tree["params"]
  labels = objective.labels(phase, params)
  trained = jax.tree.map(lambda label: label != optimizer.FROZEN, labels)
  extra, frozen = tree.get("extra", {}), tree.get("frozen", {})
  draws = objective.draws(phase, batch, jax.random.key(0))

  def loss(params):
    sums, _ = objective.sums(phase, params, frozen, extra, batch, draws)
    return objective.combine(phase, sums)[0]

  return sum(jaxpr.count(loss, params, trained=trained).values())


def _use_cores(sizes, batch):
  """Makes the devices that `lavit train` would."""
  together = False
  if isinstance(sizes, steps.Llama):
    fields = {
      "model": {"llm": dataclasses.asdict(sizes)},
      "data": {"length": sizes.length},
      "batch_size": batch,
    }
    together = train_command.is_bound_by_weights(fields)
  train_command.use_cpu_cores(batch, together=together)


class Side:
  """The work of each case, as calls that begin and end in numpy."""

  def __init__(self, folder, sizes, threads: int):
    """`threads` are given by the cores that the process may use."""
    del threads
    self._folder, self._sizes = folder, sizes

  def versions(self) -> dict[str, str]:
    """Of what computes."""
    return {"jax": jax.__version__}

  def work(self, case, batch: int):
    """A function of no arguments: one step; it gives the loss."""
    del case
    _use_cores(self._sizes, batch)
    objective, phase = build(self._sizes, batch)
    tree = steps.read(self._folder)
    step, self._state, frozen, mesh = start(objective, phase, tree)
    host = self._sizes.batch(batch)
    if isinstance(self._sizes, steps.Tokenizer):
      host["valid"] = np.ones((batch,), np.float32)
    self._flops = _model_flops(objective, phase, tree, host)

    def run():
      with sharding.use(mesh):
        on_mesh = sharding.put_batch(host, mesh)
        self._state, metrics = step(self._state, frozen, on_mesh)
      return {"loss": averages.value(metrics["loss"])}

    self._run = run
    return run

  def judged(self, case, batch: int):
    """A function that makes further steps and gives their losses."""
    del case, batch
    return lambda: [self._run()["loss"] for _ in range(steps.STEPS)]

  def about(self) -> dict:
    """The device, its peak in bf16, and the model FLOPs of a step."""
    device = jax.devices()[0]
    chip = chips.of_device(device)
    stats = device.memory_stats() or {}
    return {
      "device": device.device_kind,
      "peak_flops": chip.flops if chip else None,
      "model_flops": self._flops,
      "memory_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
    }

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a trace."""
    with jax.profiler.trace(str(directory)):
      yield
    (pathlib.Path(directory) / "summary.txt").write_text("see xprof\n")
