"""Checks and times lavit_jax on one GPU, beside PyTorch with CUDA.

  python benchmarks/gpu_check.py --out gpu.json      on a machine with a GPU
  python benchmarks/gpu_check.py --toy               every part, tiny, on a CPU
  python benchmarks/gpu_check.py --missing           packages to bring along

Five to eight minutes on an H100 or H200. Parts, each in a process of its own,
so that one that fails or takes too long costs no other its result:

  recorded   arrays of the official code and of transformers, in float32
             without TF32 (the tests that read tests/golden, on the GPU)
  steps      loss and gradients of a step of each stage, equal to a CPU's
  pretrain   a step of a LLaMA of 1 B parameters, 8 rows of 2,048 tokens,
             bfloat16, AdamW; PyTorch compiled, with SDPA and autocast
  tokenizer  a step of phase `codes` with a frozen ViT-g, 32 images, likewise
  products   int8 and fp8 of `models/low_precision.py` against bfloat16

Both sides of a timing start from the same weights, and their losses are
compared first. MFU is of the model's FLOPs, counted in the jaxpr. A part can be
run alone: --only pretrain. Exit status 1 where a part failed.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types

import pretrain_step
import tokenizer_step
from side_by_side import step_runner, steps

ROOT = pathlib.Path(__file__).parents[1]
_SECONDS = {  # that a part may take
  "recorded": 150,
  "steps": 120,
  "pretrain": 150,
  "tokenizer": 150,
  "products": 60,
}
# Tests of recorded arrays that are in the repository.
_RECORDED = (
  *("models/llama_test.py", "models/encoder/vision_test.py"),
  *("models/tokenizer", "models/pixels/unet_parity_test.py"),
  *("models/pixels/vae_test.py", "infer/decoding/decode_test.py"),
)
_STAGES = ("encoder", "tokenizer", "pretrain", "pixels", "autoencoder")
_APART = 2e-4  # of a gradient's largest value, between GPU and CPU
_FULL = {
  "pretrain": (
    steps.Llama(
      width=2048,
      depth=16,
      num_heads=16,
      mlp_dim=5504,
      vocab_size=48386,
      length=2048,
      dtype="bfloat16",
    ),
    8,
  ),
  "tokenizer": (
    steps.Tokenizer(
      patch_size=14,
      width=1408,
      num_heads=16,
      vit_depth=39,
      merger_depth=12,
      decoder_depth=12,
      num_codes=16384,
      capacity=192,
      dtype="bfloat16",
    ),
    32,
  ),
}
_TOY = {
  name: (dataclasses.replace(small, dtype="bfloat16"), 2)
  for name, small in (
    ("pretrain", pretrain_step.SMALL),
    ("tokenizer", tokenizer_step.SMALL),
  )
}
_LOSSES_APART = 2e-2  # relative, in bfloat16
_SIDE, _TOY_SIDE = 8192, 256  # of the matrices that are multiplied


def main() -> int:
  """Runs the parts; the exit status."""
  args = _arguments()
  if args.missing:
    print("\n".join(missing()) or "nothing is missing here")
    return 0
  if args.part:
    found = PARTS[args.part](args.toy)
    pathlib.Path(args.out).write_text(json.dumps(found))
    return 0
  report = {"date": time.strftime("%Y-%m-%d"), "toy": args.toy, "parts": {}}
  for name in args.only or PARTS:
    report["parts"][name] = _run(name, args.toy)
    if args.out:  # what there is survives an end in the middle
      pathlib.Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
  print("\n".join(_lines(report)))
  return int(any(not part["passed"] for part in report["parts"].values()))


def _arguments():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", help="JSON file to write")
  parser.add_argument("--toy", action="store_true", help="tiny, on a CPU")
  parser.add_argument("--only", nargs="+", choices=list(PARTS))
  parser.add_argument(
    "--missing", action="store_true", help="list packages that are not here"
  )
  parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
  return parser.parse_args()


def missing() -> list[str]:
  """Returns what lavit_jax requires and this Python has not."""
  text = (ROOT / "setup.py").read_text()
  required = re.search(r"REQUIRED = (?:\[|\()(.*?)(?:\]|\))\n", text, re.S)
  assert required is not None
  names = re.findall(r'"([A-Za-z0-9_.-]+)', required[1])
  absent = []
  for name in [*names, "qwix", "pytest"]:
    try:
      importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      absent.append(name)
  return absent


def _run(name, toy) -> dict:
  """Runs a part in a process of its own; its result, or why there is none."""
  print(f"== {name}", flush=True)
  begun = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "found.json"
    words = [sys.executable, __file__, "--part", name, "--out", str(out)]
    path = os.pathsep.join(
      filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    env = os.environ | {"PYTHONPATH": path}
    why = ""
    try:
      ended = subprocess.run(
        words + ["--toy"] * toy,
        env=env,
        timeout=_SECONDS[name],
        check=False,
        cwd=ROOT,
      )
      if ended.returncode:
        why = f"ended with status {ended.returncode}, see above"
    except subprocess.TimeoutExpired:
      why = f"took more than {_SECONDS[name]} s"
    found = json.loads(out.read_text()) if out.exists() else {}
  found.setdefault("passed", False)
  if why:
    found |= {"passed": False, "why": why}
  return found | {"seconds": round(time.monotonic() - begun, 1)}


def recorded(toy: bool) -> dict:
  """Runs the tests of recorded arrays with all products in float32."""
  files = _RECORDED[:1] if toy else _RECORDED
  env = os.environ | {
    "JAX_PLATFORMS": "cpu" if toy else "cuda",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "NVIDIA_TF32_OVERRIDE": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
  words += ["-n", "0", *(str(ROOT / "tests" / name) for name in files)]
  ended = subprocess.run(
    words, env=env, cwd=ROOT, capture_output=True, text=True, check=False
  )
  lines = ended.stdout.splitlines()
  failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
  print("\n".join(failed), flush=True)
  passed = ended.returncode == 0
  return {"passed": passed, "said": lines[-1:], "failed": failed}


def gradients(toy: bool) -> dict:
  """Compares loss and gradients of every stage's step with a CPU's."""
  os.environ["JAX_PLATFORMS"] = "cpu" if toy else "cuda,cpu"
  os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  import jax
  import numpy as np

  from tests.train import outlines, parts

  jax.config.update("jax_default_matmul_precision", "highest")
  found = {}
  for stage in _STAGES[2:3] if toy else _STAGES:
    objective = outlines.build(stage)
    case, phase = outlines.Case(objective), outlines.phase_of(objective)
    made = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
      with jax.default_device(device):
        made.append(parts.outcome(objective, phase, case, 1)[0])
    ours, expected = (jax.tree.leaves(grads) for grads in made)
    largest = max(float(np.abs(x).max(initial=0)) for x in expected)
    apart = max(
      float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3 * largest))
      for a, b in zip(ours, expected, strict=True)
      if b.size
    )
    found[stage] = apart
    print(f"{stage}: gradients at most {apart:.1e} apart", flush=True)
  passed = all(apart <= _APART for apart in found.values())  # no NaN is
  return {"passed": passed, "apart": found}


def _timed(name: str, toy: bool) -> dict:
  """Times a training step on both sides."""
  sizes, batch = (_TOY if toy else _FULL)[name]
  device = "cpu" if toy else "gpu"
  args = types.SimpleNamespace(
    json=False, threads=2, batch=batch, small=toy, repeats=5, profile=None
  )
  with tempfile.TemporaryDirectory() as folder:
    found = step_runner.run(args, folder, sizes, _LOSSES_APART, device)
  if found is None:
    return {"passed": False, "why": "the losses differ"}
  (row,), about = found["rows"], found["about"]
  seconds = {side: row[side]["median_s"] for side in ("torch", "ours")}
  flops, peak = about["ours"]["model_flops"], about["ours"]["peak_flops"]
  mfu = {s: flops / t / peak if peak else None for s, t in seconds.items()}
  return {
    "passed": True,
    "ratio": seconds["torch"] / seconds["ours"],
    "seconds_a_step": seconds,
    "a_second": {s: row["count"] / t for s, t in seconds.items()},
    "unit": row["unit"],
    "mfu": mfu,
    "compile_s": row["ours"]["compile_s"],
    "about": about,
    "versions": found["versions"],
    "losses": found["losses"],
  }


def products(toy: bool) -> dict:
  """Times a product in bfloat16, int8 and fp8, rounding included."""
  os.environ["JAX_PLATFORMS"] = "cpu" if toy else "cuda"
  import jax
  import jax.numpy as jnp

  from lavit_jax.models import low_precision, matmul

  side = _TOY_SIDE if toy else _SIDE
  keys = jax.random.split(jax.random.key(0))
  x, kernel = (jax.random.normal(k, (side, side), jnp.bfloat16) for k in keys)
  ways = {"bfloat16": matmul.linear} | {
    name: lambda x, k, name=name: low_precision.linear(x, k, name)
    for name in low_precision.FORMATS
  }
  found = {}
  for name, way in ways.items():
    run = jax.jit(way)
    run(x, kernel).block_until_ready()
    times = []
    for _ in range(10):
      begun = time.perf_counter()
      run(x, kernel).block_until_ready()
      times.append(time.perf_counter() - begun)
    found[name] = 2 * side**3 / min(times) / 1e12
    print(f"{name}: {found[name]:.1f} TFLOP/s", flush=True)
  return {"passed": True, "tflops": found, "side": side}


PARTS = {
  "recorded": recorded,
  "steps": gradients,
  "pretrain": lambda toy: _timed("pretrain", toy),
  "tokenizer": lambda toy: _timed("tokenizer", toy),
  "products": products,
}


def _lines(report) -> list[str]:
  """The report as lines of Markdown."""
  lines = ["", "| part | result | s |", "|---|---|---|"]
  for name, part in report["parts"].items():
    said = "passed" if part["passed"] else f"FAILED: {part.get('why', '')}"
    if "ratio" in part:
      ours, theirs = (part["a_second"][s] for s in ("ours", "torch"))
      mfu = part["mfu"]["ours"]
      said = (
        f"{part['ratio']:.2f} x PyTorch: {ours:,.0f} against {theirs:,.0f}"
        f" {part['unit']} a second"
        f"{f', MFU {mfu:.0%}' if mfu else ''}, compiled in"
        f" {part['compile_s']:.0f} s"
      )
    if "tflops" in part:
      rates = part["tflops"].items()
      said = ", ".join(f"{n} {x:,.1f} TFLOP/s" for n, x in rates)
    if "apart" in part:
      said += f", at most {max(part['apart'].values()):.0e} apart"
    if part.get("said"):
      said += f" ({part['said'][0].strip('= ')})"
    lines.append(f"| {name} | {said} | {part['seconds']} |")
  return lines


if __name__ == "__main__":
  sys.exit(main())
