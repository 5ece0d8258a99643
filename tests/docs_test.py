"""README and docs are short where they must be, and say what is true."""

import ast
import difflib
import functools
import importlib.util
import pathlib
import re
import runpy
import unicodedata

import pytest
import setuptools
import yaml

import lavit_jax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def _load(path):
  """A script of the repository as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


relink = _load(ROOT / "docs" / "relink.py")


def _prose(page):
  """A page without its fenced blocks and spans of code with a link in them."""
  text = _FENCE.sub("", page.read_text("utf-8"))
  return re.sub(r"`` .*? ``", "", text)


def _slugs(page):
  """Anchors of a page's headings, as GitHub and as the site make them."""
  found = {}
  for line in _prose(page).splitlines():
    if not (match := re.match(r"#+ (.*)", line)):
      continue
    title = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
    plain = re.sub(r"[^\w\s-]", "", title).strip().lower()
    ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore")
    site = re.sub(r"[-\s]+", "-", ascii_only.decode())
    found[plain.replace(" ", "-")] = site
  return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_definitions_have_the_right_line(page):
  faults = [fault for *_, fault in relink.links(page) if fault]
  hint = "python docs/relink.py mends the numbers"
  assert not faults, "\n".join([*faults, hint])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_and_anchors_lead_somewhere(page):
  faults = []
  for target in _LINK.findall(_prose(page)):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    to = (page.parent / path).resolve() if path else page
    if not to.exists():
      faults.append(f"{target}: no such file")
    elif anchor and to.suffix == ".md":
      slugs = _slugs(to)
      if slugs.get(anchor) != anchor:
        faults.append(f"{target}: {to.name} has no such heading")
    elif anchor and not re.fullmatch(r"L\d+", anchor):
      faults.append(f"{target}: expected #L and a number")
    elif anchor and not relink.LINK.search(f"[`x`]({target})"):
      faults.append(f"{target}: only lines of Python files are held")
  assert not faults, "\n".join(faults)


def test_every_link_to_a_line_names_its_definition():
  """Else nothing could tell whether it has moved."""
  for page in PAGES:
    links = [t for t in _LINK.findall(_prose(page)) if "#L" in t]
    named = [m[2] for m in relink.LINK.finditer(_prose(page))]
    assert [t.partition("#")[0] for t in links] == named, page.name


def test_relink_mends_a_number_and_names_what_is_gone(tmp_path, monkeypatch):
  monkeypatch.setattr(relink, "ROOT", tmp_path)
  (tmp_path / "code.py").write_text("X = 1\n\n\nclass A:\n  b: int = 0\n")
  page = tmp_path / "page.md"
  page.write_text("[`A.b`](code.py#L99) [`X`](code.py#L1) [`C`](code.py#L7)")
  lost = relink.mend(page)
  assert page.read_text() == (
    "[`A.b`](code.py#L5) [`X`](code.py#L1) [`C`](code.py#L7)"
  )
  assert len(lost) == 1
  assert "defines no C" in lost[0]


def _tree_map():
  """Paths of the map in docs/architecture.md, folders with a slash."""
  text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
  block = re.search(r"## The map\n+```text\n(.*?)```", text, re.DOTALL)[1]
  open_folders = []
  for line in block.splitlines():
    name = line.split()[0]
    depth = (len(line) - len(line.lstrip())) // 2
    open_folders[depth:] = [name]
    yield "".join(open_folders)


def test_everything_on_the_map_exists_and_every_package_is_on_it():
  listed = set(_tree_map())
  gone = [
    path
    for path in listed
    if not (ROOT / path).exists()
    or path.endswith("/") != (ROOT / path).is_dir()
  ]
  assert not gone, f"docs/architecture.md names {gone}"
  packages = {
    f"{path.parent.relative_to(ROOT).as_posix()}/"
    for top in ("lavit_jax", "configs")
    for path in (ROOT / top).rglob("__init__.py")
  }
  assert packages <= listed, f"not on the map: {packages - listed}"


def test_readme_has_a_row_for_every_package():
  text = (ROOT / "README.md").read_text("utf-8")
  packages = {p.parent.name for p in ROOT.glob("lavit_jax/*/__init__.py")}
  assert packages == set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_readme_is_one_page():
  text = (ROOT / "README.md").read_text("utf-8")
  assert len(text.split()) <= 1300
  assert len(text.splitlines()) <= 140


