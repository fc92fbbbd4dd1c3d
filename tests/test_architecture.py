"""The code keeps its structure: import directions, lengths, nothing unused."""

import ast
import collections
import functools
import pathlib
import re
import subprocess
import sys

import pytest

from flaxlm.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "flaxlm").rglob("*.py")) + sorted(
  (ROOT / "configs").glob("*.py")
)
# A room may import the rooms on lines below its own, but not those on its own line.
LEVELS = [
  {"__main__", "__init__"},
  {"open_model"},
  {"planning", "interop", "evals", "serving"},
  {"inference"},
  {"runs"},
  {"training", "data"},
  {"models"},
  {"tokenizer"},
  {"config"},
  {"parallel", "kernels"},
  {"cli"},
  {"machine", "files", "json_files", "console"},
  {"errors"},
]
LAZY = {
  "tensorflow",
  "tensorflow_datasets",
  "sentencepiece",
  "pyarrow",
  "array_record",
  "tokenizers",
  "jinja2",
}
# The path of a batch from the config to the updated weight, in reading order.
SPINE = (
  "configs/quickstart.py",
  "flaxlm/runs/loop.py",
  "flaxlm/data/feed.py",
  "flaxlm/data/batches/packed.py",
  "flaxlm/models/transformer.py",
  "flaxlm/training/state.py",
  "flaxlm/training/losses.py",
  "flaxlm/training/optim.py",
)
# Test files that mirror no single file of flaxlm.
WITHOUT_A_MIRROR = {
  "test_architecture", "test_benchmarks", "test_end_to_end", "test_fine_tuning",
  "test_golden", "test_multihost", "test_package", "test_processes", "test_published",
  "test_readme", "test_real_runs",
  "interop/test_real_weights", "launch/test_cloud", "launch/test_files",
  "launch/test_machines", "models/test_families", "parallel/test_attention_on_a_mesh",
  "parallel/test_memory_of_steps", "planning/test_shipped", "serving/test_page",
  "soak/test_damage", "soak/test_kills", "soak/test_prepare",
}  # fmt: skip


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text())


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / "flaxlm").with_suffix("").parts[0]


def imports(tree):
  """Yields (module, whether it is at the top level) for every import."""
  top = set(map(id, tree.body))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, id(node) in top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:  # not `from . import x`
      names = [node.module] * (node.module != "flaxlm")
      if node.module.startswith("flaxlm"):  # a name may be a module
        names += [f"{node.module}.{alias.name}" for alias in node.names]
      yield from ((name, id(node) in top) for name in names)


def package_files():
  for path in FILES:
    if path.is_relative_to(ROOT / "flaxlm"):
      yield path, room_of(path), parse(path)


def test_rooms_import_only_to_their_right():
  level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
  for path, room, tree in package_files():
    for module, _ in imports(tree):
      if not module.startswith("flaxlm."):
        continue
      target = module.split(".")[1]
      if target == room:
        continue
      assert target not in COMMANDS, f"{path} imports the command {target}"
      if room not in COMMANDS:
        assert level[target] > level[room], f"{path}: {room} may not import {target}"


def test_below_runs_functions_take_the_groups_of_a_config_that_they_need():
  from flaxlm.config import base

  config = base.get_config()
  groups = {name for name in config if hasattr(config[name], "items")}
  for path, room, tree in package_files():
    if room in ("training", "data", "models", "tokenizer", "parallel", "kernels"):
      for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
          whole = node.value.id == "config" and node.attr in groups
          assert not whole, f"{path}:{node.lineno} takes the whole config"


def test_kernels_and_parallel_need_jax_and_numpy_alone():
  allowed = {"jax", "numpy", "flaxlm"} | sys.stdlib_module_names
  for path, room, tree in package_files():
    if room in ("kernels", "parallel"):
      found = {module.split(".")[0] for module, _ in imports(tree)}
      assert found <= allowed, f"{path} imports {found - allowed}"


def test_format_readers_of_interop_need_numpy_alone():
  for path, room, tree in package_files():
    if room != "interop" or path.stem in ("import_run", "export_run"):
      continue
    for module, _ in imports(tree):
      assert not module.startswith("flaxlm.runs"), f"{path} imports {module}"
      if path.stem != "huggingface":  # it makes models
        assert module.split(".")[0] not in ("jax", "flax"), f"{path} imports {module}"


def test_slow_libraries_are_imported_lazily_and_in_data_alone():
  for path, room, tree in package_files():
    for module, at_top in imports(tree):
      if module.split(".")[0] in LAZY:
        assert room in ("data", "tokenizer") and not at_top, f"{path} imports {module}"


def test_flax_is_used_as_plain_pytrees():
  allowed = {"Module", "Param", "Rngs", "Variable"}
  for path, _, _ in package_files():
    used = set(re.findall(r"\bnnx\.(\w+)", path.read_text()))
    assert used <= allowed, f"{path} uses nnx.{used - allowed}"


