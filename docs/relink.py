"""Mends the line numbers of links to definitions in README and docs.

  python docs/relink.py            mend them
  python docs/relink.py --check    only list those that are wrong

A link has the form [`Name`](../lavit_jax/path.py#L12), where `Name` is a
function, a class or a constant of that file; `Class.method` and `Class.field`
name what a class holds. Exit status 1 if a file or a definition is missing or,
with --check, if a number is wrong.
"""

import argparse
import ast
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)#L(\d+)\)")
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def pages() -> list[pathlib.Path]:
  """Returns the Markdown files that may hold such links."""
  return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def line_of(source: str, name: str) -> int | None:
  """Returns the line of a definition, or None if there is none.

  Args:
    source: text of a Python file.
    name: of a definition; dots lead into classes and functions.
  """
  body, node = ast.parse(source).body, None
  for part in name.split("."):
    node = next((x for x in body if part in _names(x)), None)
    if node is None:
      return None
    body = getattr(node, "body", [])
  return node.lineno


def _names(node: ast.AST) -> list[str]:
  """Returns the names that a statement defines."""
  if isinstance(node, _NAMED):
    return [node.name]
  targets = getattr(node, "targets", [getattr(node, "target", None)])
  return [t.id for t in targets if isinstance(t, ast.Name)]


def links(page: pathlib.Path) -> Iterator[tuple[re.Match, int | None, str]]:
  """Yields each link of a page, its right line and what is wrong with it.

  Args:
    page: a Markdown file.

  Yields:
    (match, line, fault): line is None where there is no such definition;
    fault is "" where all is well.
  """
  for match in LINK.finditer(page.read_text("utf-8")):
    name, target, stated = match.groups()
    path = (page.parent / target).resolve()
    where = f"{page.relative_to(ROOT)}: {name} in {target}"
    if not path.is_file():
      yield match, None, f"{where}: there is no such file"
      continue
    line = line_of(path.read_text("utf-8"), name)
    if line is None:
      yield match, None, f"{where}: the file defines no {name}"
    else:
      wrong = f"{where}: the link says line {stated}, it is line {line}"
      yield match, line, "" if line == int(stated) else wrong


def mend(page: pathlib.Path) -> list[str]:
  """Writes the right numbers into a page; returns what it cannot mend."""
  text, right, lost = page.read_text("utf-8"), {}, []
  for match, line, fault in links(page):
    if line is None:
      lost.append(fault)
    else:
      right[match.span(3)] = str(line)
  for (start, end), number in sorted(right.items(), reverse=True):
    text = text[:start] + number + text[end:]
  if text != page.read_text("utf-8"):
    page.write_text(text, "utf-8")
  return lost


def main() -> int:
  """Mends or checks all pages; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="change nothing")
  check = parser.parse_args().check
  faults = [
    fault
    for page in pages()
    for fault in ([f for *_, f in links(page) if f] if check else mend(page))
  ]
  print("\n".join(faults), end="\n" if faults else "", file=sys.stderr)
  return 1 if faults else 0


if __name__ == "__main__":
  sys.exit(main())
