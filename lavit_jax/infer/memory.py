"""Estimates the needs of each task: parts, bytes of weights and of cache.

The estimate reads the metadata of a model directory, not the weights. Bytes of
weights are exact: the arrays that class LaVIT loads for the task. The cache of
keys and values is for usual lengths, which are arguments. Activations are not
included, nor the casts of XLA while a program runs. On a CPU these are large
for bfloat16 weights, of which XLA keeps a float32 copy, and small for int8: the
current kernel and the head (`working_mb` of benchmarks/int8.py). On a small
machine without accelerator int8 and float32 need the least.
"""

import functools
import os
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
_DECODES = ("reconstruct", "generate", "synthesize")  # need a pixel decoder
# Loaded as float32 for any dtype: codes differ by small amounts, and the pixel
# decoder is small.
_FLOAT32 = ("tokenizer", "pixels", safety.PART)
_PROMPT_MULTIPLE = 16  # to which prompts are padded


def needs(
  directory: str | os.PathLike,
  *,
  dtype: str = "float32",
  quantize: str | None = None,
  batch: int = 1,
  text_tokens: int = 32,
  images: int = 1,
  rules: rules_lib.GenerationPreset | None = None,
  decoder: str | None = None,
) -> dict[str, dict[str, Any]]:
  """Returns the needs of class LaVIT for each task with a model directory.

  Args:
    directory: a model directory.
    dtype: of encoder, LLM and computation.
    quantize: None, or "int8" for the LLM.
    batch: images or prompts at once.
    text_tokens: of the text in a prompt (captions have none).
    images: in a prompt of `synthesize` and `write_codes`; all their patches
      are counted as kept, which is the maximum.
    rules: preset with the numbers of tokens, beams and streams; by default
      that of the model.
    decoder: the pixel decoder, of `decoders.NEEDS`; by default the model's.

  Returns:
    For each of `TASKS` a dict, ready for JSON: `parts` (names), `missing`
    (names of missing parts and files), `possible` (nothing is missing), `note`
    (why not, else empty), `weights` (bytes of each part present),
    `weights_bytes`, `cache_bytes` and `total_bytes`.

  Raises:
    errors.UsageError: no such dtype or mode.
    errors.CheckpointError: a part is damaged.
  """
  float_dtype = quantize_lib.check_dtype(dtype)
  if quantize is not None:
    quantize_lib.check_mode(quantize)
  directory = files.input_path(directory)
  stored = {
    name: checkpoints.StoredPart(directory, name)
    for name in checkpoints.parts_in(directory)
  }
  weights = {
    name: _loaded_bytes(name, part, float_dtype, quantize)
    for name, part in stored.items()
  }
  pixel_parts = decoders.NEEDS[decoder or decoders.preferred(stored)]
  result = {}
  for task, parts in TASKS.items():
    if task in _DECODES:
      checker = (safety.PART,) if safety.PART in stored else ()
      parts = (*parts, *pixel_parts, *checker)
    missing = _missing(directory, stored, task, parts)
    slots = _slots(stored, task, rules, text_tokens, images)
    present = {name: weights[name] for name in parts if name in weights}
    cache = _cache_bytes(stored, slots, batch, float_dtype)
    result[task] = {
      "parts": list(parts),
      "missing": missing,
      "possible": not missing,
      "note": _note(missing),
      "weights": present,
      "weights_bytes": sum(present.values()),
      "cache_bytes": cache,
      "total_bytes": sum(present.values()) + cache,
    }
  return result


def lines(needs_by_task: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Returns lines such as "caption: 14.2 GB of weights + 0.4 GB cache".

  Args:
    needs_by_task: from `needs`.
  """
  result = []
  for task, need in needs_by_task.items():
    if need["missing"]:
      result.append(f"{task}: not possible, {need['note']}")
      continue
    line = f"{task}: {size(need['weights_bytes'])} of weights"
    if need["cache_bytes"]:
      line += f" + {size(need['cache_bytes'])} cache"
    result.append(line)
  return result


def size(count: int) -> str:
  """Formats bytes: 14_200_000_000 gives "14.2 GB", 95_000 "95.0 kB"."""
  for unit, bytes_each in (("GB", 1e9), ("MB", 1e6)):
    if count >= bytes_each / 10:
      return f"{count / bytes_each:.1f} {unit}"
  return f"{count / 1e3:.1f} kB"


def _bytes_of(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _loaded_bytes(name, part, dtype, quantize) -> int:
  """Returns the bytes of the arrays that class LaVIT loads from a part."""
  wanted = "float32" if name in _FLOAT32 else dtype
  mode = quantize if name == "llm" else None
  shapes = functools.partial(quantize_lib.loaded_shapes, mode=mode)
  if "vae" not in part.meta:
    return _bytes_of(shapes(part.arrays, wanted))
  config = vae.VaeConfig(**part.meta["vae"] | {"dtype": wanted})
  branch = lambda of_vae: {
    k: v for k, v in part.arrays.items() if k.startswith("vae/") == of_vae
  }
  return _bytes_of(shapes(branch(False), wanted)) + _bytes_of(
    shapes(branch(True), config.compute_dtype)
  )


def _missing(directory, stored, task, parts) -> list[str]:
  """Returns missing parts, files and branches of parts for a task."""
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
  """Returns the reason why a task is not possible."""
  return f"the model has no {', '.join(missing)}" if missing else ""


def _slots(stored, task, rules, text_tokens, images) -> tuple[int, int]:
  """Returns (cache rows per prompt, slots per row); (0, 0) without an LLM."""
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
  """Returns the bytes of keys and values for `batch` prompts."""
  rows, length = slots
  if not rows:
    return 0
  config = llama.LlamaConfig(**stored["llm"].meta["llama"])
  make = functools.partial(
    llama.init_cache, config, batch * rows, length, dtype
  )
  return _bytes_of(jax.eval_shape(make))
