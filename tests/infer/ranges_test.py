"""Numbers that no program can take are refused by name."""

import re

import numpy as np
import pytest

from lavit_jax.core import errors
from lavit_jax.infer import image_generation, ranges
from lavit_jax.infer.pixels import options
from lavit_jax.infer.presets import rules
from lavit_jax.infer.tasks import arguments


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1, np.int64(3)])
def test_seeds_of_int32_are_taken(seed):
  ranges.check_seed(seed)


@pytest.mark.parametrize("seed", [-1, 2**31, 10**20, 1.5, "3", True, None])
def test_others_are_refused_by_name(seed):
  said = re.escape(f"seed={seed!r}: expected an integer from 0 to 2147483647")
  with pytest.raises(errors.UsageError, match=said):
    ranges.check_seed(seed)


def test_none_is_taken_where_nothing_is_sampled():
  ranges.check_seed(None, optional=True)
  assert arguments.seeds(None, False, 3) is None


def test_tasks_check_it_before_anything_is_computed():
  with pytest.raises(errors.UsageError, match="seed=-1"):
    arguments.seeds(-1, False, 3)
  with pytest.raises(errors.UsageError, match="seed=-2"):
    image_generation.write(None, ["x"], [None], None, form="codes", seed=-2)


@pytest.mark.parametrize(
  ("preset", "given", "says"),
  [
    ("caption", {"num_beams": "3"}, "num_beams='3': expected an integer"),
    ("caption", {"num_beams": 0}, "num_beams=0: expected an integer from 1 to"),
    ("caption", {"num_beams": 100_000}, "from 1 to 1024"),
    ("caption", {"num_beams": True}, "num_beams=True"),
    ("answer", {"max_new_tokens": 0}, "max_new_tokens=0: expected an integer"),
    ("answer", {"max_new_tokens": 2.0}, "max_new_tokens=2.0: expected an int"),
    ("caption", {"length_penalty": float("nan")}, "length_penalty=nan"),
    ("draw", {"temperature": float("nan")}, "temperature=nan: expected a fini"),
    (
      "draw",
      {"temperature": -1},
      "temperature=-1: expected a finite number of",
    ),
    ("draw", {"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ("draw", {"guidance_scale": "3"}, "guidance_scale='3'"),
    ("draw", {"temperature": 1e-38}, r"temperature=1e-38: expected 0 \(greedy"),
    ("draw", {"guidance_scale": 1e39}, r"guidance_scale=1e\+39: expected a fi"),
    ("caption", {"length_penalty": 10**400}, "length_penalty=1000"),
    ("draw", {"top_p": 0}, "top_p=0.0: expected a probability"),
    ("draw", {"top_p": 2}, "top_p=2.0: expected a probability"),
    ("draw", {"top_k": 1.5}, "top_k=1.5: expected an integer of at least 0"),
    ("draw", {"max_new_tokens": 0}, "max_new_tokens=0"),
    (
      "answer",
      {"min_new_tokens": 6, "max_new_tokens": 5},
      "min_new_tokens=6 is more than max_new_tokens=5",
    ),
    ("caption", {"min_new_tokens": 100}, "is more than max_new_tokens=36"),
  ],
)
def test_options_of_generation_are_checked(preset, given, says):
  with pytest.raises(errors.UsageError, match=says):
    rules.changed(getattr(rules.OFFICIAL, preset), given)


def test_a_fewest_number_of_the_preset_gives_way():
  assert rules.OFFICIAL.caption.min_new_tokens > 2
  changed = rules.changed(rules.OFFICIAL.caption, {"max_new_tokens": 2})
  assert changed.max_new_tokens == 2


@pytest.mark.parametrize(
  "given",
  [
    {"steps": 1.5},
    {"steps": 0},
    {"tile": "8"},
    {"decoder_guidance_scale": float("nan")},
  ],
)
def test_options_of_pixels_are_checked(given):
  ((name, value),) = given.items()
  with pytest.raises(errors.UsageError, match=f"{name}={value!r}: expected"):
    options.PixelOptions(**given)


@pytest.mark.parametrize(
  "codes",
  [[1, 2, 3], np.arange(3), [[0.5]], [["1"]], [[[1]]], [[True]], [[2**40]]]
  + [[[[1, 2], [3]]]],
)
def test_codes_are_integers_in_a_row_for_each_image(codes):
  with pytest.raises(errors.UsageError, match=r"codes\[0\] is "):
    ranges.check_codes(codes)


@pytest.mark.parametrize("codes", [None, 5, "12", iter([])])
def test_codes_are_a_list(codes):
  with pytest.raises(errors.UsageError, match=r"codes is .*expected a list"):
    ranges.check_codes(codes)


def test_numbers_of_numpy_become_those_of_python():
  changed = rules.changed(rules.OURS.draw, {"top_k": np.uint8(3)})
  assert type(changed.top_k) is int
  assert type(options.PixelOptions(steps=np.uint8(20)).steps) is int
  assert type(ranges.check_seed(np.uint8(250))) is int
  assert type(arguments.seeds(np.uint8(250), False, 9)[8].item()) is int
  np.testing.assert_array_equal(
    arguments.seeds(np.uint8(250), False, 9), np.arange(250, 259)
  )


def test_codes_of_all_kinds_of_integers_are_taken():
  ranges.check_codes([[1, 2], np.arange(3, dtype=np.uint16), (4,)])
