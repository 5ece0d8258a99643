"""The commands that read images: `tokenize`, `caption`, `answer`."""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from etils import epy

from lavit_jax.commands import caches, common
from lavit_jax.core import errors
from lavit_jax.core.storage import files

with epy.lazy_imports():
  from lavit_jax.core import image_io
  from lavit_jax.evaluate.report import figures
  from lavit_jax.infer import pipeline
  from lavit_jax.jobs import tokenize as tokenize_job


def add(subparsers: Any) -> None:
  """Adds the commands of this file to the parser of `lavit`."""
  _add_tokenize(subparsers)
  _add_caption(subparsers)
  _add_answer(subparsers)


def _add_tokenize(subparsers) -> None:
  """Adds `lavit tokenize`, of images and of datasets."""
  parser = common.command(
    subparsers,
    "tokenize",
    _tokenize,
    "turn images, or a dataset for training, into visual tokens",
    """\
    examples:
      lavit tokenize photo.jpg                       prints its visual tokens
      lavit tokenize *.jpg --overlay kept.png        draws the kept patches
      lavit tokenize --data my.jsonl --out codes     caches for training,
                                                     codes/train, codes/held_out
    """,
    compiles=True,
  )
  common.add_model(parser)
  common.add_images(parser, nargs="*")
  parser.add_argument(
    "--overlay", metavar="FILE", help="draw the kept and dropped patches"
  )
  parser.add_argument(
    "--seed",
    type=common.SEED,
    metavar="N",
    help="sample the patches that are kept",
  )
  parser.add_argument(
    "--budget",
    type=common.integer(1),
    metavar="K",
    help="keep exactly K patches per image",
  )
  parser.add_argument(
    "--data",
    metavar="X",
    help="what lavit data check takes (docs/data.md), or shapes",
  )
  parser.add_argument(
    "--held-out",
    metavar="FILE",
    help="with --data: the held-out images; by default a tenth of X, by hash",
  )
  parser.add_argument(
    "--out",
    metavar="DIR",
    help="with --data: caches go to DIR/train and DIR/held_out",
  )
  parser.add_argument(
    "--split",
    metavar="NAME",
    choices=caches.SPLITS,
    help="with --data: that split alone, to DIR itself",
  )
  parser.add_argument(
    "--part",
    type=caches.part,
    metavar="I/N",
    help="with --data: write every Nth shard, from the Ith on (1/N to N/N); the"
    " processes share --out, and 1/N completes it. Processes that their"
    " environment joins, as on a pod, share the work without it",
  )
  parser.add_argument(
    "--html",
    metavar="FILE",
    help="with --data: write a page about the tokens: how many, which, of what",
  )
  common.add_data_fields(parser)


def _tokenize(args: argparse.Namespace) -> None:
  image_options = common.chosen(args, "seed", "budget", "overlay")
  data_options = common.chosen(
    args, "data", "split", "out", "held_out", "part", "html"
  )
  common.data_fields(args)
  if args.images and not data_options:
    _tokenize_images(args)
  elif args.data and args.out and not (args.images or image_options):
    _tokenize_data(args)
  else:
    raise errors.UsageError(
      "tokenize takes either images (lavit tokenize IMAGE ... [--overlay"
      " FILE] [--seed N] [--budget K]) or a dataset (lavit tokenize --data X"
      " --out DIR [--held-out FILE] [--split NAME])."
    )


def _tokenize_data(args: argparse.Namespace) -> None:
  for data in (args.data, args.held_out):
    if data and data != "shapes":
      common.require_data(data)
  if args.data == "shapes" and args.held_out:
    raise errors.UsageError(
      "--held-out goes with --data FILE: shapes have held-out scenes of their"
      " own."
    )
  caches.check_out(args.out, args.split)
  if args.html is not None:
    _require_page(args)
  common.keep_programs(args)
  model, held_out = pipeline.resolve(args.model), args.held_out or ""
  write: Callable[..., dict[str, Any]] = tokenize_job.write_caches
  if args.split:
    write = functools.partial(tokenize_job.write_cache, split=args.split)
  summary = write(
    model,
    args.data,
    args.out,
    held_out=held_out,
    fields=common.data_fields(args),
    **caches.shared_by(args.part),
    **({"page": args.html} if args.html else {}),
  )
  fields = ("cache_dir", "held_out_cache_dir")
  more = {"held_out_path": args.held_out}
  caches.show(summary, args.split, args.json, fields, more)


def _require_page(args: argparse.Namespace) -> None:
  if args.part and args.part[0]:
    raise errors.UsageError(
      "--html goes with the first part, which completes the cache: --part"
      f" 1/{args.part[1]}."
    )
  page, out = pathlib.Path(args.html).absolute(), pathlib.Path(args.out)
  if out.absolute() in (page, *page.parents):
    raise errors.UsageError(
      f"--html {args.html} is in --out {args.out}, the folder of the caches."
      " Give another name."
    )
  common.require_report(args.html, "--html", common.is_page)


