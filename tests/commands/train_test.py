"""Commands that train: their options and configs."""

import json
import pathlib
import re
import shlex

import pytest

from lavit_jax.commands import train as train_command
from lavit_jax.core import errors
from tests.commands import fakes

pytestmark = pytest.mark.usefixtures("nothing_kept")


def test_quickstart_hands_on_its_options(model, capsys, monkeypatch, tmp_path):
  (tmp_path / "my.jsonl").write_text("")
  calls = []

  def start(workdir, **options):
    calls.append((workdir, options))
    return {"caption_exact": 0.5}

  fakes.stand_in(
    monkeypatch,
    "quickstart",
    train_command,
    run=start,
    common_batch=lambda: 8,
  )
  argv = shlex.split("quickstart --workdir d --minutes 2 --data my.jsonl")
  assert fakes.run(capsys, *argv, "--allow-absolute") == (0, "", "")
  fields = {"allow_absolute": True}
  assert calls[0] == (
    "d",
    {"minutes": 2.0, "data": "my.jsonl", "evaluate_only": False, "model": None}
    | {"fields": fields},
  )
  argv = shlex.split("quickstart --evaluate-only --model tiny --json")
  _, out, _ = fakes.run(capsys, *argv)
  assert json.loads(out) == {"caption_exact": 0.5}
  assert calls[1][1]["evaluate_only"] is True
  assert calls[1][1]["model"] == "tiny"


@pytest.fixture
def trained(model, monkeypatch, tmp_path):
  (tmp_path / "c.py").write_text(fakes.CONFIG)
  calls = []
  fakes.stand_in(
    monkeypatch,
    "loop",
    train_command,
    train=lambda config, workdir: calls.append((config, workdir)),
  )
  return calls


def test_train_reads_the_config_with_its_overrides(trained, capsys):
  argv = shlex.split("train --config c.py --workdir w --config.steps=7")
  assert fakes.run(capsys, *argv, "--config.model.width", "32") == (0, "", "")
  ((config, workdir),) = trained
  assert (config.steps, config.model.width, workdir) == (7, 32, "w")
  assert config.is_locked
  assert (
    fakes.run(capsys, *argv)[0] == 0
  )  # flags of one run do not reach the next
  assert trained[1][0].model.width == 16


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    ("--config c.py", "--workdir DIR is missing"),
    ("--workdir w", "--config FILE is missing"),
    (
      "--config c.py --workdir w --config.step=7",
      "no field 'step'. Did you mean \"steps",
    ),
    ("--config c.py --workdir w --config.model.widht=7", 'mean "width'),
    ("--config c.py --workdir w --config.steps=many", "many"),
    ("--config c.py --workdir w --wordir=x", "wordir"),
    ("--config c.py --workdir w extra", "cannot use extra"),
    ("--config d.py --workdir w", "no config file d.py"),
    ("--config bad.py --workdir w", "NameError: name 'lr'"),
    ("--config worse.py --workdir w", "ValueError: width is 3"),
  ],
)
def test_train_tells_what_is_wrong_with_its_flags(
  trained, capsys, tmp_path, argv, says
):
  bad = "def get_config():\n  "
  (tmp_path / "bad.py").write_text(bad + "return lr\n")
  (tmp_path / "worse.py").write_text(bad + "raise ValueError('width is 3')\n")
  assert says in fakes.failed(capsys, "train", *argv.split())
  assert trained == []


def test_train_without_flags_shows_its_help(capsys):
  status, out, err = fakes.run(capsys, "train")
  assert (status, out) == (2, "")
  assert err.startswith("usage: lavit train")


@pytest.mark.parametrize(
  "flag", ["--config=tiny/encoder.py", "--config=configs/tiny/encoder.py"]
)
@pytest.mark.parametrize("split", [True, False])
def test_a_shipped_config_is_found_from_anywhere(model, flag, split):
  argv = flag.split("=") if split else [flag]
  config, _ = train_command.read_config([*argv, "--workdir", "w"])
  assert config.stage == "encoder"
  assert not pathlib.Path("configs").exists()


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ("return 5", "get_config() of the config file returns 5: expected an"),
    (
      "return ml_collections.ConfigDict({'seed': 1})",
      "the config has no batch_size, mesh: begin",
    ),
  ],
)
def test_what_is_no_config_of_a_run_is_refused(tmp_path, body, said):
  path = tmp_path / "mine.py"
  path.write_text(f"import ml_collections\ndef get_config():\n  {body}\n")
  with pytest.raises(errors.ConfigError, match=re.escape(said)):
    train_command.train([f"--config={path}", "--workdir", str(tmp_path / "w")])
  assert not (tmp_path / "w").exists()


def test_what_the_shipped_configs_share_is_not_offered():
  with pytest.raises(errors.ConfigError) as caught:
    train_command.read_config(["--config=tiny/nothing.py", "--workdir", "w"])
  assert "tiny/encoder.py" in str(caught.value)
  assert "common.py" not in str(caught.value)


def _llm(width, tokens):
  return {
    "model": {"llm": dict(width=width, depth=12, mlp_dim=3 * width)},
    "data": {"length": tokens // 2},
    "batch_size": 2,
  }


def test_a_large_language_model_with_few_tokens_has_one_cpu_device(monkeypatch):
  for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(train_command.os, "cpu_count", lambda: 2)
  made = {}
  monkeypatch.setattr(train_command.jax.config, "update", made.__setitem__)
  for config, devices in (
    (_llm(640, 512), 1),
    (_llm(640, 16_384), 2),  # what is sent is little beside the products
    (_llm(128, 512), 2),
    ({"batch_size": 2, "model": {"vit": {}}, "data": {}}, 2),
  ):
    together = train_command.is_bound_by_weights(config)
    train_command.use_cpu_cores(2, together=together)
    assert made == {"jax_num_cpu_devices": devices}
