"""The import plan of a checkpoint in the layout of `rain1011/LaVIT-7B-v2`.

  encoder    visual_tokenizer/eva_vitg_psz14.bin
  tokenizer  visual_tokenizer/tokenizer_encoder.bin
  lowres     visual_tokenizer/tokenizer_decoder.bin
  highres    visual_tokenizer/highres_tokenizer_decoder.bin
  llm        language_model/, see `official_llm.py`
  lowres_pixels, highres_pixels   see `pixel_folders.py`
  safety     see `safety_folder.py`

The last three may be missing. The tokenizer's file may repeat the encoder under
`encoder.`: equal copies are ignored, others are an error. The id of [IMG] is
always 32000.
"""

import pathlib
from collections.abc import Collection

from lavit_jax.port.formats import official_layout
from lavit_jax.port.reading import (
  official_files,
  official_llm,
  official_visual,
  pixel_folders,
  plan,
  safety_folder,
)
from lavit_jax.port.tables import names, rows

_TABLES = {
  "encoder": names.ENCODER,
  "tokenizer": names.TOKENIZER,
  **names.SEMANTIC_DECODERS,
  "llm": names.LLM + names.UNDERSTANDING + names.UNDERSTANDING_SELECTOR,
}


def make_plan(
  folder: pathlib.Path,
  only: Collection[str] | None = None,
  *,
  heads: int | None = None,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """Checks a directory, all files at once, and plans its import.

  Args:
    folder: in the layout above.
    only: some of `official_layout.ALL_PARTS`; None for PARTS, and those of the
      others that are there.
    heads: attention heads of the visual networks; None for the number in
      variant_config.json, in the folder or its parent, else 16.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: anything is missing, not used, or does not fit.
    errors.UsageError: heads or names are impossible.
  """
  parts = only or _present_parts(folder)
  problems = plan.Problems(str(folder))
  _check_files(folder, parts, problems)
  files = official_files.OfficialFiles(folder, parts, heads, allow, problems)
  pixel_readers = [
    pixel_folders.Reader(folder / name, name, part, part == "lowres_pixels")
    for part, name in official_layout.PIXEL_FOLDERS.items()
    if part in parts
  ]
  plan.check_allowed(allow, _tables(parts, pixel_readers))
  planned = [
    *_core_parts(files, parts),
    *(_pixel_part(files, reader) for reader in pixel_readers),
  ]
  if official_layout.SAFETY_PART in parts:
    planned.append(_safety_part(files))
  complete = [part for part in planned if part is not None]
  pixel_folders.check_conditions(
    {part.name: part for part in complete}, problems
  )
  problems.check()
  return plan.ImportPlan(
    source=official_files.SOURCE,
    parts=tuple(complete),
    files=files.small,
    kept=files.kept,
    notes=tuple(files.notes),
  )


def _present_parts(folder) -> tuple[str, ...]:
  parts = (*official_layout.PARTS, *pixel_folders.present(folder))
  if safety_folder.find(folder):
    parts = (*parts, official_layout.SAFETY_PART)
  return parts


def _check_files(folder, parts, problems):
  """Raises CheckpointError if files of the parts are missing."""
  needed = {
    official_layout.FILES[file]
    for part in parts
    for file in official_layout.FILES_OF_PART.get(part, ())
  }
  expected = sorted(needed)
  if "llm" in parts:
    llm = official_layout.LLM_FOLDER
    expected.append(f"{llm}/config.json")
    expected.append(f"{llm}/{official_layout.TOKENIZER_MODEL}")
  missing = [file for file in expected if not (folder / file).is_file()]
  for part, name in official_layout.PIXEL_FOLDERS.items():
    if part in parts:
      missing += pixel_folders.missing(
        folder / name, name, with_uncond=part == "lowres_pixels"
      )
  if official_layout.SAFETY_PART in parts and not safety_folder.find(folder):
    missing.append(f"{safety_folder.NAME}/config.json")
  for file in missing:
    problems.add("missing file", file)
  problems.check()


def _tables(parts, pixel_readers) -> list[rows.Table]:
  """Returns the tables of all files that are imported."""
  tables = [_TABLES[part] for part in parts if part in _TABLES]
  return tables + [table for r in pixel_readers for table in r.tables]


def _core_parts(files, parts) -> list[plan.Part | None]:
  """Plans those of `official_layout.PARTS` that are imported."""
  visual = official_visual.VisualReader(files)
  readers = {
    "encoder": visual.encoder,
    "tokenizer": visual.tokenizer,
    "lowres": visual.lowres,
    "highres": visual.highres,
    "llm": lambda: official_llm.read(files, visual),
  }
  return [read() for part, read in readers.items() if part in parts]


def _pixel_part(files, reader) -> plan.Part | None:
  part = reader.read(files.problems, files.allow)
  name = official_layout.PIXEL_FOLDERS[part.name]
  _keep_small_files(files, name, reader.small_files())
  files.notes += reader.notes()
  return official_files.part_of(part.name, part.arrays, part.meta)


def _safety_part(files) -> plan.Part | None:
  folder = safety_folder.find(files.folder)
  assert folder is not None  # `_check_files` has found it
  part, contents = safety_folder.read(
    files.folder, folder, files.problems, files.allow
  )
  _keep_small_files(files, folder, contents)
  return official_files.part_of(part.name, part.arrays, part.meta)


def _keep_small_files(files, folder, contents):
  root = f"{official_layout.KEPT_FOLDER}/{folder}"
  files.small |= {f"{root}/{name}": data for name, data in contents.items()}
