"""Descriptions of well-known checkpoints that cannot be imported.

They are recognized by the names of files and of tensors, so that an error can
say in one line what the checkpoint is and what to do with it.
"""

import json
import pathlib
from collections.abc import Iterable

from lavit_jax.port.formats import pickles

_GGUF = (
  "a GGUF file, weights of llama.cpp in its own number formats; give the"
  " Hugging Face folder that it was made from"
)
_META = (
  "a LLaMA in Meta's own format (consolidated.*.pth); convert it by"
  " transformers' convert_llama_weights_to_hf.py, or give the folder that is"
  " published for transformers"
)
_SINGLE_FILE = (
  "a single-file checkpoint of Stable Diffusion; make a folder of it with"
  " diffusers: StableDiffusionPipeline.from_single_file(FILE)"
  ".save_pretrained(FOLDER), and give the folder"
)
_ADAPTER = (
  "a LoRA or another adapter of PEFT, which needs its base model; merge the two"
  " (merge_and_unload), save the result with save_pretrained and give its"
  " folder"
)
_QUANTIZED = "a quantized checkpoint; give the one that it was made from"
# (description, prefixes, parts) of tensors' names.
_NAMES = (
  (_SINGLE_FILE, ("model.diffusion_model.", "first_stage_model."), ()),
  ("a ControlNet in its single-file form", ("control_model.",), ()),
  (
    _ADAPTER,
    ("lora_unet_", "lora_te_"),
    (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora_embedding_"),
  ),
  (_QUANTIZED, (), (".qweight", ".qzeros", ".weight.absmax")),
)


def describe_names(names: Iterable[str]) -> str | None:
  """Returns what a file is by its tensors' names; None if it is not known."""
  for name in names:
    for description, prefixes, parts in _NAMES:
      if name.startswith(prefixes) or any(part in name for part in parts):
        return description
  return None


def describe_path(path: pathlib.Path) -> str | None:
  """Returns what a file or folder is by file names; None if not known."""
  if path.is_file():
    return _describe_file(path)
  if not path.is_dir():
    return None
  if (path / "adapter_config.json").is_file():
    return f"{_ADAPTER}{_base_of(path / 'adapter_config.json')}"
  files = sorted(p for p in path.iterdir() if p.is_file())
  for file in files:
    if description := _describe_file(file):
      return f"a folder of {file.name}, {description}"
  pipeline = path / "model_index.json"
  if pipeline.is_file() and not (path / "unet").is_dir():
    kind = _text_field(pipeline, "_class_name")
    return f"a pipeline of diffusers without a U-Net ({kind})"
  return None


def _describe_file(file):
  if file.suffix == ".gguf" or pickles.starts_with(file, b"GGUF"):
    return _GGUF
  if file.name.startswith("consolidated.") and file.suffix == ".pth":
    return _META
  if file.suffix == ".ckpt":
    return _SINGLE_FILE
  return None


def _base_of(path):
  base = _text_field(path, "base_model_name_or_path")
  return f" (its base is {base})" if base else ""


def _text_field(path, name) -> str | None:
  """Returns a string from a small JSON file; None if it cannot be read."""
  try:
    value = json.loads(path.read_text()).get(name)
  except (OSError, ValueError, AttributeError):
    return None
  return value[:100] if isinstance(value, str) else None