def _tokenize_images(args: argparse.Namespace) -> None:
  common.require_files(args.images, several=True)
  overlay = []
  if args.overlay:
    overlay = common.outputs(args.overlay, 1, args.images, "--overlay")
  common.note_scenes(args, args.images)
  rows: list[dict[str, Any]] = []
  options = common.chosen(args, "seed", "budget")
  lavit = common.load(args, images=len(args.images))
  tokens: Any = lavit.tokenize(args.images, **options)
  for path, token in zip(args.images, tokens, strict=True):
    keep, codes = ([int(v) for v in token[name]] for name in ("keep", "codes"))
    rows.append({"image": path, "keep": keep, "codes": codes})
  if overlay:
    common.save([_overlay_sheet(rows)], overlay)
  lines = [
    f"{row['image']}: {sum(row['keep'])} of {len(row['keep'])} patches kept,"
    f" codes {' '.join(map(str, row['codes']))}"
    for row in rows
  ]
  common.print_answer(args, rows, lines)


def _overlay_sheet(rows: Sequence[dict[str, Any]]):
  """Returns one PIL image of all masks, with names below if there are several.

  Args:
    rows: a dict for each image: `image`, its file, and `keep`, int[N].
  """
  size = 480 if len(rows) == 1 else 240
  masks = [
    figures.overlay_mask(image_io.load(row["image"]), row["keep"], size=size)
    for row in rows
  ]
  if len(masks) == 1:
    return masks[0]
  labels = [
    f"{os.path.basename(row['image'])}: {sum(row['keep'])} kept" for row in rows
  ]
  return figures.contact_sheet(masks, labels, cell=size)


def _add_caption(subparsers) -> None:
  parser = common.command(
    subparsers,
    "caption",
    _caption,
    "describe images",
    """\
    examples:
      lavit caption photo.jpg
      lavit caption *.png --json
      lavit caption photo.jpg --prompt "a photo of" --beams 5
      lavit caption photo.jpg --beams 5 --count 3    the best three, scored
    """,
    compiles=True,
  )
  common.add_model(parser)
  common.add_images(parser)
  parser.add_argument(
    "--prompt", metavar="TEXT", help="how every caption begins"
  )
  parser.add_argument(
    "--count",
    type=common.integer(1),
    metavar="N",
    help="print the N best texts of the beams, uncut, with their scores",
  )
  common.add_writing(parser)


def _caption(args: argparse.Namespace) -> None:
  common.require_files(args.images, several=True)
  common.require_text("--prompt", [args.prompt or ""], "Give words.")
  common.note_scenes(args, args.images)
  lavit = common.load(args, images=len(args.images))
  options = common.chosen(args, *common.WRITING)
  if args.count is not None:
    _caption_scored(args, lavit, options)
    return
  options |= common.chosen(args, "prompt")
  captions = lavit.caption(args.images, **options)
  rows = [
    {"image": path, "caption": caption}
    for path, caption in zip(args.images, captions, strict=True)
  ]
  alone = len(rows) == 1
  lines = [
    row["caption"] if alone else f"{row['image']}: {row['caption']}"
    for row in rows
  ]
  common.print_answer(args, rows, lines)


def _caption_scored(args, lavit, options) -> None:
  """Prints several texts for each image, the best first."""
  prefix = [args.prompt] if args.prompt else []
  prompts = [[files.input_path(path), *prefix] for path in args.images]
  texts_by_image = lavit.write(prompts, count=args.count, **options)
  rows = [
    {"image": path, "texts": [dataclasses.asdict(text) for text in texts]}
    for path, texts in zip(args.images, texts_by_image, strict=True)
  ]
  lines = [
    f"{row['image']}: {text['score']:.4f} {text['text']}"
    for row in rows
    for text in row["texts"]
  ]
  common.print_answer(args, rows, lines)


def _add_answer(subparsers) -> None:
  parser = common.command(
    subparsers,
    "answer",
    _answer,
    "answer questions about an image",
    """\
    examples:
      lavit answer photo.jpg "What color is the circle?"
      lavit answer photo.jpg "How many objects are there?" "Is one red?" --json
      lavit answer photo.jpg "What does the label say?" --answerable-first
    """,
    compiles=True,
  )
  common.add_model(parser)
  parser.add_argument("image", metavar="IMAGE", help="an image file")
  parser.add_argument("questions", nargs="+", metavar="QUESTION")
  parser.add_argument(
    "--answerable-first",
    action="store_true",
    default=None,
    help="ask first whether a question can be answered (VizWiz); if not, the"
    " answer is 'unanswerable'",
  )
  parser.add_argument(
    "--lemmatize",
    action="store_true",
    default=None,
    help="give words in their base form (needs the extra 'eval')",
  )
  common.add_writing(parser)


def _answer(args: argparse.Namespace) -> None:
  common.require_files([args.image])
  hint = "The command takes one image: lavit answer IMAGE QUESTION ..."
  common.require_text("a question", args.questions, hint)
  if not all(question.strip() for question in args.questions):
    raise errors.UsageError(f"A question is empty: {args.questions}. {hint}")
  common.note_scenes(args, [args.image])
  names = ("answerable_first", "lemmatize", *common.WRITING)
  options = common.chosen(args, *names)
  lavit = common.load(args, images=len(args.questions))
  answers = lavit.answer(args.image, args.questions, **options)
  rows = [
    {"image": args.image, "question": question, "answer": answer}
    for question, answer in zip(args.questions, answers, strict=True)
  ]
  alone = len(rows) == 1
  lines = [
    row["answer"] if alone else f"{row['question']} {row['answer']}"
    for row in rows
  ]
  common.print_answer(args, rows, lines)
