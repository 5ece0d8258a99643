"""PyTorch's side of the training steps: eager modules, SDPA, fused AdamW."""

import contextlib
import functools
import importlib.metadata
import os
import pathlib

import torch
import torch.nn.functional as F
import transformers

from side_by_side import steps, torch_training

_TOP = 25  # operations that a profile lists
_LAYER = {
  "self_attn.q_proj": "attention/query",
  "self_attn.k_proj": "attention/key",
  "self_attn.v_proj": "attention/value",
  "self_attn.o_proj": "attention/out",
  "mlp.gate_proj": "mlp/gate",
  "mlp.up_proj": "mlp/up",
  "mlp.down_proj": "mlp/down",
}
_NORMS = {
  "input_layernorm": "attention_norm",
  "post_attention_layernorm": "mlp_norm",
}


def _llama(sizes: steps.Llama, tree):
  """The model of transformers with our parameters."""
  config = transformers.LlamaConfig(
    vocab_size=sizes.vocab_size,
    hidden_size=sizes.width,
    intermediate_size=sizes.mlp_dim,
    num_hidden_layers=sizes.depth,
    num_attention_heads=sizes.num_heads,
    num_key_value_heads=sizes.num_heads,
    rms_norm_eps=1e-5,
    attn_implementation="sdpa",
    use_cache=False,
  )
  model = transformers.LlamaForCausalLM(config).float()
  state = {
    "model.embed_tokens.weight": tree["embedding"][: sizes.vocab_size],
    "lm_head.weight": tree["head"][: sizes.vocab_size],
    "model.norm.weight": tree["norm"]["scale"],
  }
  for i in range(sizes.depth):
    for theirs, ours in _LAYER.items():
      first, second = ours.split("/")
      kernel = tree["layers"][first][second]["kernel"][i]
      state[f"model.layers.{i}.{theirs}.weight"] = kernel.T.copy()
    for theirs, ours in _NORMS.items():
      scale = tree["layers"][ours]["scale"][i]
      state[f"model.layers.{i}.{theirs}.weight"] = scale
  model.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
  return model.train()


def _adamw(model):
  """AdamW over what trains; matrices of layers and the head decay."""
  decays, rest = [], []
  for name, parameter in model.named_parameters():
    if parameter.requires_grad:
      matrix = parameter.ndim > 1 and torch_training.decays(name)
      (decays if matrix else rest).append(parameter)
  groups = [
    {"params": decays, "weight_decay": steps.OPTIMIZER["weight_decay"]},
    {"params": rest, "weight_decay": 0.0},
  ]
  betas = (steps.OPTIMIZER["b1"], steps.OPTIMIZER["b2"])
  return torch.optim.AdamW(groups, lr=steps.LR, betas=betas, fused=True)


class Side:
  """The work of each case, as calls that begin and end in numpy."""

  def __init__(self, folder, sizes, threads: int):
    """Nothing is made before a case needs it."""
    torch.set_num_threads(threads)
    # Only a worker on a GPU sees one: `worker` restricts the others.
    self._device = "cuda" if os.environ["JAX_PLATFORMS"] == "cuda" else "cpu"
    torch.set_default_device(self._device)
    transformers.utils.logging.disable_progress_bar()
    self._folder, self._sizes = folder, sizes

  def versions(self) -> dict[str, str]:
    """Of the libraries that compute."""
    return {x: importlib.metadata.version(x) for x in ("torch", "transformers")}

  def work(self, case, batch: int):
    """A function of no arguments: one step; it gives the loss."""
    del case
    sizes, tree = self._sizes, steps.read(self._folder)
    arrays = {k: torch.tensor(v) for k, v in sizes.batch(batch).items()}
    if isinstance(sizes, steps.Llama):
      model = _llama(sizes, tree["params"])
      tokens, targets = arrays["tokens"].long(), arrays["targets"].long()

      def loss():
        logits = model(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
      model = torch_training.load(sizes, tree)
      loss = lambda: model(arrays["image"])
    optimizer = _adamw(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if self._device == "cuda":
      loss = torch.compile(loss)
    mixed = functools.partial(
      torch.autocast,
      self._device,
      torch.bfloat16,
      enabled=sizes.dtype == "bfloat16",
    )

    def run():
      optimizer.zero_grad(set_to_none=True)
      with mixed():
        value = loss()
      value.backward()
      torch.nn.utils.clip_grad_norm_(trained, steps.OPTIMIZER["clip_norm"])
      optimizer.step()
      return {"loss": value.item()}

    self._run = run
    return run

  def judged(self, case, batch: int):
    """A function that makes further steps and gives their losses."""
    del case, batch
    return lambda: [self._run()["loss"] for _ in range(steps.STEPS)]

  def about(self) -> dict:
    """The device, and the memory it needed at the most."""
    if self._device == "cpu":
      return {"device": "cpu"}
    used = torch.cuda.max_memory_allocated() / 1e9
    return {"device": torch.cuda.get_device_name(), "memory_gb": used}

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a summary of operations."""
    with torch.profiler.profile() as profile:
      yield
    table = profile.key_averages().table("self_cpu_time_total", row_limit=_TOP)
    (pathlib.Path(directory) / "summary.txt").write_text(table)
