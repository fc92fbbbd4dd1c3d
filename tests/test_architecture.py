"""The house keeps its shape: who imports whom, how long things are, what is unused."""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "flaxlm").rglob("*.py")) + sorted(
  (ROOT / "configs").glob("*.py")
)
DOORS = {
  "train", "evaluate", "prepare", "generate", "convert", "plan", "supervise", "doctor",
}  # fmt: skip
# A room may import the rooms to its right. `errors` is a leaf that anyone may import.
LEVELS = [
  {"planning", "interop"},
  {"inference"},
  {"runs"},
  {"training", "data"},
  {"models"},
  {"tokenizer"},
  {"config"},
  {"parallel", "kernels"},
  {"cli"},
  {"machine", "files", "console"},
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


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / "flaxlm").with_suffix("").parts[0]


def imports(tree):
  """Yields (module, is at the top level) of every import."""
  top = set(map(id, tree.body))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, id(node) in top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      names = [node.module] * (node.module != "flaxlm")
      if node.module.startswith("flaxlm"):  # a name may be a module: `import baseline`
        names += [f"{node.module}.{alias.name}" for alias in node.names]
      yield from ((name, id(node) in top) for name in names)


def package_files():
  for path in FILES:
    if path.is_relative_to(ROOT / "flaxlm"):
      yield path, room_of(path), ast.parse(path.read_text())


def test_rooms_import_only_to_their_right():
  level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
  for path, room, tree in package_files():
    for module, _ in imports(tree):
      if not module.startswith("flaxlm."):
        continue
      target = module.split(".")[1]
      if target == room:
        continue
      assert target not in DOORS, f"{path} imports the command {target}"
      if room not in DOORS:
        assert level[target] > level[room], f"{path}: {room} may not import {target}"


def test_kernels_and_parallel_need_jax_and_numpy_alone():
  allowed = {"jax", "numpy", "flaxlm"} | sys.stdlib_module_names
  for path, room, tree in package_files():
    if room in ("kernels", "parallel"):
      found = {module.split(".")[0] for module, _ in imports(tree)}
      assert found <= allowed, f"{path} imports {found - allowed}"


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


def test_no_pickle_no_eval_no_hidden_defaults():
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in ("eval", "exec", "__import__"), path
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        assert (node.value.id, node.attr) != ("config", "get"), path
        assert node.value.id != "pickle", path


def test_files_and_functions_stay_short():
  for path in FILES:
    text = path.read_text()
    assert text.count("\n") <= 500, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        limit = 90 if node.name == "train" else 60
        length = node.end_lineno - node.lineno + 1
        assert length <= limit, f"{path}: {node.name} is {length} lines"


def test_every_module_is_used_and_says_what_it_is():
  imported = {
    name
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]
    for name, _ in imports(ast.parse(path.read_text()))
  }
  for path, room, tree in package_files():
    assert ast.get_docstring(tree), f"{path} has no docstring"
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if room not in DOORS and path.name != "__init__.py":
      assert name in imported, f"nothing imports {path}"


def test_every_knob_is_read_somewhere():
  from flaxlm.config import base
  from flaxlm.config.load import flatten

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
