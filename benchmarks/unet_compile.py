"""What a smaller scoped vector memory does to SDXL's blocks, compiled for v6e.

  python benchmarks/unet_compile.py [--kib 8192,12288,16384]

Each block with its gradients, one picture a chip: seconds to compile, size of
the code, and cycles by the compiler's own account, beside its default. Needs
libtpu and no TPU. Takes about 15 minutes on two cores.
"""

import argparse
import re
import time

import jax
import jax.numpy as jnp

from lavit_jax import progress, sharding
from lavit_jax.models import unet, unet_blocks
from lavit_jax.train import hlo, program, topology

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OPTION = "xla_tpu_scoped_vmem_limit_kib"
_RUN = ("while", "conditional", "call", "async-start")
_UNET = unet.SDXL_UNET


def blocks():
  """Name: (module, shapes of what it takes for one picture)."""
  resnet = unet_blocks.ResnetBlock
  transformer = unet.transformer(_UNET, 2, None).clone(remat="dots")
  return {
    "ResNet 640, 64 x 64": (
      resnet(640, _UNET.groups, _UNET.dtype),
      [(64, 64, 640), (1280,)],
    ),
    "ResNet 2560 to 1280, 32 x 32": (
      resnet(1280, _UNET.groups, _UNET.dtype),
      [(32, 32, 2560), (1280,)],
    ),
    "10 transformer layers of 1280, 32 x 32": (
      transformer,
      [(32, 32, 1280), (256, _UNET.cross_dim)],
    ),
  }


def main():
  """Compiles all, prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kib", default="8192,12288,16384", help="sizes to try")
  sizes = [None, *parser.parse_args().kib.split(",")]
  made = blocks()
  print("| block | scoped memory | compile | code | cycles |")
  print("|---|---|---|---|---|")
  with progress.Progress(len(made) * len(sizes), label="compiled") as bar:
    for i, (name, (module, shapes)) in enumerate(made.items()):
      default = None
      for j, size in enumerate(sizes):
        seconds, code, cycles = compiled(module, shapes, size)
        default = default or cycles
        told = f"{size} KiB" if size else "default"
        print(
          f"| {name} | {told} | {seconds:.0f} s | {code / 1e6:.0f} MB |"
          f" {cycles / default:.2f} x |",
          flush=True,
        )
        bar.update(i * len(sizes) + j + 1)


def compiled(module, shapes, kib: str | None) -> tuple[float, float, float]:
  """(seconds, bytes of code, cycles) of a block and its gradients."""
  devices = topology.devices("v6e:2x2", 1)
  mesh = sharding.make_mesh({"fsdp": -1}, devices)
  rows = sharding.batch_sharding(mesh)
  given = [
    jax.ShapeDtypeStruct((len(devices), *shape), jnp.bfloat16, sharding=rows)
    for shape in shapes
  ]

  def loss(params, *given):
    made = module.apply({"params": params}, *given)
    return jnp.square(made.astype(jnp.float32)).mean()

  with sharding.use(mesh):
    boxed = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    params = program.abstract(boxed, mesh)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, *given)
    start = time.monotonic()
    done = lowered.compile(
      {"xla_tpu_scoped_vmem_limit_kib": kib} if kib else {}
    )
  seconds = time.monotonic() - start
  cycles = hlo.read(done.as_text()).total(_cycles, _RUN)
  return seconds, done.memory_analysis().generated_code_size_in_bytes, cycles


def _cycles(one: hlo.Instruction, _) -> float:
  """What libtpu believes that an instruction takes."""
  found = _CYCLES.search(one.rest)
  return float(found[1]) if found else 0.0


if __name__ == "__main__":
  main()