@pytest.mark.faults
def test_no_pickle_no_eval_no_hidden_defaults():
  for path in FILES:
    for node in ast.walk(parse(path)):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in ("eval", "exec", "__import__"), path
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        assert (node.value.id, node.attr) != ("config", "get"), path
        assert node.value.id != "pickle", path


def modules() -> dict[str, ast.Module]:
  """Returns every module of the package by its dotted name."""
  found = {}
  for path, _, tree in package_files():
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found[name.removesuffix(".__init__")] = tree
  return found


def test_no_import_circle():
  trees = modules()
  graph = {
    name: {target for target, _ in imports(tree) if target in trees and target != name}
    for name, tree in trees.items()
  }
  finished, walking = set(), []

  def visit(name):
    assert name not in walking, " -> ".join([*walking[walking.index(name) :], name])
    if name in finished:
      return
    walking.append(name)
    for target in sorted(graph[name]):
      visit(target)
    finished.add(walking.pop())

  for name in graph:
    visit(name)


def test_a_public_name_is_defined_once():
  places = collections.defaultdict(list)
  for module, tree in modules().items():
    for node in tree.body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = [node.name]
      elif isinstance(node, ast.Assign):
        names = [x.id for t in node.targets for x in ast.walk(t) if hasattr(x, "id")]
      else:
        continue
      for name in names:
        if not name.startswith("_") and name not in ("main", "make_parser"):
          places[name].append(module)
  assert not {name: where for name, where in places.items() if len(where) > 1}


def test_importing_a_module_changes_nothing():
  for module, tree in modules().items():
    for node in tree.body:
      if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = ast.unparse(node.value.func)
        assert call.endswith(".defvjp"), f"{module} calls {call} when it is imported"


def test_config_and_commands_are_read_without_jax():
  names = [f"flaxlm.{name}" for name in sorted(COMMANDS)]
  names += ["flaxlm.config.load", "flaxlm.kernels.attention", "flaxlm.machine"]
  names += ["flaxlm.runs.directory", "flaxlm.files", "flaxlm.console"]
  code = f"import sys, {', '.join(names)}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_library_code_does_not_import_the_configs_folder():
  for path, _, tree in package_files():
    for module, _ in imports(tree):
      assert module.split(".")[0] != "configs", path


def test_the_spine_stays_short():
  lines = {name: (ROOT / name).read_text().count("\n") for name in SPINE}
  assert sum(lines.values()) <= 1700, lines
  guide = (ROOT / "flaxlm/README.md").read_text()
  places = [guide.index(name) for name in SPINE]
  assert places == sorted(places), "flaxlm/README.md leads through the spine in order"


def test_readme_stays_short():
  assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_tests_mirror_the_package():
  tests = ROOT / "tests"
  found = {
    str(path.relative_to(tests).with_suffix("")) for path in tests.rglob("test_*.py")
  }
  assert found >= WITHOUT_A_MIRROR
  for name in found - WITHOUT_A_MIRROR:
    mirrored = ROOT / "flaxlm" / name.replace("test_", "", 1)
    assert mirrored.with_suffix(".py").is_file(), f"tests/{name}.py mirrors no file"


def test_files_and_functions_stay_short():
  for path in FILES:
    text = path.read_text()
    assert text.count("\n") <= 500, path
    for node in ast.walk(parse(path)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        limit = 90 if node.name == "train" else 60
        length = node.end_lineno - node.lineno + 1
        assert length <= limit, f"{path}: {node.name} is {length} lines"


def test_every_module_is_used_and_says_what_it_is():
  imported = {
    name
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]
    for name, _ in imports(parse(path))
  }
  for path, room, tree in package_files():
    assert ast.get_docstring(tree), f"{path} has no docstring"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if room not in COMMANDS and path.name != "__init__.py":
      assert name in imported, f"nothing imports {path}"


def test_every_knob_is_read_somewhere():
  from flaxlm.config import base
  from flaxlm.config.tree import flatten

  code = "\n".join(path.read_text() for path in FILES if path.parent.name != "configs")
  for key in flatten(base.get_config()):
    name = key.split(".")[-1]
    assert re.search(rf"\b{name}\b", code), f"nothing reads config.{key}"


def test_nothing_names_a_machine():
  for path in [
    *ROOT.glob("*.*"),
    *FILES,
    *(ROOT / "launch").iterdir(),
    ROOT / ".ci/run",
  ]:
    if path.is_file() and path.suffix in ("", ".py", ".md", ".sh", ".toml", ".yaml"):
      found = re.findall(r"(?<![\w.])/(?:work|root|home|tmp)/\w+", path.read_text())
      assert not found, f"{path}: {found}"
