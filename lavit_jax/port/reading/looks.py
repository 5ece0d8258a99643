"""What a checkpoint looks like that is none of those that can be imported.

Told from the names of files and of tensors, so that a message can say in one
line what was given and what to do with it.
"""

import json
import pathlib
from collections.abc import Iterable

_GGUF = (
  "a GGUF file, weights of llama.cpp in its own number formats; give the"
  " Hugging Face folder that it was made from"
)
_META = (
  "a LLaMA in Meta's own format (consolidated.*.pth); convert it by"
  " transformers' convert_llama_weights_to_hf.py, or give the folder that is"
  " published for transformers"
)
_SINGLE = (
  "a single-file checkpoint of Stable Diffusion; make a folder of it with"
  " diffusers: StableDiffusionPipeline.from_single_file(FILE)"
  ".save_pretrained(FOLDER), and give the folder"
)
_ADAPTER = (
  "a LoRA or another adapter of PEFT, which is nothing without its base model;"
  " merge the two (merge_and_unload), save_pretrained the result and give its"
  " folder"
)
_QUANTIZED = "a quantized checkpoint; give the one it was made from"
# By what a name of a tensor begins with or contains.
_NAMES = (
  (_SINGLE, ("model.diffusion_model.", "first_stage_model."), ()),
  ("a ControlNet in its single-file form", ("control_model.",), ()),
  (
    _ADAPTER,
    ("lora_unet_", "lora_te_"),
    (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora_embedding_"),
  ),
  (_QUANTIZED, (), (".qweight", ".qzeros", ".weight.absmax")),
)


def of_names(names: Iterable[str]) -> str | None:
  """What tensors of these names are, None if they tell nothing.

  Args:
    names: of all tensors of a file.
  """
  for name in names:
    for said, begins, contains in _NAMES:
      if name.startswith(begins) or any(part in name for part in contains):
        return said
  return None


def of_path(path: pathlib.Path) -> str | None:
  """What a file or folder is, by the names in it; None if they tell nothing."""
  if path.is_file():
    return _of_file(path)
  if not path.is_dir():
    return None
  if (path / "adapter_config.json").is_file():
    return f"{_ADAPTER}{_base_of(path / 'adapter_config.json')}"
  files = sorted(p for p in path.iterdir() if p.is_file())
  for file in files:
    if said := _of_file(file):
      return f"a folder of {file.name}, {said}"
  pipeline = path / "model_index.json"
  if pipeline.is_file() and not (path / "unet").is_dir():
    kind = _field(pipeline, "_class_name")
    return f"a pipeline of diffusers without a U-Net ({kind})"
  return None


def _of_file(file):
  if file.suffix == ".gguf" or _begins(file, b"GGUF"):
    return _GGUF
  if file.name.startswith("consolidated.") and file.suffix == ".pth":
    return _META
  if file.suffix == ".ckpt":
    return _SINGLE
  return None


def _begins(file, magic):
  with file.open("rb") as opened:
    return opened.read(len(magic)) == magic


def _base_of(path):
  base = _field(path, "base_model_name_or_path")
  return f" (its base is {base})" if base else ""


def _field(path, name) -> str | None:
  """A text field of a small JSON file, as far as it can be read."""
  try:
    value = json.loads(path.read_text()).get(name)
  except (OSError, ValueError, AttributeError):
    return None
  return value[:100] if isinstance(value, str) else None
