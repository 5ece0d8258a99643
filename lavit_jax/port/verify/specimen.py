"""A small checkpoint in the official layout, its weights random.

It has the files, names and rules of the release, but 28 MB instead of 42 GB, so
that an import and an export can be tried anywhere in seconds. The texts and
images of such a model are nonsense; its U-Nets generate 32 x 32 pixels.
"""

import functools
import json
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from lavit_jax.diffusion import schedules
from lavit_jax.infer.loading import parts
from lavit_jax.models import llama
from lavit_jax.models.encoder import vision
from lavit_jax.models.pixels import unet, vae
from lavit_jax.models.tokenizer import (
  decoder,
  merger,
  quantizer,
  selector,
  tokenizer,
)
from lavit_jax.port.diffusers import config, scheduler_config, weight_files
from lavit_jax.port.formats import (
  folder,
  llama_folder,
  official_layout,
  small_files,
  tensor_files,
  tensors,
)
from lavit_jax.port.reading import pixel_folders
from lavit_jax.port.tables import names, pixel_names, rows, sizes

# Sizes of the recordings' checkpoint (tests/golden): images of 56 x 56 pixels,
# 16 patches. The numbers of codes and text ids are those of the release.
_HEADS, _WIDTH, _HIDDEN, _PATCHES, _CODE_DIM = 4, 64, 279, 16, 32
_NUM_CODES, _LLM_WIDTH = 16384, 32
_UNET_DIM, _UNET_DIMS, _POOLED_DIM, _SIZE_DIM = 48, (24, 40), 40, 8
_BLOCKS: dict[str, Any] = {
  "width": _WIDTH,
  "depth": 2,
  "num_heads": _HEADS,
  "mlp_dim": _HIDDEN,
}
_VIT = vision.ViTConfig(
  **_BLOCKS, image_size=56, patch_size=14, head_dim_out=40
)
_DECODER = decoder.DecoderConfig(
  **_BLOCKS, num_patches=_PATCHES, code_dim=_CODE_DIM, out_dim=_WIDTH
)
_TOKENIZER = tokenizer.TokenizerConfig(
  vit=_VIT,
  selector=selector.SelectorConfig(width=_WIDTH),
  merger=merger.MergerConfig(**_BLOCKS),
  quantizer=quantizer.QuantizerConfig(
    width=_WIDTH, num_codes=_NUM_CODES, code_dim=_CODE_DIM
  ),
  decoder=_DECODER,
  merger_form="reference",
  llm_width=_LLM_WIDTH,
)
_LLAMA = llama.LlamaConfig(
  vocab_size=official_layout.TEXT_SIZE + 2 + _NUM_CODES,
  width=_LLM_WIDTH,
  depth=2,
  num_heads=4,
  num_kv_heads=4,
  mlp_dim=86,
  norm_eps=1e-5,
  max_len=4096,
)
_UNET = functools.partial(
  unet.UNetConfig,
  in_channels=4,
  out_channels=4,
  channels=(32, 64),
  layers_per_block=1,
  groups=8,
)
_UNETS = {
  "lowres_pixels": _UNET(
    attention=(True, False),
    transformer_layers=(1, 1),
    num_heads=(8, 8),
    cross_dim=_UNET_DIM,
  ),
  "highres_pixels": _UNET(
    attention=(False, True),
    transformer_layers=(1, 2),
    num_heads=(2, 4),
    cross_dim=sum(_UNET_DIMS),
    details=unet.DiffusersQuirks(
      linear_projection=True,
      added_dim=_POOLED_DIM + 6 * _SIZE_DIM,
      added_time_dim=_SIZE_DIM,
    ),
  ),
}
_FACTORS = {"lowres_pixels": 0.18215, "highres_pixels": 0.13025}
_VAE = functools.partial(
  vae.VaeConfig,
  channels=(16, 16, 32, 32),
  layers_per_block=1,
  groups=8,
  sample_size=32,
)
_UNCOND_TOKENS = 5
_LLM = f"{official_layout.LLM_FOLDER}/pytorch_model.bin"
# Standard deviations for tensors for which those of `_random_values` are too
# small: a decided selector keeps different patches of different images.
_STD = {
  "token_predictor.out_conv.4.weight": 1.5,
  "model.embed_tokens.weight": 0.7,
}


