"""What each task needs: parts, bytes of weights, bytes of cache.

Told by the metadata of a model directory; no weight is read. Weights are
exact: the arrays that class LaVIT loads for the task. The cache of keys and
values is for usual lengths, which can be given. Activations are not counted,
nor what XLA casts while a program runs. On a CPU that is much where weights
are bfloat16, of which it keeps a float32 copy, and little where they are int8:
the kernel at hand and the head (`working_mb` of benchmarks/int8.py). A small
machine without accelerator does best with int8 and float32.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lavit_jax.core.storage import checkpoints, files
from lavit_jax.infer.loading import quantize as quantize_lib
from lavit_jax.infer.pixels import decoders, safety
from lavit_jax.infer.presets import rules as rules_lib
from lavit_jax.models import llama
from lavit_jax.models.pixels import vae
from lavit_jax.models.tokenizer import tokenizer

_READS = ("encoder", "tokenizer")
_WRITES = (*_READS, "llm")
TASKS = {
  "tokenize": _READS,
  "reconstruct": _READS,
  "caption": _WRITES,
  "answer": _WRITES,
  "write_codes": _WRITES,
  "generate": _WRITES,
  "synthesize": _WRITES,
}
_PAINTS = ("reconstruct", "generate", "synthesize")  # a pixel decoder besides
# Loaded as float32 whatever the dtype: codes are told apart by small
# differences, and the pixel decoder is small.
_FLOAT32 = ("tokenizer", "pixels", safety.PART)
_PROMPT_MULTIPLE = 16  # to which prompts are padded


def needs(
  directory,
  *,
  dtype="float32",
  quantize: str | None = None,
  batch: int = 1,
  text_tokens: int = 32,
  images: int = 1,
  rules: rules_lib.GenerationPreset | None = None,
  decoder: str | None = None,
) -> dict[str, dict[str, Any]]:
  """What class LaVIT needs for each task with a model directory.

  Args:
    directory: a model directory.
    dtype: of encoder, LLM and computation.
    quantize: None, or "int8" for the LLM.
    batch: images or prompts at once.
    text_tokens: of the text in a prompt (captions have none).
    images: in a prompt of `synthesize` and `write_codes`; each is taken to
      keep all its patches, the most that is possible.
    rules: how many tokens, beams and streams; by default the model's own.
    decoder: the pixel decoder, of `painters.NEEDS`; by default the model's.

  Returns:
    For each of `TASKS` a dict, ready for JSON: `parts` (names), `missing`
    (what the directory lacks), `possible` (nothing is missing), `note` (why
    not, else empty), `weights` (bytes of each part present), `weights_bytes`,
    `cache_bytes` and `total_bytes`.

  Raises:
    errors.UsageError: no such dtype or mode.
    errors.CheckpointError: a part is damaged.
  """
  dtype = quantize_lib.check_dtype(dtype)
  if quantize is not None:
    quantize_lib.check_mode(quantize)
  directory = files.place(directory)
  stored = {
    name: checkpoints.StoredPart(directory, name)
    for name in checkpoints.parts_in(directory)
  }
  weights = {
    name: _loaded_bytes(name, part, dtype, quantize)
    for name, part in stored.items()
  }
  paints = decoders.NEEDS[decoder or decoders.preferred(stored)]
  out = {}
  for task, parts in TASKS.items():
    if task in _PAINTS:
      checker = (safety.PART,) if safety.PART in stored else ()
      parts = (*parts, *paints, *checker)
    missing = _missing(directory, stored, task, parts)
    slots = _slots(stored, task, rules, text_tokens, images)
    held = {name: weights[name] for name in parts if name in weights}
    cache = _cache_bytes(stored, slots, batch, dtype)
    out[task] = {
      "parts": list(parts),
      "missing": missing,
      "possible": not missing,
      "note": _note(missing),
      "weights": held,
      "weights_bytes": sum(held.values()),
      "cache_bytes": cache,
      "total_bytes": sum(held.values()) + cache,
    }
  return out


def lines(needed: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """One line a task, such as "caption: 14.2 GB of weights + 0.4 GB cache"."""
  out = []
  for task, need in needed.items():
    if need["missing"]:
      out.append(f"{task}: not possible, {need['note']}")
      continue
    line = f"{task}: {size(need['weights_bytes'])} of weights"
    if need["cache_bytes"]:
      line += f" + {size(need['cache_bytes'])} cache"
    out.append(line)
  return out


def size(count: int) -> str:
  """Bytes for people: 14_200_000_000 gives "14.2 GB", 95_000 "95.0 kB"."""
  for unit, bytes_each in (("GB", 1e9), ("MB", 1e6)):
    if count >= bytes_each / 10:
      return f"{count / bytes_each:.1f} {unit}"
  return f"{count / 1e3:.1f} kB"


def _bytes_of(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _loaded_bytes(name, part, dtype, quantize) -> int:
  """Of the arrays that class LaVIT loads of a part."""
  wanted = "float32" if name in _FLOAT32 else dtype
  mode = quantize if name == "llm" else None
  shapes = functools.partial(quantize_lib.loaded_shapes, mode=mode)
  if "vae" not in part.meta:
    return _bytes_of(shapes(part.arrays, wanted))
  config = vae.VaeConfig(**part.meta["vae"] | {"dtype": wanted})
  branch = lambda vae: {
    k: v for k, v in part.arrays.items() if k.startswith("vae/") == vae
  }
  return _bytes_of(shapes(branch(False), wanted)) + _bytes_of(
    shapes(branch(True), config.compute_dtype)
  )


def _missing(directory, stored, task, parts) -> list[str]:
  """What the directory lacks for a task: parts, files, branches of parts."""
  missing = [name for name in parts if name not in stored]
  if "llm" not in parts:
    return missing
  if not (directory / "tokenizer.model").exists():
    missing.append("tokenizer.model")
  if "llm" in stored and task in ("caption", "answer", "synthesize"):
    branches = ("merger", "projection")
    have = {path.split("/")[0] for path in stored["llm"].arrays}
    missing += [f"llm/{name}" for name in branches if name not in have]
  return missing


def _note(missing: Sequence[str]) -> str:
  """Why a task is not possible, in words."""
  return f"the model has no {', '.join(missing)}" if missing else ""


def _slots(stored, task, rules, text_tokens, images) -> tuple[int, int]:
  """(rows of the cache a prompt, slots of a row); (0, 0) without an LLM."""
  if "llm" not in TASKS[task] or not {"llm", "tokenizer"} <= set(stored):
    return 0, 0
  rules = rules or rules_lib.rules_of(stored["llm"].meta)
  meta = stored["tokenizer"].meta["tokenizer"]
  patches = tokenizer.config_from_dict(meta).num_patches
  if task in ("caption", "answer"):
    rule = rules.caption if task == "caption" else rules.answer
    prompt = patches + 2 + (text_tokens if task == "answer" else 0)
    rows, new = rule.num_beams, rule.max_new_tokens
  else:
    rule, mixed = rules.draw, task != "generate" and images > 0
    prompt = text_tokens + mixed * images * (patches + 2) + 1
    guidance = rule.mixed_guidance_scale if mixed else rule.guidance_scale
    rows = 1 if guidance == 1 else 2
    new = min(rule.max_new_tokens or patches + 1, patches + 1)
  return rows, -(-prompt // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE + new


def _cache_bytes(stored, slots, batch, dtype) -> int:
  """Of keys and values for `batch` prompts."""
  rows, length = slots
  if not rows:
    return 0
  config = llama.LlamaConfig(**stored["llm"].meta["llama"])
  make = functools.partial(
    llama.init_cache, config, batch * rows, length, dtype
  )
  return _bytes_of(jax.eval_shape(make))
