"""What a smaller scoped vector memory does to the blocks of full-size U-Nets.

  python benchmarks/unet_compile.py [--net sdxl|sd15] [--kib 8192,12288,16384]

Each block with its gradients, for the chip and the images a chip of the table
in docs/compile.md (SDXL: v6e and 1, Stable Diffusion 1.5: v5e and 8): seconds
to compile, size of the code, and cycles by the compiler's own account, beside
its default.
Needs libtpu and no TPU. Takes 15 minutes (sd15: 4) on two cores.
"""

import argparse
import dataclasses
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from lavit_jax.aot import hlo, topology
from lavit_jax.core import progress, sharding
from lavit_jax.models.pixels import unet, unet_blocks

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OPTION = "xla_tpu_scoped_vmem_limit_kib"
_RUN = ("while", "conditional", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Net:
  """A U-Net, how it is trained, and blocks with the shapes they take."""

  config: unet.UNetConfig
  topology: str
  images: int  # a chip
  blocks: dict[str, tuple[nn.Module, list[tuple[int, ...]]]]


def nets() -> dict[str, Net]:
  """The two pixel decoders' U-Nets by the names of --net."""
  sd15 = unet.SD15_UNET
  sdxl = dataclasses.replace(unet.SDXL_UNET, remat="dots")
  return {
    "sdxl": Net(
      sdxl,
      "v6e:2x2",
      1,
      {
        "ResNet 640, 64 x 64": resnet(sdxl, 64, 640, 640),
        "ResNet 2560 to 1280, 32 x 32": resnet(sdxl, 32, 2560, 1280),
        "10 transformer layers of 1280, 32 x 32": transformer(sdxl, 2, 32, 256),
      },
    ),
    "sd15": Net(
      sd15,
      "v5e:2x2",
      8,
      {
        "ResNet 320, 64 x 64": resnet(sd15, 64, 320, 320),
        "ResNet 2560 to 1280, 16 x 16": resnet(sd15, 16, 2560, 1280),
        "transformer layer of 320, 64 x 64": transformer(sd15, 0, 64, 257),
      },
    ),
  }


def resnet(config, side, width, made):
  """A residual block for maps of `width` channels, and what it takes."""
  block = unet_blocks.ResnetBlock(made, config.groups, config.dtype)
  return block, [(side, side, width), (4 * config.channels[0],)]


def transformer(config, level, side, tokens):
  """The transformer of a level, and what it takes."""
  shapes = [(side, side, config.channels[level]), (tokens, config.cross_dim)]
  return unet.transformer(config, level, None), shapes


def main():
  """Compiles all, prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--net", default="sdxl", choices=nets())
  parser.add_argument("--kib", default="8192,12288,16384", help="sizes to try")
  args = parser.parse_args()
  net, sizes = nets()[args.net], [None, *args.kib.split(",")]
  made = net.blocks
  print("| block | scoped memory | compile | code | cycles |")
  print("|---|---|---|---|---|")
  with progress.Progress(len(made) * len(sizes), label="compiled") as bar:
    for i, (name, (module, shapes)) in enumerate(made.items()):
      default = None
      for j, size in enumerate(sizes):
        seconds, code, cycles = compiled(net, module, shapes, size)
        default = default or cycles
        told = f"{size} KiB" if size else "default"
        print(
          f"| {name} | {told} | {seconds:.0f} s | {code / 1e6:.0f} MB |"
          f" {cycles / default:.2f} x |",
          flush=True,
        )
        bar.update(i * len(sizes) + j + 1)


def compiled(
  net, module, shapes, kib: str | None
) -> tuple[float, float, float]:
  """(seconds, bytes of code, cycles) of a block and its gradients."""
  devices = topology.devices(net.topology, 1)
  mesh = sharding.make_mesh({"fsdp": -1}, devices)
  rows = sharding.batch_sharding(mesh)
  count = net.images * len(devices)
  given = [
    jax.ShapeDtypeStruct((count, *shape), jnp.bfloat16, sharding=rows)
    for shape in shapes
  ]

  def loss(params, *given):
    made = module.apply({"params": params}, *given)
    return jnp.square(made.astype(jnp.float32)).mean()

  init = lambda *given: module.init(jax.random.key(0), *given)["params"]
  with sharding.use(mesh):
    boxed = jax.eval_shape(init, *given)
    params = sharding.abstract(boxed, mesh)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, *given)
    start = time.monotonic()
    done = lowered.compile({_OPTION: kib} if kib else {})
  seconds = time.monotonic() - start
  cycles = hlo.read(done.as_text()).total(_cycles, _RUN)
  return seconds, done.memory_analysis().generated_code_size_in_bytes, cycles


def _cycles(one: hlo.Instruction, _) -> float:
  """What libtpu believes that an instruction takes."""
  found = _CYCLES.search(one.rest)
  return float(found[1]) if found else 0.0


if __name__ == "__main__":
  main()
