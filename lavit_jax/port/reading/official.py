"""A directory in the layout of `rain1011/LaVIT-7B-v2`, as a plan of import.

Parts and the files they are made of:

  encoder    visual_tokenizer/eva_vitg_psz14.bin
  tokenizer  visual_tokenizer/tokenizer_encoder.bin
  lowres     visual_tokenizer/tokenizer_decoder.bin
  highres    visual_tokenizer/highres_tokenizer_decoder.bin
  llm        language_model/ (weights, config.json, tokenizer.model), and the
             branch that reads images: visual_weight.bin, which may hold any
             of the tokenizer's tensors, laid over tokenizer_encoder.bin

  lowres_pixels, highres_pixels   see `pixel_folders.py`
  safety                          see `safety_folder.py`; these folders may be
                                  missing, and all the rest is still whole

The tokenizer file may repeat the encoder under `encoder.`: copies that are
equal are passed over, others are an error. [IMG] is 32000 always.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Collection
from typing import Any

from lavit_jax.core import errors, vocabulary
from lavit_jax.infer.pixels import latent_space
from lavit_jax.models import llama
from lavit_jax.port.formats import llama_config, llama_folder, tensors
from lavit_jax.port.reading import pixel_folders, plan, safety_folder
from lavit_jax.port.tables import names, sizes

SOURCE = "lavit"
TEXT_SIZE = 32000
PARTS = ("encoder", "tokenizer", "lowres", "highres", "llm")  # always there
ALL_PARTS = (*PARTS, *pixel_folders.FOLDERS, safety_folder.PART)
FILES = {
  "encoder": "visual_tokenizer/eva_vitg_psz14.bin",
  "tokenizer": "visual_tokenizer/tokenizer_encoder.bin",
  "lowres": "visual_tokenizer/tokenizer_decoder.bin",
  "highres": "visual_tokenizer/highres_tokenizer_decoder.bin",
  "overlay": "language_model/visual_weight.bin",
}
LLM_FOLDER = "language_model"
WORDS = "tokenizer.model"
OFFICIAL = "official"  # folder of a model directory: small files to give back
NEEDS = {
  "encoder": ("encoder",),
  "tokenizer": ("encoder", "tokenizer"),
  "lowres": ("lowres",),
  "highres": ("highres",),
  "llm": ("encoder", "tokenizer", "overlay"),
}
TABLES = {
  "encoder": names.ENCODER,
  "tokenizer": names.TOKENIZER,
  "lowres": names.LOWRES,
  "highres": names.HIGHRES,
  "llm": names.LLM + names.UNDERSTANDING + names.UNDERSTANDING_SELECTOR,
}
_COPY = "encoder."


def is_layout(folder: pathlib.Path) -> bool:
  """Whether a folder looks like the official layout."""
  places = ("visual_tokenizer", LLM_FOLDER, *pixel_folders.FOLDERS.values())
  return any((folder / name).is_dir() for name in places)


def make_plan(
  folder: pathlib.Path,
  only: Collection[str] | None = None,
  *,
  heads: int | None = None,
  allow: Collection[str] = (),
) -> plan.ImportPlan:
  """Checks a directory, all files at once, and says what to make of it.

  Args:
    folder: of the layout above.
    only: some of ALL_PARTS; None: PARTS, and those of the pixel folders that
      are there.
    heads: attention heads of the visual networks; None: of
      variant_config.json in the folder or its parent, else 16.
    allow: official names that may be missing.

  Raises:
    errors.CheckpointError: anything is missing, not used, or does not fit.
    errors.UsageError: heads or names that cannot be.
  """
  parts = only or (*PARTS, *pixel_folders.present(folder))
  if not only and safety_folder.find(folder):
    parts = (*parts, safety_folder.PART)
  reader = _Reader(folder, parts, heads, allow)
  plan.check_allowed(allow, reader.tables)
  made = [getattr(reader, part)() for part in PARTS if part in parts]
  made += [*reader.pixels(), *reader.safety()]
  made = [part for part in made if part is not None]
  pixel_folders.check_conditions({p.name: p for p in made}, reader.problems)
  reader.problems.check()
  return plan.ImportPlan(
    source=SOURCE,
    parts=tuple(made),
    files=reader.files,
    kept=reader.kept,
    notes=tuple(reader.notes),
  )


class _Reader:
  """The opened files and what was found out about them."""

  def __init__(self, folder, parts, heads, allow):
    self.folder = folder
    self.problems = plan.Problems(str(folder))
    self.kept: dict[str, dict[str, tensors.Tensor]] = {}
    self.files: dict[str, bytes] = {}
    self.notes: list[str] = []
    self._allow = allow
    self._parts = parts
    self._found = self._open(parts)
    self._pixels = [
      pixel_folders.Reader(folder / name, name, part, uncond)
      for name, uncond, part in pixel_folders.official_places(parts)
    ]
    self._heads, source = sizes.head_count(folder, heads)
    if self._found:
      self.notes.append(f"{self._heads} attention heads: {source}")
    self._shapes = {
      name: {n: t.shape for n, t in found.items()}
      for name, found in self._found.items()
    }
    self._check_heads(source)
    self._vit = self._sizes(
      "encoder", lambda s: sizes.vit(s, self._heads, with_head=True)
    )

  def _open(self, parts):
    needed = {file for p in parts for file in NEEDS.get(p, ())}
    for file in sorted(needed):
      if not (self.folder / FILES[file]).is_file():
        self.problems.add("missing file", FILES[file])
    for name, uncond, _ in pixel_folders.official_places(parts):
      place = self.folder / name
      for file in pixel_folders.missing(place, name, uncond):
        self.problems.add("missing file", file)
    if safety_folder.PART in parts and not safety_folder.find(self.folder):
      self.problems.add("missing file", f"{safety_folder.NAME}/config.json")
    if "llm" in parts:
      for file in (f"{LLM_FOLDER}/config.json", f"{LLM_FOLDER}/{WORDS}"):
        if not (self.folder / file).is_file():
          self.problems.add("missing file", file)
    self.problems.check()
    wanted = {f for f in FILES if f in needed}
    if "tokenizer" in parts:  # a decoder tells its own sizes, if it is there
      wanted |= {"lowres", "highres"}
    return {
      file: tensors.open_file(self.folder / FILES[file], FILES[file])
      for file in FILES
      if file in wanted and (self.folder / FILES[file]).is_file()
    }

  @property
  def tables(self) -> list[names.Table]:
    """Of all files that are imported."""
    found = [TABLES[part] for part in self._parts if part in TABLES]
    return found + [t for reader in self._pixels for t in reader.tables]

  def pixels(self) -> list[plan.Part]:
    """The parts of the pixel folders."""
    made = []
    for reader in self._pixels:
      part = reader.read(self.problems, self._allow)
      made.append(self._part(part.name, part.arrays, part.meta))
      place = f"{OFFICIAL}/{pixel_folders.FOLDERS[part.name]}"
      kept = reader.small_files()
      self.files |= {f"{place}/{path}": data for path, data in kept.items()}
      self.notes += reader.notes()
    return made

  def safety(self) -> list[plan.Part]:
    """The safety checker, if it is wanted."""
    if safety_folder.PART not in self._parts:
      return []
    place = safety_folder.find(self.folder)
    part, kept = safety_folder.read(
      self.folder, place, self.problems, self._allow
    )
    files = {f"{OFFICIAL}/{place}/{name}": kept[name] for name in kept}
    self.files |= files
    return [self._part(part.name, part.arrays, part.meta)]

  def _check_heads(self, source):
    for shapes in self._shapes.values():
      for name, shape in shapes.items():
        if name.endswith(("norm1.weight", "norm0.weight")) and len(shape) == 1:
          sizes.heads_fit(shape[0], self._heads, source)
          break

  def _sizes(self, file, infer):
    """What `infer` tells from the shapes of a file, None if it cannot."""
    if file not in self._shapes:
      return None
    try:
      return infer(self._shapes[file])
    except sizes.Unknown as e:
      self.problems.add("size that no tensor shows", f"{FILES[file]}: {e}")
      return None

  def _arrays(self, file, table, tree, **kwargs):
    return plan.arrays_of(
      table,
      self._found[file],
      tree,
      self.problems,
      label=FILES[file],
      allow=self._allow,
      **kwargs,
    )

  def _part(self, name, arrays, meta, **port):
    if meta is None:
      return None
    port = {"source": SOURCE, **meta.get("port", {}), **port}
    return plan.Part(name, tuple(arrays), meta | {"port": port})

  def encoder(self):
    """Part `encoder`."""
    tree = self._vit and sizes.abstract_encoder(self._vit)
    arrays = self._arrays("encoder", names.ENCODER, tree)
    meta = self._vit and {"vit": dataclasses.asdict(self._vit)}
    return self._part("encoder", arrays, meta)

  def _decoder(self, name, table, infer):
    meta = self._sizes(name, lambda shapes: infer(shapes, self._heads))
    tree = meta and sizes.abstract_decoder(latent_space.semantic(name, meta))
    return self._part(name, self._arrays(name, table, tree), meta)

  def lowres(self):
    """Part `lowres`."""
    return self._decoder("lowres", names.LOWRES, sizes.lowres_meta)

  def highres(self):
    """Part `highres`."""
    return self._decoder("highres", names.HIGHRES, sizes.highres_meta)

  def _tokenizer_config(self):
    decoder = None
    for name, table in (("lowres", names.LOWRES), ("highres", names.HIGHRES)):
      decoder = decoder or self._sizes(
        name, lambda s, t=table: sizes.semantic_decoder(s, t, self._heads)
      )
    if self._vit is None:
      return None
    try:
      return self._sizes(
        "tokenizer",
        lambda s: sizes.visual_tokenizer(s, self._vit, self._heads, decoder),
      )
    except errors.ConfigError as e:
      raise errors.CheckpointError(
        f"The files of {self.folder} do not belong to one model: {e}"
      ) from e

  @functools.cached_property
  def _abstract_tokenizer(self):
    """(config, abstract variables less the decoder), or None twice."""
    config = self._tokenizer_config()
    if config is None:
      return None, None
    tree = sizes.abstract_tokenizer(config)
    tree["params"].pop("decoder")
    return config, tree

  def tokenizer(self):
    """Part `tokenizer`."""
    config, tree = self._abstract_tokenizer
    arrays = self._arrays("tokenizer", names.TOKENIZER, tree)
    copies = self._copies("tokenizer")
    meta = config and {"tokenizer": dataclasses.asdict(config)}
    return self._part("tokenizer", arrays, meta, encoder_copies=copies)

  def _copies(self, file):
    """Names `encoder.*` of a file, all equal to the encoder's own tensors."""
    found = [n for n in self._found[file] if n.startswith(_COPY)]
    for name in found:
      copy = self._found[file][name]
      original = self._found["encoder"].get(name.removeprefix(_COPY))
      if original is None:
        self.problems.add("not used", f"{FILES[file]}: {name}")
      elif not tensors.same(copy, original):
        self.problems.add(
          f"differs from {FILES['encoder']}", f"{FILES[file]}: {name}"
        )
      elif copy.dtype != original.dtype:
        part = "llm" if file == "overlay" else file
        self._keep(part, FILES[file], copy)
    return found

  def _keep(self, part, file, tensor):
    self.kept.setdefault(part, {})[f"{file}:{tensor.name}"] = tensor

  def llm(self):
    """Part `llm`: the language model and the branch that reads images."""
    weights = tensors.open_shards(self.folder / LLM_FOLDER, LLM_FOLDER)
    label = f"{LLM_FOLDER}/config.json"
    told = llama_config.read(self.folder / label, label)
    self.notes += told.notes
    if told.tied:
      llama_folder.tie(weights, LLM_FOLDER)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    codes = self._sizes("tokenizer", sizes.num_codes)
    config = self._llama_config(told, shapes, codes)
    tree = config and sizes.abstract_llama(config)
    arrays = plan.arrays_of(
      names.LLM,
      weights,
      tree,
      self.problems,
      label=LLM_FOLDER,
      rows=config and config.vocab_size,
      allow=self._allow,
      ours=lambda path: f"llm/{path}",
    )
    for name, tensor in weights.items():
      if names.is_unused(names.LLM, name):
        self._keep("llm", LLM_FOLDER, tensor)
    arrays += self._understanding(config)
    meta = None
    if config and codes and self._vit:
      words = vocabulary.Vocabulary(TEXT_SIZE, codes)
      meta = {
        "llama": dataclasses.asdict(config),
        "vocabulary": dataclasses.asdict(words),
        "capacity": self._vit.num_patches,
      }
    self._take_small_files()
    overlay = list(self._found["overlay"])
    return self._part("llm", arrays, meta, overlay=overlay)

  def _llama_config(self, told, shapes, codes):
    shape = shapes.get(llama_folder.EMBEDDING)
    if shape is None or len(shape) != 2:
      self.problems.add(
        "size that no tensor shows", f"{LLM_FOLDER}: rows of the vocabulary"
      )
      return None
    if not codes:
      return None
    needed = vocabulary.Vocabulary(TEXT_SIZE, codes).size
    needed = max(needed, told.vocab_size or 0)
    if shape[0] < needed:
      raise errors.CheckpointError(
        f"{LLM_FOLDER} has a vocabulary of {shape[0]} rows; {TEXT_SIZE} text"
        f" pieces, two image marks, {codes} codes of"
        f" {FILES['tokenizer']}, and vocab_size in config.json"
        f" ({told.vocab_size}) need at least {needed}. The language"
        " model and the tokenizer are not of one checkpoint."
      )
    return llama.LlamaConfig(vocab_size=shape[0], **told.fields)

  def _understanding(self, config):
    """Arrays of the overlay laid over the tokenizer, tensor by tensor."""
    table, overlay = names.UNDERSTANDING, self._found["overlay"]
    known = names.depth_of(names.TOKENIZER, self._found["tokenizer"])
    if any(name.startswith("token_predictor.") for name in overlay):
      table = table + names.UNDERSTANDING_SELECTOR
    official = {n for r in table for n in names.names_of(r, known)}
    base = {n: t for n, t in self._found["tokenizer"].items() if n in official}
    laid = base | {n: t for n, t in overlay.items() if n in official}
    _, tree = self._abstract_tokenizer
    self._check_rest(overlay, official, tree, config)
    return plan.arrays_of(
      table,
      laid,
      tree and _understanding_tree(tree, table),
      self.problems,
      label=f"{FILES['overlay']} over {FILES['tokenizer']}",
      allow=self._allow,
    )

  def _check_rest(self, overlay, official, tree, config):
    """Overlay tensors that reading does not need: known, kept for export."""
    copies = self._copies("overlay")
    wanted = tree and {
      name: value.shape
      for name, value in names.to_official(names.TOKENIZER, tree).items()
    }
    for name, tensor in overlay.items():
      if name in official or name in copies or wanted is None:
        continue
      if name not in wanted:
        self.problems.add("not used", f"{FILES['overlay']}: {name}")
        continue
      if tensor.shape != wanted[name]:
        self.problems.add(
          "wrong shape",
          f"{FILES['overlay']}: {name} {list(tensor.shape)} instead of"
          f" {list(wanted[name])}",
        )
      self._keep("llm", FILES["overlay"], tensor)
    if tree and config:
      width = tree["params"]["llm_proj"]["kernel"].shape[-1]
      if width != config.width:
        self.problems.add(
          "wrong shape",
          f"vit_proj gives {width} numbers a token, the language model reads"
          f" {config.width}",
        )

  def _take_small_files(self):
    folder = self.folder / LLM_FOLDER
    files = llama_folder.small_files(folder)
    words = files.pop(WORDS)
    size = vocabulary.TextTokenizer(words, f"{LLM_FOLDER}/{WORDS}").size
    if size > TEXT_SIZE:
      self.problems.add(
        "vocabulary that does not fit",
        f"{LLM_FOLDER}/{WORDS} has {size} pieces, [IMG] is {TEXT_SIZE}",
      )
    self.files[WORDS] = words
    self.files |= {f"{OFFICIAL}/{name}": data for name, data in files.items()}


def _understanding_tree(tree: dict[str, Any], table) -> dict[str, Any]:
  """The tokenizer's abstract params under the names of the reading branch."""
  params = tree["params"]
  found = {"merger": params["merger"], "projection": params["llm_proj"]}
  if table is not names.UNDERSTANDING:
    found["selector"] = params["selector"]
  return found
