"""The commands for data: `lavit data show`, `check`, `prepare`, `bench`."""

import argparse
import functools
import json
import os
import pathlib
from typing import Any

from etils import epy

from lavit_jax.commands import common
from lavit_jax.core import errors
from lavit_jax.core.storage import files

with epy.lazy_imports():
  from lavit_jax.data import faults
  from lavit_jax.jobs import bench, check, data_page, downloads
  from lavit_jax.jobs.prepare import job
  from lavit_jax.jobs.prepare import plan as plan_lib

_SOURCES = """\
    SRC is a file of JSON lines, tar archives of WebDataset or img2dataset,
    Parquet files, a folder of `datasets`, a folder of images, or what `lavit
    data prepare` wrote; one file, a folder, or a pattern in quotes:
    'web/{00000..00331}.tar'. See docs/data.md.
"""


def add(subparsers: Any) -> None:
  """Adds the command of this file to the parser of `lavit`."""
  parser = subparsers.add_parser(
    "data",
    help="look at data, check them, prepare them for training",
    description="Looks at data, checks them, prepares them for training.",
    formatter_class=common.FORMATTER,
  )
  actions = parser.add_subparsers(
    title="actions", metavar="ACTION", required=True
  )
  _add_show(actions)
  _add_check(actions)
  _add_prepare(actions)
  _add_bench(actions)


def _add_source(parser, workers="processes (as many as there are cores)"):
  parser.add_argument("data", metavar="SRC")
  common.add_data_fields(parser)
  parser.add_argument(
    "--workers",
    type=common.integer(0),
    default=0,
    metavar="N",
    help=workers,
  )


def _add_show(actions):
  parser = common.command(
    actions,
    "show",
    _show,
    "write a page about data: samples, sizes, lengths, what is bad",
    _SOURCES
    + """
    example:
      lavit data show my.jsonl --html my_data.html
    """,
  )
  _add_source(parser)
  parser.add_argument(
    "--html", required=True, metavar="FILE", help="the page to write"
  )


def _add_check(actions):
  parser = common.command(
    actions,
    "check",
    _check,
    "decode every image, count what is bad, and why",
    _SOURCES
    + """
    Exit status 1 if more images or lines are bad than --limit-share allows, or
    a file of prepared data has changed.

    examples:
      lavit data check 'cc3m/{00000..00331}.tar' --bad bad.jsonl
      lavit data check cc3m --retry-list retry.jsonl   of img2dataset's output
    """,
  )
  _add_source(parser)
  parser.add_argument(
    "--bad", metavar="FILE", help="write a JSON line for each that is bad"
  )
  parser.add_argument(
    "--retry-list",
    metavar="FILE",
    help="write the addresses that img2dataset could not download, as .txt or"
    " .jsonl, for its next run",
  )


def _add_prepare(actions):
  parser = common.command(
    actions,
    "prepare",
    _prepare,
    "write any data as shards of ArrayRecord, without bad ones",
    _SOURCES
    + """
    DST appears when all of it is written; interrupted, the same command goes
    on. It is read as SRC of every command, and by config.data.kind=arrayrecord.

    examples:
      lavit data prepare 'web/*.tar' prepared/web --duplicates near
      lavit data prepare my_dataset prepared/mine --side 256 --license "CC BY"
    """,
  )
  _add_source(parser)
  parser.add_argument("out", metavar="DST")
  parser.add_argument(
    "--side",
    type=common.integer(0, 1 << 16),
    default=0,
    metavar="N",
    help="reduce images whose shorter side is longer than N pixels to it; 0"
    " leaves all images as they are (0)",
  )
  parser.add_argument(
    "--quality",
    type=common.integer(1, 100),
    default=95,
    metavar="Q",
    help="of the JPEGs that --side makes (95)",
  )
  parser.add_argument(
    "--duplicates",
    choices=("keep", "exact", "near"),
    default="keep",
    help="keep all (the default); or of images with the same bytes, or that"
    " look alike, only the first, with the captions of all",
  )
  parser.add_argument(
    "--distance",
    type=common.integer(0, 3),
    default=0,
    metavar="N",
    help="bits of their hashes in which images may differ that look alike (0)",
  )
  for name, meaning in (
    ("min-side", "leave out images with a shorter side, in pixels"),
    ("max-aspect", "leave out images that are longer for their width"),
    ("min-chars", "leave out captions and texts with fewer characters"),
    ("max-chars", "leave out captions and texts with more"),
  ):
    parser.add_argument(
      f"--{name}", type=common.number, metavar="N", help=meaning
    )
  parser.add_argument(
    "--script", metavar="NAME", help="keep texts in a script, such as latin"
  )
  parser.add_argument(
    "--license", default="", metavar="TEXT", help="note for the manifest"
  )


