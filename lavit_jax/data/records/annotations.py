"""Reads files of captions as COCO writes them, as rows of JSON lines.

  {"images": [{"id": 1, "file_name": "1.jpg"}],
   "annotations": [{"image_id": 1, "caption": "a cat"}]}

is the form of COCO, NoCaps and Flickr30k's annotations; and

  {"images": [{"filename": "1.jpg", "sentences": [{"raw": "a cat"}]}]}

that of A. Karpathy's splits. Each is one JSON object, read as a whole.
"""

import collections
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from lavit_jax.core import errors

_MOST = 4 << 30  # bytes of a file
# How such a file begins. A JSON line may hold images too, but as names.
_START = re.compile(
  rb"\s*\{\s*\"(?:(?:info|licenses|type|categories)\"\s*:\s*[\[{\"]"
  rb"|dataset\"\s*:\s*\"|images\"\s*:\s*\[\s*\{"
  rb"|annotations\"\s*:\s*\[\s*\{[^}]*\"image_id\")"
)
_KARPATHY = ("filename", "filepath", "sentences", "split")  # what is read
_FOLDERS = ("", "images")  # beside the file, where images are looked for


def is_likely(start: bytes) -> bool:
  """Returns whether a file that begins so may be of this form."""
  return _START.match(start) is not None


def rows(path: Any, file: Any) -> Iterator[tuple[int, dict[str, Any]]] | None:
  """Returns (number, row) of each image, numbers from 1.

  Args:
    path: of the file, for messages and to find the images.
    file: the opened file.

  Returns:
    An iterator; None if the file is of another form after all.

  Raises:
    errors.DataError: it is of this form, and cannot be read.
  """
  data = file.read(_MOST + 1)
  if len(data) > _MOST:
    raise errors.DataError(
      f"{path} is one JSON object of more than {_MOST >> 30} GiB. Write a line"
      " for each image."
    )
  try:
    value = json.loads(data)
  except (ValueError, RecursionError):
    return None  # JSON lines, or what they say of it
  images = value.get("images") if isinstance(value, dict) else None
  if not isinstance(images, list) or not images:
    return None
  if not all(isinstance(image, dict) for image in images):
    return None
  if isinstance(value.get("annotations"), list):
    return _coco(path, images, value["annotations"])
  if "sentences" in images[0]:
    return _karpathy(images)
  return None


def _coco(path, images, annotations):
  """Yields rows of COCO's form."""
  captions = collections.defaultdict(list)
  for annotation in annotations:
    if isinstance(annotation, dict) and "caption" in annotation:
      captions[annotation.get("image_id")].append(annotation["caption"])
  if not captions:
    raise errors.DataError(
      f"{path} has annotations without a caption, such as boxes or segments."
      " Give the file with captions, such as captions_train2017.json."
    )
  folder = _folder_of(path, images)
  for number, image in enumerate(images, start=1):
    row = {"file_name": image.get("file_name")}
    if folder and isinstance(row["file_name"], str):
      row["file_name"] = f"{folder}/{row['file_name']}"
    if found := captions.get(image.get("id")):
      row["captions"] = found
    yield number, row


def _karpathy(images):
  """Yields rows of Karpathy's form, which JSON lines may have, too."""
  for number, image in enumerate(images, start=1):
    yield number, {name: image[name] for name in _KARPATHY if name in image}


def _folder_of(path, images):
  """Returns the folder beside the file that has the first image, or ""."""
  name = images[0].get("file_name")
  if not isinstance(name, str):
    return ""
  # captions_val2017.json is about the images in val2017.
  words = re.findall(r"[A-Za-z]+\d+", pathlib.PurePath(path).name)
  for folder in (*_FOLDERS, *words):
    if (path.parent / folder / name).exists():
      return folder
  return ""
