"""Commands that draw: generate, synthesize, reconstruct."""

import argparse
import os

from lavit_jax import errors
from lavit_jax.commands import common

_DRAWING = ("seed", "steps", "guidance_scale", "decoder_guidance_scale")


def add(subparsers) -> None:
  """Adds the commands of this file to the parser of `lavit`."""
  _add_generate(subparsers)
  _add_synthesize(subparsers)
  _add_reconstruct(subparsers)


def _add_drawing(parser: argparse.ArgumentParser, out: str) -> None:
  """Options of what draws; those not given are left to the model."""
  parser.add_argument(
    "--out",
    default=out,
    metavar="FILE",
    help=f"where to draw ({out}); several drawings are numbered",
  )
  parser.add_argument(
    "--seed", type=int, metavar="N", help="same seed, same drawing"
  )
  parser.add_argument(
    "--steps", type=int, metavar="N", help="steps of denoising"
  )


def _add_guidance(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--guidance",
    type=float,
    metavar="X",
    dest="guidance_scale",
    help="how closely the visual tokens follow the prompt; 1 is off",
  )
  parser.add_argument(
    "--decoder-guidance",
    type=float,
    metavar="X",
    dest="decoder_guidance_scale",
    help="how closely pixels follow the visual tokens; 1 is off",
  )


def _add_generate(subparsers) -> None:
  parser = common.command(
    subparsers,
    "generate",
    _generate,
    "draw pictures from text",
    """\
    examples:
      lavit generate "a large red circle at the top left"
      lavit generate "a small blue square" --count 4 --seed 7 --out square.png
      lavit generate "a green star" --guidance 4 --steps 50
    """,
  )
  common.add_model(parser)
  parser.add_argument("prompts", nargs="+", metavar="PROMPT")
  parser.add_argument(
    "--count", type=int, default=1, metavar="N", help="drawings a prompt (1)"
  )
  _add_drawing(parser, "generated.png")
  _add_guidance(parser)


def _generate(args: argparse.Namespace) -> None:
  if args.count < 1:
    raise errors.UsageError(f"--count {args.count}: expected 1 or more.")
  prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
  paths = common.outputs(args.out, len(prompts))
  pictures = common.load(args).generate(
    prompts, **common.given(args, *_DRAWING)
  )
  common.save(pictures, paths)
  rows = [
    {"prompt": prompt, "file": str(path)}
    for prompt, path in zip(prompts, paths, strict=True)
  ]
  common.print_answer(args, rows, [str(path) for path in paths])


def _add_synthesize(subparsers) -> None:
  parser = common.command(
    subparsers,
    "synthesize",
    _synthesize,
    "draw a picture from texts and pictures in order",
    """\
    examples:
      lavit synthesize photo.png "make the large circle red" --out edited.png

    A part that is a file, or ends as a picture's name does, is a picture;
    every other part is text.
    """,
  )
  common.add_model(parser)
  parser.add_argument("parts", nargs="+", metavar="PART")
  _add_drawing(parser, "synthesized.png")
  _add_guidance(parser)


def _synthesize(args: argparse.Namespace) -> None:
  pictures = [
    os.path.isfile(part) or part.lower().endswith(common.SUFFIXES)
    for part in args.parts
  ]
  pairs = list(zip(args.parts, pictures, strict=True))
  common.require_files([part for part, picture in pairs if picture])
  paths = common.outputs(args.out, 1)
  from lavit_jax import images

  parts = [images.load(part) if picture else part for part, picture in pairs]
  drawing = common.load(args).synthesize(parts, **common.given(args, *_DRAWING))
  common.save([drawing], paths)
  common.print_answer(args, {"parts": args.parts, "file": args.out}, [args.out])


def _add_reconstruct(subparsers) -> None:
  parser = common.command(
    subparsers,
    "reconstruct",
    _reconstruct,
    "draw pictures again from their visual tokens alone",
    """\
    examples:
      lavit reconstruct photo.jpg --out again.png
      lavit reconstruct *.jpg --out again.png      again_0.png, again_1.png, ...
    """,
  )
  common.add_model(parser)
  common.add_images(parser)
  _add_drawing(parser, "reconstructed.png")


def _reconstruct(args: argparse.Namespace) -> None:
  common.require_files(args.images)
  paths = common.outputs(args.out, len(args.images))
  pictures = common.load(args).reconstruct(
    args.images, **common.given(args, *_DRAWING)
  )
  common.save(pictures, paths)
  rows = [
    {"image": image, "file": str(path)}
    for image, path in zip(args.images, paths, strict=True)
  ]
  common.print_answer(args, rows, [str(path) for path in paths])