def test_readme_has_the_two_commands():
  """`.ci/run` takes the second one from here."""
  lines = (ROOT / "README.md").read_text("utf-8").splitlines()
  commands = [line for line in lines if line.startswith((".venv", "python3"))]
  assert commands == [
    "python3 -m venv .venv && .venv/bin/pip install -e . &&"
    " .venv/bin/lavit quickstart",
    ".venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest",
  ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page):
  tops = r"(?:lavit_jax|configs|benchmarks|launch|docs|tests|notebooks|\.ci)"
  spans = re.findall(rf"`({tops}/[\w./-]*)`", _prose(page))
  gone = sorted({span for span in spans if not (ROOT / span).exists()})
  assert not gone, gone


def _texts(path):
  """Strings of a module; … stands for the values of an f-string."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value
    elif isinstance(node, ast.JoinedStr):
      yield "".join(
        part.value if isinstance(part, ast.Constant) else "…"
        for part in node.values
      )


@functools.cache
def _messages():
  """All strings of the package."""
  paths = sorted((ROOT / "lavit_jax").rglob("*.py"))
  return [text for path in paths for text in _texts(path)]


def test_errors_of_the_faq_are_those_of_the_code():
  text = (ROOT / "docs" / "faq.md").read_text("utf-8")
  quoted = re.findall(r"^> `(.*)`$", text, re.MULTILINE)
  assert len(quoted) >= 20
  gone = [q for q in quoted if not any(q in text for text in _messages())]
  near = [difflib.get_close_matches(q, _messages(), 1, 0.4) for q in gone]
  assert not gone, "\n".join(
    f"no such message: {quote}\n  perhaps: {''.join(texts)}"
    for quote, texts in zip(gone, near, strict=True)
  )


def test_what_the_api_page_documents_is_there():
  text = (ROOT / "docs" / "api.md").read_text("utf-8")
  names = re.findall(r"^::: lavit_jax\.(\S+)$", text, re.MULTILINE)
  assert len(names) > 10
  for name in names:
    *parts, last = name.split(".")
    module = ROOT.joinpath("lavit_jax", *parts, f"{last}.py")
    if module.exists():
      continue
    source = ROOT.joinpath("lavit_jax", *parts).with_suffix(".py").read_text()
    assert relink.line_of(source, last), name


def test_every_page_is_in_the_navigation():
  loaded = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
  listed = re.findall(r"[\w]+\.md", str(loaded["nav"]))
  assert sorted(listed) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


def test_modules_that_the_changelog_moved_are_there():
  text = (ROOT / "CHANGELOG.md").read_text("utf-8")
  rows = re.findall(
    r"^\| `lavit_jax\S*` \| `lavit_jax\.?(\S*)` \| (.*) \|$", text, re.MULTILINE
  )
  assert len(rows) > 30
  gone = [
    f"{package}.{name}"
    for package, modules in rows
    for name in re.findall(r"`(\w+)`(?:,|$)", modules)
    if not (
      ROOT / "lavit_jax" / package.replace(".", "/") / f"{name}.py"
    ).exists()
  ]
  assert not gone, gone


def test_the_version_is_one():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
  assert str(citation["version"]) == lavit_jax.__version__
  changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
  assert f"## [{lavit_jax.__version__}]" in changes


def test_tools_have_the_bounds_of_the_extras(monkeypatch):
  monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
  extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
  known = {r for listed in extras.values() for r in listed}
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
  asked = [
    requirement
    for repository in hooks["repos"]
    for hook in repository["hooks"]
    for requirement in hook.get("additional_dependencies", [])
  ]
  assert asked
  assert set(asked) <= known


def test_workflows_run_every_lane_on_every_python():
  path = ROOT / ".github" / "workflows" / "ci.yml"
  jobs = yaml.safe_load(path.read_text("utf-8"))["jobs"]
  lanes = {
    "lint",
    "types",
    "fast",
    "full",
    "newest",
    "lowest",
    "docs",
    "build",
  }
  assert set(jobs) == lanes
  steps = {
    name: " && ".join(step.get("run", "") for step in job["steps"])
    for name, job in jobs.items()
  }
  assert ".ci/run newest" in steps["newest"]
  assert ".ci/run oldest" in steps["lowest"]
  project = (ROOT / "pyproject.toml").read_text("utf-8")
  minors = re.findall(r"Python :: (3\.\d+)", project)
  assert jobs["fast"]["strategy"]["matrix"]["python"] == minors


def test_notebooks_lose_outputs_and_nothing_else():
  notebooks = _load(ROOT / ".ci" / "notebooks.py")
  code = {"cell_type": "code", "source": ["1"], "metadata": {}}
  clean = {"cells": [code | {"outputs": [], "execution_count": None}]}
  dirty = {"cells": [code | {"outputs": [{"a": 1}], "execution_count": 3}]}
  assert notebooks.stripped(dirty) == clean
  assert notebooks.main([]) == 0
