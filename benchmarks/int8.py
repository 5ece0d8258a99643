"""What int8 weights do to the LLM: its logits, its size, its speed.

  python benchmarks/int8.py [--rows 64] [--repeats 5] [--model DIR ...]

For the shipped `tiny`, for the golden checkpoint where LAVIT_SHARED names the
folder that has it, for each DIR, and (size and speed alone) for a LLaMA of
0.2 billion random weights, whose layers are large enough to tell about speed.
Texts are held-out shapes scenes: captions with the codes of their images,
[/IMG] at the end, and sentences. The golden weights are random, so that their
perplexity says nothing about language. Speed: 64 tokens, greedy, batch 1, all
in turn; the ratio is that of int8 over float32. `working_mb` is the memory of
a decode step beside weights and cache, as XLA plans it.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import tempfile
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax.core import image_io, vocabulary
from lavit_jax.core.storage import checkpoints
from lavit_jax.data import sequences
from lavit_jax.data.sources import shapes
from lavit_jax.infer.decoding import decode
from lavit_jax.infer.loading import parts, quantize, visual
from lavit_jax.models import llama

TOKENS = 64
_AT_ONCE = 16  # texts
LARGE = llama.LlamaConfig(
  vocab_size=16384,
  width=1024,
  depth=12,
  num_heads=16,
  num_kv_heads=16,
  mlp_dim=2816,
)


def texts_of(directory, count: int) -> dict[str, np.ndarray]:
  """`count` captions with their images as ids, and as many sentences.

  Returns:
    dict(tokens int32[2 * count, L], mask bool[2 * count, L]).
  """
  text = vocabulary.TextTokenizer.load(directory / "tokenizer.model")
  meta = checkpoints.read_meta(directory, "llm")
  vocab = vocabulary.Vocabulary(**meta["vocabulary"])
  see = visual.VisualTokenizer(
    checkpoints.load_part(directory, "encoder"),
    checkpoints.load_part(directory, "tokenizer"),
  )
  source = shapes.ShapesSource("held_out", size=count)
  images = [
    image_io.to_uint8(image_io.load(source.image(i)), see.image_size)
    for i in range(count)
  ]
  rows = []
  for i, image in enumerate(see.tokenize(np.stack(images))):
    row = sequences.text_ids(text, source.captions(i)[0])
    codes = vocab.to_ids(image["codes"]).tolist()
    rows.append([*row, vocab.image_begin, *codes, vocab.image_end])
    rows.append([*sequences.text_ids(text, source.sentences(i)), vocab.eos_id])
  return decode.left_pad(rows)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(model, params, tokens, mask):
  """(logits float32[B, L, V], losses of the next token float32[B, L - 1])."""
  logits = model.apply({"params": params}, tokens, mask=mask)
  logits = logits[..., : model.config.vocab_size]
  logprobs = jax.nn.log_softmax(logits[:, :-1])
  chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)
  return logits, -chosen[..., 0]


def quality(floats, rounded, texts) -> dict[str, float]:
  """How far the logits of one (model, params) are from another's."""
  apart, largest, same, losses = 0.0, 0.0, [], ([], [])
  for start in range(0, len(texts["tokens"]), _AT_ONCE):
    chunk = slice(start, start + _AT_ONCE)
    tokens, mask = texts["tokens"][chunk], texts["mask"][chunk]
    logits = []
    for pair, found in zip((floats, rounded), losses, strict=True):
      row, loss = map(np.asarray, _predictions(*pair, tokens, mask))
      logits.append(row[mask])
      found.append(loss[mask[:, :-1]])
    before, after = logits
    apart = max(apart, np.abs(after - before).max())
    largest = max(largest, np.abs(before).max())
    same.append(before.argmax(-1) == after.argmax(-1))
  before, after = (np.exp(np.concatenate(x).mean()) for x in losses)
  return {
    "predictions": int(texts["mask"].sum()),
    "logits_max_relative_error": apart / largest,
    "equal_argmax": np.concatenate(same).mean(),
    "perplexity_float32": before,
    "perplexity_int8": after,
  }


