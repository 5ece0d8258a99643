import dataclasses
import json

import pytest

torch = pytest.importorskip("torch", reason="reads PyTorch files")
pytest.importorskip("safetensors", reason="reads safetensors files")

from lavit_jax.commands import main
from lavit_jax.port.verify import verify
from tests.port import sources


def test_import_and_export_report_what_they_did(tmp_path, capsys):
  source = str(sources.write(tmp_path / "source"))
  model, back = str(tmp_path / "model"), str(tmp_path / "back")
  assert main.main(["port", "import", source, model, "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["parts"]["encoder"]["dtypes"] == ["float32"]
  size = sum(x.size for x in sources.state()[sources.FILES["encoder"]].values())
  assert report["parts"]["encoder"]["parameters"] == size
  export = ["port", "export", model, back, "--format", "official"]
  assert main.main(export) == 0
  message = capsys.readouterr().out
  assert "visual_tokenizer/eva_vitg_psz14.bin" in message
  assert back in message


def test_a_source_that_cannot_be_imported_is_one_paragraph_and_status_2(
  tmp_path, capsys
):
  state = sources.state()
  state[sources.FILES["encoder"]].pop("cls_token")
  source = sources.write(tmp_path / "source", state)
  arguments = [str(source), str(tmp_path / "model"), "--only", "encoder"]
  assert main.main(["port", "import", *arguments]) == 2
  message = capsys.readouterr()
  assert message.err.count("\n") == 1
  assert message.err.startswith("lavit: ")
  assert "cls_token" in message.err
  assert not message.out
  assert not (tmp_path / "model").exists()


def test_options_reach_the_import(tmp_path, capsys):
  state = sources.state()
  for name in ("norm.bias", "blocks.0.norm1.bias"):
    state[sources.FILES["encoder"]].pop(name)
  source = str(sources.write(tmp_path / "source", state, heads=None))
  model = str(tmp_path / "model")
  options = ["--only", "encoder,lowres", "--heads", "4", "--dtype", "bfloat16"]
  options += ["--allow-missing", "norm.bias", "blocks.0.norm1.bias", "--json"]
  assert main.main(["port", "import", source, model, *options]) == 0
  report = json.loads(capsys.readouterr().out)
  assert set(report["parts"]) == {"encoder", "lowres"}
  assert report["parts"]["lowres"]["dtypes"] == ["bfloat16"]
  assert report["notes"] == ["4 attention heads: --heads"]


def rows(*states):
  return [
    verify.Row(
      file="llm.npz",
      array=f"out_{state}",
      max_abs=1e-6,
      max_rel=2e-6,
      tolerance=1e-4,
      status=state,
      note="",
    )
    for state in states
  ]


@pytest.mark.parametrize(
  ("states", "status"), [(("pass",), 0), (("pass", "fail"), 1)]
)
def test_verify_prints_a_table_and_fails_by_its_status(
  monkeypatch, capsys, states, status
):
  found = rows(*states)
  monkeypatch.setattr(verify, "run", lambda model, golden: found)
  assert main.main(["port", "verify", "model", "golden"]) == status
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1] == ", ".join(f"1 {state}" for state in states)
  assert len(lines) == 2 + len(states)
  column = lines[0].index("status")
  assert [line[column:].split()[0] for line in lines[1:-1]] == list(states)
  assert main.main(["port", "verify", "model", "golden", "--json"]) == status
  document = json.loads(capsys.readouterr().out)
  assert document["rows"] == [dataclasses.asdict(row) for row in found]
  assert document["pass"] == 1
  assert document["fail"] == len(states) - 1