def write(directory: str | os.PathLike, seed: int = 0) -> pathlib.Path:
  """Writes a checkpoint for `lavit port import`.

  Args:
    directory: new or empty; appears complete or not at all.
    seed: of the weights; the same seed gives the same tensors.

  Returns:
    The directory. Its variant_config.json states the number of attention
    heads, which no official file does.

  Raises:
    errors.UsageError: `directory` is not empty, or PyTorch is not installed.
    errors.CheckpointError: it cannot be written.
  """
  tensors.require("torch", "Writing .bin files")
  directory = pathlib.Path(directory)
  folder.require_new(directory)
  with folder.building(directory) as partial:
    for file, (table, tree) in _files().items():
      vocab_size = _LLAMA.vocab_size if file == _LLM else None
      like = names.to_official(table, tree, vocab_size)
      path = partial / file
      path.parent.mkdir(exist_ok=True)
      values = _random_values(like, _generator(seed, file))
      tensor_files.save_torch(path, values)
    for part, name in official_layout.PIXEL_FOLDERS.items():
      _write_pixel_folder(partial / name, part, seed)
    folder.write_files(partial, _small_files())
  return directory


def _small_files() -> dict[str, bytes]:
  """Returns the small files of the language model, and the number of heads."""
  files = llama_folder.default_files(_LLAMA, "float32", {})
  text_model = official_layout.TOKENIZER_MODEL
  files[text_model] = (parts.resolve("tiny") / text_model).read_bytes()
  root = official_layout.LLM_FOLDER
  heads = json.dumps({"heads": _HEADS}).encode()
  return {
    "variant_config.json": heads,
    **{f"{root}/{name}": data for name, data in files.items()},
  }


def _generator(seed, name) -> np.random.Generator:
  return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _write_pixel_folder(root, part, seed):
  """Writes pixel_decoding/ or highres_pixel_decoding/ as diffusers does."""
  configs = {"unet": _UNETS[part], "vae": _VAE(scaling_factor=_FACTORS[part])}
  described = {
    pixel_folders.SCHEDULER: scheduler_config.unparse(
      schedules.STABLE_DIFFUSION
    )
  }
  for kind, network in configs.items():
    fields = config.KINDS[kind].fields(network)
    described[f"{kind}/{pixel_folders.CONFIG}"] = fields
  json_files = {n: small_files.to_json(f) for n, f in described.items()}
  folder.write_files(root, json_files)
  for kind, network in configs.items():
    path = root / kind / weight_files.candidates(kind)[0]
    tree = config.KINDS[kind].abstract(network)
    like = names.to_official(pixel_names.table_of(network), tree)
    state = _random_values(like, _generator(seed, f"{part}/{kind}"))
    if path.suffix == ".bin":
      tensor_files.save_torch(path, state)
    else:
      tensor_files.save_arrays(path, state)
  if part == "lowres_pixels":
    shape = (1, _UNCOND_TOKENS, _UNET_DIM)
    uncond = _generator(seed, part).standard_normal(shape, np.float32)
    tensor_files.save_torch(root / official_layout.UNCOND, uncond)


def _files() -> dict[str, tuple[rows.Table, dict[str, Any]]]:
  """Returns {file: (name table, abstract tree)} of the .bin files."""
  variables = sizes.abstract_tokenizer(_TOKENIZER, with_decoder=False)
  lowres = decoder.LowresDecoder(_DECODER, _UNET_DIM)
  highres = decoder.HighresDecoder(_DECODER, _UNET_DIMS, _POOLED_DIM)
  files = official_layout.FILES
  return {
    files["encoder"]: (names.ENCODER, sizes.abstract_encoder(_VIT)),
    files["tokenizer"]: (names.TOKENIZER, variables),
    files["lowres"]: (names.LOWRES, sizes.abstract_decoder(lowres)),
    files["highres"]: (names.HIGHRES, sizes.abstract_decoder(highres)),
    files["overlay"]: (
      names.UNDERSTANDING,
      sizes.reading_branch(variables),
    ),
    _LLM: (names.LLM, sizes.abstract_llama(_LLAMA)),
  }


def _random_values(arrays, rng) -> dict[str, np.ndarray]:
  """Returns random float32 arrays of the same names and shapes.

  Scales of norms are about 1 and biases about 0; matrices preserve the scale of
  their inputs.
  """
  values = {}
  for name, like in arrays.items():
    noise = rng.standard_normal(like.shape, np.float32)
    if len(like.shape) == 1:
      is_scale = name.endswith("weight")
      values[name] = np.float32(is_scale) + np.float32(0.1) * noise
    else:
      is_embedding = name.endswith(("embed", "embedding", "cls_token"))
      inputs = int(np.prod(like.shape[1:]))
      std = 0.5 if is_embedding else _STD.get(name, inputs**-0.5)
      values[name] = np.float32(std) * noise
  return values