def _add_bench(actions):
  parser = common.command(
    actions,
    "bench",
    _bench,
    "measure how fast data become batches of images",
    _SOURCES
    + """
    "alone" is one core that does nothing but read, decode and resize. Try other
    numbers until training does not wait; --config.data has the same fields.

    example:
      lavit data bench 'web/*.tar' --workers 8 --threads 16 --decoding fast
    """,
  )
  _add_source(parser, "processes that decode; 0: the threads do (0)")
  for name, default, meaning in (
    ("threads", 2, "that read images and make batches (2)"),
    ("batch", 64, "images (64)"),
    ("image-size", 224, "pixels of a side (224)"),
  ):
    parser.add_argument(
      f"--{name}",
      type=common.integer(1),
      default=default,
      metavar="N",
      help=meaning,
    )
  parser.add_argument(
    "--decoding",
    choices=("exact", "fast"),
    default="exact",
    help="as the official code, or faster (exact)",
  )
  parser.add_argument(
    "--seconds",
    type=common.positive,
    default=10.0,
    metavar="S",
    help="how long it is measured (10)",
  )


def _bench(args: argparse.Namespace) -> None:
  common.require_data(args.data)
  found = bench.measure(
    args.data,
    fields=common.data_fields(args)
    | {
      "image_size": args.image_size,
      "workers": args.workers,
      "decoding": args.decoding,
    },
    seconds=args.seconds,
    batch_size=args.batch,
    threads=args.threads,
  )
  lines = [
    f"{found['name']}: {found['images_per_second']:,g} images a second with"
    f" {found['workers']} processes and {found['threads']} threads",
    f"  {found['of_alone']:.2f} x one core that only decodes"
    f" ({found['alone']:,g} a second)",
    f"  {found['cores']:g} cores of this process; it had {found['memory']} MiB"
    " at the most",
  ]
  if found["bad"]:
    lines.append(f"  {found['bad']} images were bad: lavit data check")
  common.print_answer(args, found, lines)


_SETTINGS = ("side", "quality", "duplicates", "distance", "license")
_FILTERS = ("min_side", "max_aspect", "min_chars", "max_chars", "script")


def _prepare(args: argparse.Namespace) -> None:
  files.require_local(args.out, "prepared data")
  common.require_output_folder(args.out, "DST")
  common.require_data(args.data)
  settings = plan_lib.Settings(**common.chosen(args, *_SETTINGS))
  filters = common.chosen(args, *_FILTERS)
  manifest = job.prepare(
    args.data,
    args.out,
    settings=settings,
    fields=common.data_fields(args) | ({"filters": filters} if filters else {}),
    workers=args.workers,
    quiet=args.json,
  )
  left = sum(manifest["left_out"].values())
  listed = [f"  {count:,} {why}" for why, count in manifest["left_out"].items()]
  task = "".join(f", {n:,} {t}" for t, n in manifest["examples"].items())
  shards = sum(map(len, manifest["shards"].values()))
  lines = [
    f"{manifest['images']:,} images, {manifest['captions']:,} captions{task}"
    f" in {shards} shards, {manifest['bytes'] / 1e6:,.1f} MB: {args.out}",
    *([f"left out: {left:,}", *listed] if left else []),
  ]
  bad = pathlib.Path(args.out) / "bad.jsonl"
  if bad.exists():
    lines.append(f"Each image that cannot be read is in {bad}.")
  lines.append(
    "Train with --config.data.kind=arrayrecord"
    f" --config.data.path={os.fspath(args.out)}"
  )
  common.print_answer(args, manifest, lines)


