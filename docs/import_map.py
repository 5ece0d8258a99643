"""Prints who imports whom in lavit_jax, and what breaks the house's rules.

  python docs/import_map.py            the map, folder by folder
  python docs/import_map.py --check    the broken rules alone; status 1 if any

The rules:
  * a package imports only from packages on lower floors (LAYERS);
  * within any folder, modules and sub-packages import in one direction;
  * a folder has at most 12 entries: modules and sub-packages;
  * modules are imported by their whole names, from the package's own folders
    alone: not relatively, not `lavit_jax` itself, no test, no benchmark;
  * an import stands at the top of its module, unless it is of an optional
    extra: then the line ends in the comment `# optional extra`.

Imports are read from the source: nothing of the package is run. `lavit_jax.X`
within the package would hide which module is meant.
"""

import argparse
import ast
import collections
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "lavit_jax"
MOST_ENTRIES = 12
OPTIONAL = "# optional extra"
# Floors, the lowest first. Packages on one floor know nothing of one another.
LAYERS = (
  ("core",),
  ("models", "diffusion", "data"),
  ("cost", "infer"),
  ("train", "port"),
  ("aot", "evaluate"),
  ("jobs",),
  ("commands",),
)

_FOLDERS = {name for names in LAYERS for name in names} | {"configs"}

Graph = dict[str, set[str]]