def working_bytes(model, params) -> int:
  """Bytes a decode step needs beside weights and cache, by XLA's plan."""
  cache = llama.init_cache(model.config, 1, 2 * TOKENS)

  @functools.partial(jax.jit, donate_argnums=1)
  def steps(params, cache):
    def step(_, carry):
      ids, cache = carry
      logits, cache = decode.advance(model, params, ids, cache)
      return logits.argmax(-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, 4, step, (jnp.zeros(1, jnp.int32), cache))

  return (
    steps.lower(params, cache).compile().memory_analysis().temp_size_in_bytes
  )


def seconds_of(runs, repeats: int) -> dict[str, float]:
  """The best time of each function, run in turn so that all suffer alike."""
  times = {name: [] for name in runs}
  for run in runs.values():
    jax.block_until_ready(run())  # compiles
  for _ in range(repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: min(found) for name, found in times.items()}


def cost(floats, rounded, repeats: int) -> dict[str, float]:
  """Size before and after, and the speed of decoding."""
  model, params = floats
  config = dataclasses.replace(model.config, dtype="bfloat16")
  halved = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  # In the form in which class LaVIT decodes with each.
  pairs = {
    "float32": llama.for_decoding(*floats),
    "bfloat16": llama.for_decoding(llama.Llama(config), halved),
    "int8": llama.for_decoding(*rounded),
  }
  out = {}
  for name, pair in pairs.items():
    held = sum(x.nbytes for x in jax.tree.leaves(pair[1]))
    out[f"size_mb_{name}"] = held / 1e6
    out[f"working_mb_{name}"] = working_bytes(*pair) / 1e6
  how = {
    "prompt": decode.left_pad([list(range(3, 19))]),
    "max_new_tokens": TOKENS,
    "eos_id": -1,
  }
  runs = {
    name: functools.partial(decode.generate, *pair, **how)
    for name, pair in pairs.items()
  }
  seconds = seconds_of(runs, repeats)
  for name, least in seconds.items():
    out[f"tokens_a_second_{name}"] = TOKENS / least
  return out | {"speed_ratio": seconds["float32"] / seconds["int8"]}


def measure(directory, rows: int, repeats: int) -> dict:
  """All figures of a model directory."""
  directory = parts.resolve(directory)
  part = checkpoints.load_part(directory, "llm")
  # Layers unrolled are faster with either; `quantize` allows for one only.
  config = llama.LlamaConfig(**part.meta["llama"] | {"unroll": 1})
  model = llama.Llama(config)
  floats = model, part.params["llm"]
  rounded = quantize.quantize(*floats)
  found = quality(floats, rounded, texts_of(directory, rows))
  return found | cost(floats, rounded, repeats)


def measure_large(repeats: int) -> dict:
  """Size and speed of `LARGE`, random weights."""
  model = llama.Llama(LARGE)
  init = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  floats = model, nn.unbox(init["params"])
  return cost(floats, quantize.quantize(*floats), repeats)


def main():
  """Prints the figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rows", type=int, default=64)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--model", nargs="*", default=[], help="directories")
  args = parser.parse_args()
  out = {
    "machine": f"{platform.machine()}, {os.cpu_count()} cores,"
    f" {jax.devices()[0].device_kind}",
    "date": datetime.date.today().isoformat(),
  }
  with tempfile.TemporaryDirectory() as scratch:
    models = {"tiny": "tiny"} | {name: name for name in args.model}
    if shared := os.environ.get("LAVIT_SHARED"):
      from lavit_jax.port import importing

      models["golden"] = pathlib.Path(scratch) / "golden"
      source = pathlib.Path(shared) / "golden/a/checkpoint"
      importing.run(source, models["golden"], quiet=True)
    for name, directory in models.items():
      out[name] = measure(directory, args.rows, args.repeats)
  out["large"] = measure_large(args.repeats)
  rounded = lambda x: x if isinstance(x, int) else float(f"{x:.4g}")
  for name, figures in out.items():
    if isinstance(figures, dict):
      out[name] = {key: rounded(value) for key, value in figures.items()}
  print(json.dumps(out, indent=2))


if __name__ == "__main__":
  main()