_LISTS = {"bad": {"name", "reason"}, "retry_list": {"url", "caption"}}


def _is_list(keys, line) -> bool:
  """Whether a line is one of those that `--bad` or `--retry-list` write."""
  try:
    found = json.loads(line)
  except ValueError:
    return "url" in keys and line.startswith(("http://", "https://"))
  return isinstance(found, dict) and set(found) == keys


def _check(args: argparse.Namespace) -> int:
  common.require_data(args.data)
  for option, keys in _LISTS.items():
    path = getattr(args, option)
    if path is not None:
      flag = f"--{option.replace('_', '-')}"
      common.require_report(path, flag, functools.partial(_is_list, keys))
  fields = common.data_fields(args)
  limit = fields.pop("limit_share", faults.LIMIT_SHARE)
  found = check.check(
    args.data, fields=fields, workers=args.workers, quiet=args.json
  )
  summary = found.summary()
  lines = _lines(found, summary)
  _add_downloads(args, found, summary, lines)
  if args.bad:
    check.write_lines(args.bad, [*found.lines, *found.bad])
    lines.append(f"Each bad image is in {args.bad}.")
  bad = (
    len(found.bad) > limit * max(summary["images"], 1)
    or found.left_out > limit * max(found.seen, 1)
    or bool(found.checksums)
  )
  summary["passed"] = not bad
  lines.append(
    "Too much is bad: see above." if bad else "These data can be trained on."
  )
  common.print_answer(args, summary, lines)
  return int(bad)


def _lines(found, summary) -> list[str]:
  """Returns what was found as lines for people."""
  tasks = ", ".join(f"{n:,} {t}" for t, n in summary["examples"].items())
  lines = [
    f"{summary['name']}: {summary['images']:,} images"
    f" ({summary['bytes'] / 1e6:,.1f} MB); {tasks or 'no words'}"
  ]
  for name in ("shorter_side", "aspect"):
    if side := summary[name]:
      shown = ", ".join(f"{side[n]:g}" for n in ("least", "median", "most"))
      lines.append(f"  {name.replace('_', ' ')}: {shown} (least, median, most)")
  lines += [f"  {said}" for said in summary["checksums"]]
  if found.left_out:
    lines.append(f"bad lines: {found.left_out:,} of {found.seen:,}, such as")
    lines += [f"  {name}: {reason}" for name, reason in found.lines[:5]]
  if found.bad:
    lines.append(f"bad images: {len(found.bad):,} of {summary['images']:,}")
    lines += [f"  {n:,} {why}" for why, n in summary["reasons"].items()]
    lines += [f"  such as {reason}" for _, reason in found.bad[:3]]
  if summary["exact_duplicates"]:
    lines.append(
      f"{summary['exact_duplicates']:,} exact duplicates, and"
      f" {summary['near_duplicates']:,} near-duplicates: lavit data prepare"
      " --duplicates leaves them out."
    )
  return lines


def _add_downloads(args, found, summary, lines) -> None:
  """Adds what img2dataset says of downloads, and writes those that failed."""
  archives = hasattr(found.source, "archives")
  tables = downloads.beside(args.data) if archives else []
  if not tables:
    if args.retry_list:
      raise errors.UsageError(
        f"--retry-list needs the tables of img2dataset, and there is none"
        f" beside the archives of {args.data} (00000.parquet by 00000.tar)."
      )
    return
  summary["downloads"] = downloads.counts(downloads.rows(tables))
  lines.append("downloads, as img2dataset counted them:")
  lines += [f"  {n:,} {status}" for status, n in summary["downloads"].items()]
  if args.retry_list:
    count = downloads.write_retries(args.retry_list, downloads.rows(tables))
    lines.append(f"{count:,} addresses to try again: {args.retry_list}")


def _show(args: argparse.Namespace) -> None:
  common.require_data(args.data)
  common.require_report(args.html, "--html", common.is_page)
  found = check.check(
    args.data,
    fields=common.data_fields(args),
    workers=args.workers,
    quiet=args.json,
  )
  path = data_page.write(found, args.html)
  common.print_answer(
    args, found.summary(), [*_lines(found, found.summary()), f"page: {path}"]
  )