def modules(root: pathlib.Path = ROOT) -> dict[str, pathlib.Path]:
  """Returns every module of the package, by dotted name."""
  found = {}
  for path in sorted((root / PACKAGE).rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    found[".".join(parts).removesuffix(".__init__")] = path
  return found


def imports(paths: Mapping[str, pathlib.Path]) -> Graph:
  """Returns the modules of the package that each module imports."""
  graph: Graph = {}
  for name, path in paths.items():
    graph[name] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      if isinstance(node, ast.Import):
        graph[name] |= {a.name for a in node.names if a.name in paths}
      elif isinstance(node, ast.ImportFrom) and node.module:
        whole = {f"{node.module}.{a.name}" for a in node.names}
        graph[name] |= {w for w in whole if w in paths}
        if not whole <= paths.keys() and node.module in paths:
          graph[name].add(node.module)
  return graph


def arrows(graph: Graph) -> dict[str, Graph]:
  """Returns, for every folder, the arrows between its entries."""
  folders: dict[str, Graph] = {}
  for source, targets in graph.items():
    for target in targets:
      a, b = source.split("."), target.split(".")
      same = sum(1 for _ in _common(a, b))
      if same < min(len(a), len(b)):
        folder = folders.setdefault(".".join(a[:same]), {})
        folder.setdefault(a[same], set()).add(b[same])
  return folders


def circles(graph: Graph) -> list[list[str]]:
  """Returns the groups of nodes that reach one another."""
  reach = {node: _reached(graph, node) for node in graph}
  groups = {
    tuple(sorted(n for n in reach[node] if node in reach.get(n, ())))
    for node in graph
    if node in reach[node]
  }
  return [list(group) for group in sorted(groups)]


def entries(paths: Iterable[str]) -> dict[str, list[str]]:
  """Returns the modules and sub-packages of every folder."""
  folders = collections.defaultdict(set)
  for name in paths:
    parts = name.split(".")
    for i in range(1, len(parts)):
      if not parts[i].startswith("__"):
        folders[".".join(parts[:i])].add(parts[i])
  return {folder: sorted(found) for folder, found in sorted(folders.items())}


def broken(root: pathlib.Path = ROOT) -> list[str]:
  """Returns one sentence for every rule that is broken."""
  paths = modules(root)
  graph = imports(paths)
  found = [f"circle of modules: {' '.join(c)}" for c in circles(graph)]
  for folder, inside in sorted(arrows(graph).items()):
    found += [f"circle in {folder}: {' '.join(c)}" for c in circles(inside)]
  found += _upward(arrows(graph).get(PACKAGE, {}))
  for folder, names in entries(paths).items():
    if len(names) > MOST_ENTRIES:
      found.append(
        f"{folder} has {len(names)} entries, more than {MOST_ENTRIES}:"
        f" {' '.join(names)}"
      )
  for name, path in paths.items():
    found += [f"{name}: {line}" for line in _hidden(path)]
    if name not in (PACKAGE, f"{PACKAGE}.__main__"):
      found += [f"{name}: {line}" for line in _unclear(path)]
  return found


def _upward(packages: Graph) -> Iterator[str]:
  """Yields the arrows that do not go to a lower floor."""
  floor = {name: i for i, names in enumerate(LAYERS) for name in names}
  for source, targets in sorted(packages.items()):
    if source.startswith("__"):
      continue  # __main__ may import what it likes
    for target in sorted(targets - {"configs"}):  # lies beside the package
      if source not in floor or target not in floor:
        yield f"{source} or {target} is on no floor: add it to LAYERS"
      elif floor[source] <= floor[target]:
        yield f"{source} imports {target}, which is not on a lower floor"


def _hidden(path: pathlib.Path) -> list[str]:
  """Returns the imports within functions that are not of an optional extra."""
  source = path.read_text("utf-8")
  lines = source.splitlines()
  found = {}  # by line: a function may stand within a function
  for function in ast.walk(ast.parse(source)):
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    for node in ast.walk(function):
      if isinstance(node, ast.Import | ast.ImportFrom):
        line = lines[node.lineno - 1]
        if OPTIONAL not in line or _never_optional(node):
          found[node.lineno] = line.strip()
  return [f"line {n} imports in a function: {found[n]}" for n in sorted(found)]


def _never_optional(node: ast.Import | ast.ImportFrom) -> bool:
  """Returns whether an import is of what every installation has."""
  module = getattr(node, "module", None)
  names = [module] if module else [a.name for a in node.names]
  tops = {name.split(".")[0] for name in names}
  return bool(tops & (sys.stdlib_module_names | {PACKAGE}))


def _unclear(path: pathlib.Path) -> Iterator[str]:
  """Yields imports that do not name a module of the package or a library."""
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.level:
      yield f"line {node.lineno} imports relatively: give the whole name"
    elif isinstance(node, ast.Import | ast.ImportFrom):
      names = {a.name for a in node.names}
      if isinstance(node, ast.ImportFrom):
        tops = {(node.module or "").split(".")[0]}
        if node.module == PACKAGE and not names <= _FOLDERS | {"__version__"}:
          yield f"line {node.lineno} imports from {PACKAGE} itself"
      else:
        tops = {name.split(".")[0] for name in names}
        if PACKAGE in names:
          yield f"line {node.lineno} imports {PACKAGE} itself"
      for top in sorted(tops & {"tests", "benchmarks", "docs"}):
        yield f"line {node.lineno} imports {top}, which is not installed"


def _common(a, b):
  """Yields the names that two dotted names begin with."""
  for x, y in zip(a, b, strict=False):
    if x != y:
      return
    yield x


def _reached(graph: Graph, start: str) -> set[str]:
  """Returns all that can be reached from a node."""
  found: set[str] = set()
  todo = list(graph.get(start, ()))
  while todo:
    node = todo.pop()
    if node not in found:
      found.add(node)
      todo.extend(graph.get(node, ()))
  return found


def _print_map() -> None:
  paths = modules()
  inside = arrows(imports(paths))
  print("floors, the lowest first:")
  for names in LAYERS:
    print(f"  {'  '.join(names)}")
  for folder, names in entries(paths).items():
    print(f"\n{folder}: {len(names)} entries")
    for name in names:
      targets = sorted(inside.get(folder, {}).get(name, ()))
      print(f"  {name:22}{'-> ' + ' '.join(targets) if targets else ''}")


def main() -> int:
  """Prints the map and what is broken; 1 if anything is."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", action="store_true", help="no map")
  if not parser.parse_args().check:
    _print_map()
    print()
  found = broken()
  for line in found:
    print(line)
  print("no rule is broken" if not found else f"{len(found)} rules are broken")
  return 1 if found else 0


if __name__ == "__main__":
  sys.exit(main())
