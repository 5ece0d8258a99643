"""`lavit latents`."""

import json

import pytest

from lavit_jax.commands import main
from lavit_jax.jobs import latents


@pytest.fixture
def written(monkeypatch):
  """What the function behind the command was called with."""
  calls = []

  def write_cache(model, kind, data, out, **options):
    calls.append((model, kind, data, out, options))
    return {"images": 3, "bad": 0, "bytes": 12, "out": out}

  monkeypatch.setattr(latents, "write_cache", write_cache)
  return calls


def test_the_config_says_what_is_cached(written, capsys):
  argv = ["latents", "--config", "tiny/latents.py", "--out", "cache"]
  more = ["--config.data.path=x.jsonl", "--config.start_from=sd", "--batch=2"]
  assert main.main([*argv, *more, "--split", "held_out", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["images"] == 3
  model, kind, data, out, options = written[0]
  assert (model, kind, out) == ("sd", "lowres", "cache")
  assert data["path"] == "x.jsonl"
  assert len(data["buckets"]) == 3
  assert options == {"split": "held_out", "batch": 2}
  main.main([*argv, "--config.vae_from=vae", "--split", "train"])
  assert written[1][0] == "vae"
  assert "images: 3" in capsys.readouterr().out


def test_both_parts_are_written_and_a_run_told_of_them(written, capsys):
  argv = ["latents", "--config", "tiny/latents.py", "--out", "cache"]
  assert main.main(argv) == 0
  assert [call[3] for call in written] == ["cache/train", "cache/held_out"]
  splits = [call[4]["split"] for call in written]
  assert splits == ["train", "held_out"]
  out = capsys.readouterr().out
  assert "--config.data.latents_dir=cache/train" in out
  assert "--config.data.held_out_latents_dir=cache/held_out" in out
  assert main.main([*argv, "--json"]) == 0
  assert set(json.loads(capsys.readouterr().out)) == {"train", "held_out"}


@pytest.mark.parametrize(
  ("argv", "words"),
  [
    (["--config", "tiny/latents.py"], "--out DIR is missing"),
    (["--out", "x"], "--config FILE is missing"),
    (["--out", "x", "--config", "tiny/pixels.py"], "stage 'pixels'"),
    (
      ["--out", "x", "--config", "tiny/latents.py", "--batch", "0"],
      "--batch 0",
    ),
    (["--out", "x", "--config", "tiny/latents.py", "odd"], "cannot use odd"),
  ],
)
def test_mistakes_are_named_before_anything_is_read(
  argv, words, written, capsys
):
  assert main.main(["latents", *argv]) == 2
  assert words in capsys.readouterr().err
  assert not written


def test_help_shows_an_example(capsys):
  assert main.main(["latents", "--help"]) == 0
  assert "lavit latents --config tiny/latents.py" in capsys.readouterr().out
