"""A small checkpoint in the official layout, its weights random.

The same files, names and rules as those of the release, 28 MB instead of
42 GB, so that an import and an export can be tried anywhere in seconds. What
such a model writes and draws is nonsense. The U-Nets draw 32 x 32 pixels.
"""

import functools
import json
import pathlib
import zlib

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
from lavit_jax.port.diffusers import config, scheduler_config
from lavit_jax.port.formats import folder, llama_folder, tensor_files, tensors
from lavit_jax.port.reading import official, pixel_folders
from lavit_jax.port.tables import names, sizes

# As large as the recordings' checkpoint (tests/golden): images of 56 x 56
# pixels, 16 patches. Codes and text ids are as many as in the release.
_HEADS, _WIDTH, _HIDDEN, _PATCHES, _CODE_DIM = 4, 64, 279, 16, 32
_NUM_CODES, _LLM_WIDTH = 16384, 32
_UNET_DIM, _UNET_DIMS, _POOLED_DIM, _SIZE_DIM = 48, (24, 40), 40, 8
_BLOCKS = {
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
  vocab_size=official.TEXT_SIZE + 2 + _NUM_CODES,
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
_LLM = f"{official.LLM_FOLDER}/pytorch_model.bin"
# Standard deviations where those of `_values` would do badly: a selector that
# is sure of itself keeps other patches in other images.
_SPREAD = {
  "token_predictor.out_conv.4.weight": 1.5,
  "model.embed_tokens.weight": 0.7,
}


def write(directory, seed: int = 0) -> pathlib.Path:
  """Writes a checkpoint that `lavit port import` takes.

  Args:
    directory: new or empty; appears whole or not at all.
    seed: of the weights; the same seed gives the same tensors.

  Returns:
    The directory. Its variant_config.json tells the head count, which no
    official file holds.

  Raises:
    errors.UsageError: `directory` is taken, or PyTorch is not installed.
    errors.CheckpointError: it cannot be written.
  """
  tensors.require("torch", "Writing .bin files")
  directory = pathlib.Path(directory)
  folder.require_new(directory)
  with folder.building(directory) as partial:
    for file, (table, tree) in _files().items():
      rng = np.random.default_rng([seed, zlib.crc32(file.encode())])
      rows = _LLAMA.vocab_size if file == _LLM else None
      path = partial / file
      path.parent.mkdir(exist_ok=True)
      tensor_files.save_torch(
        path, _values(names.to_official(table, tree, rows), rng)
      )
    for part, name in pixel_folders.FOLDERS.items():
      _write_pixels(partial / name, part, seed)
    language_model = partial / official.LLM_FOLDER
    for name, data in llama_folder.default_files(_LLAMA, "float32", {}).items():
      (language_model / name).write_bytes(data)
    words = parts.resolve("tiny") / official.WORDS
    (language_model / official.WORDS).write_bytes(words.read_bytes())
    heads = json.dumps({"heads": _HEADS})
    (partial / "variant_config.json").write_text(heads)
  return directory


def _write_pixels(place, part, seed):
  """pixel_decoding/ or highres_pixel_decoding/, as diffusers writes them."""
  configs = {"unet": _UNETS[part], "vae": _VAE(scaling_factor=_FACTORS[part])}
  described = {
    pixel_folders.SCHEDULER: scheduler_config.unparse(
      schedules.STABLE_DIFFUSION
    ),
    "unet/config.json": config.unet_fields(configs["unet"]),
    "vae/config.json": config.vae_fields(configs["vae"]),
  }
  for file, fields in described.items():
    (place / file).parent.mkdir(parents=True)
    (place / file).write_bytes(llama_folder.to_json(fields))
  trees = {
    "unet": config.abstract_unet(configs["unet"]),
    "vae": config.abstract_vae(configs["vae"]),
  }
  for kind, tree in trees.items():
    path = place / kind / pixel_folders.weight_files(kind)[0]
    rng = np.random.default_rng([seed, zlib.crc32(f"{part}/{kind}".encode())])
    table = pixel_folders.table_of(configs[kind], "to_q")
    state = _values(names.to_official(table, tree), rng)
    if path.suffix == ".bin":
      tensor_files.save_torch(path, state)
    else:
      tensor_files.save_arrays(path, state)
  if part == "lowres_pixels":
    rng = np.random.default_rng([seed, zlib.crc32(part.encode())])
    shape = (1, _UNCOND_TOKENS, _UNET_DIM)
    uncond = rng.standard_normal(shape, np.float32)
    tensor_files.save_torch(place / pixel_folders.UNCOND, uncond)


def _files():
  """{file: (table of names, abstract tree)} of everything but small files."""
  whole = sizes.abstract_tokenizer(_TOKENIZER)
  whole["params"].pop("decoder")
  reading = {
    "merger": whole["params"]["merger"],
    "projection": whole["params"]["llm_proj"],
  }
  lowres = decoder.LowresDecoder(_DECODER, _UNET_DIM)
  highres = decoder.HighresDecoder(_DECODER, _UNET_DIMS, _POOLED_DIM)
  files = official.FILES
  return {
    files["encoder"]: (names.ENCODER, sizes.abstract_encoder(_VIT)),
    files["tokenizer"]: (names.TOKENIZER, whole),
    files["lowres"]: (names.LOWRES, sizes.abstract_decoder(lowres)),
    files["highres"]: (names.HIGHRES, sizes.abstract_decoder(highres)),
    files["overlay"]: (names.UNDERSTANDING, reading),
    _LLM: (names.LLM, sizes.abstract_llama(_LLAMA)),
  }


def _values(shaped, rng) -> dict[str, np.ndarray]:
  """Random float32 arrays in place of those given, by official name.

  Scales of norms are about 1 and biases about 0; matrices keep the size of
  what they are multiplied with.
  """
  values = {}
  for name, like in shaped.items():
    noise = rng.standard_normal(like.shape, np.float32)
    if len(like.shape) == 1:
      norm = name.endswith("weight")
      values[name] = np.float32(norm) + np.float32(0.1) * noise
    else:
      learned = name.endswith(("embed", "embedding", "cls_token"))
      inputs = int(np.prod(like.shape[1:]))
      spread = 0.5 if learned else _SPREAD.get(name, inputs**-0.5)
      values[name] = np.float32(spread) * noise
  return values
