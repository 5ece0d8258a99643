"""Files and folders of the official release, `rain1011/LaVIT-7B-v2`.

visual_tokenizer/         encoder, tokenizer and the two semantic decoders
language_model/           a Hugging Face LLaMA folder, and the weights with
                          which it reads images
pixel_decoding/           Stable Diffusion 1.5 in diffusers' format
highres_pixel_decoding/   SDXL in diffusers' format
safety_checker/           optional; also inside the two folders above
"""

import pathlib

TEXT_SIZE = 32000  # text pieces of the language model, and the id of [IMG]
PARTS = ("encoder", "tokenizer", "lowres", "highres", "llm")  # always there
PIXEL_FOLDERS = {  # by part
  "lowres_pixels": "pixel_decoding",
  "highres_pixels": "highres_pixel_decoding",
}
SAFETY_PART = "safety"
ALL_PARTS = (*PARTS, *PIXEL_FOLDERS, SAFETY_PART)
FILES = {
  "encoder": "visual_tokenizer/eva_vitg_psz14.bin",
  "tokenizer": "visual_tokenizer/tokenizer_encoder.bin",
  "lowres": "visual_tokenizer/tokenizer_decoder.bin",
  "highres": "visual_tokenizer/highres_tokenizer_decoder.bin",
  "overlay": "language_model/visual_weight.bin",
}
FILES_OF_PART = {  # keys of FILES that a part is made of
  "encoder": ("encoder",),
  "tokenizer": ("encoder", "tokenizer"),
  "lowres": ("lowres",),
  "highres": ("highres",),
  "llm": ("encoder", "tokenizer", "overlay"),
}
LLM_FOLDER = "language_model"
TOKENIZER_MODEL = "tokenizer.model"  # the SentencePiece model
UNCOND = "uncond_embeddings.bin"  # of pixel_decoding/
# Prefix of the encoder's tensors that other files repeat.
ENCODER_COPY = "encoder."
# Folder of a model directory with files of an import that an export restores.
KEPT_FOLDER = "official"
# Tensors of an import, by part, that lavit_jax does not use.
KEPT_TENSORS = "kept.{}.safetensors"


def is_layout(folder: pathlib.Path) -> bool:
  """Returns whether a folder has any folder of the official layout."""
  names = ("visual_tokenizer", LLM_FOLDER, *PIXEL_FOLDERS.values())
  return any((folder / name).is_dir() for name in names)
