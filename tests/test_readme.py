"""What a machine can check in the READMEs is true: commands, paths, lengths.

Each command is parsed by its own parser, and its config is loaded with its overrides;
launch scripts print what they would run. Nothing is trained.
"""

import argparse
import ast
import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest

from flaxlm import errors
from flaxlm.config import base
from flaxlm.config.check import check_config
from flaxlm.config.choices import check_value
from flaxlm.config.load import load_config
from flaxlm.config.tree import flatten

ROOT = pathlib.Path(__file__).parents[1]
SKIPPED = {".git", ".venv", "runs", "build", "dist", "shared"}
READMES = sorted(
  path
  for path in ROOT.rglob("README.md")
  if not SKIPPED & set(path.relative_to(ROOT).parts)
)
LIBRARY = ROOT / "flaxlm/LIBRARY.md"  # test_open_model.py runs its examples
READMES_AND_LIBRARY = [*READMES, LIBRARY]
ALL_PAGES = [*READMES_AND_LIBRARY, ROOT / "tests/benchmarks/RESULTS.md"]
MAX_WORDS = 30  # in a sentence
STARTS = ("python ", "bash ", "flaxlm ", "pip ", "source ", "docker ", "pytest ")
PLACEHOLDERS = {"...", "COMMAND", "NAME"}
ABBREVIATIONS = ("e.g.", "i.e.", "vs.", "etc.")
PRINTING = {"local", "slurm", "tpu_vm", "gke", "sky"}  # scripts with --print
TO_PYTEST = {"test"}  # scripts whose arguments are pytest's
OURS = ("flaxlm/", "tests/", "launch/", "configs/")


class Parsed(Exception):
  """Raised by a parser once it has parsed, so that the command does not run."""


def of_each(pages):
  return pytest.mark.parametrize(
    "page", pages, ids=lambda page: str(page.relative_to(ROOT))
  )


# Reading Markdown ------------------------------------------------------------------


def blocks(page) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns (lines outside code, [(language, text) of each block of code])."""
  prose, code, fence = [], [], None
  for line in page.read_text().splitlines():
    if line.startswith("```"):
      if fence is None:
        fence = (line.removeprefix("```").strip(), [])
      else:
        code.append((fence[0], "\n".join(fence[1])))
        fence = None
    elif fence is not None:
      fence[1].append(line)
    elif line.startswith("    "):
      if prose and prose[-1] is not None:
        prose.append(None)  # marks a block of code
        code.append(("", ""))
      code[-1] = ("", code[-1][1] + line[4:] + "\n")
    elif line or not prose or prose[-1] is not None:
      prose.append(line)
  return [line or "" for line in prose], code


def sentences(lines: list[str]):
  """Yields the sentences outside code, tables and headings; code counts as a word."""
  paragraphs, current = [], []
  for line in [*lines, ""]:
    is_item = re.match(r"(-|\*|\d+\.) ", line)
    if not line or is_item or line.startswith(("|", "#", "<")):
      paragraphs.append(" ".join(current))
      current = []
    if line and not line.startswith(("|", "#", "<")):
      current.append(line.removeprefix(is_item[0]) if is_item else line)
  for text in paragraphs:
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+", "link", text)
    for short in ABBREVIATIONS:
      text = text.replace(short, short.replace(".", ""))
    yield from re.split(r"(?<=[.!?])[\"')*]*\s+", text)


def inline_code(lines: list[str]) -> list[str]:
  text = "\n\n".join("\n".join(lines).split("\n\n"))
  return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def commands(page) -> list[list[str]]:
  """Returns the words of every command of a page, from code blocks and text."""
  lines, code = blocks(page)
  texts = [code for code in inline_code(lines) if code.startswith(STARTS)]
  for language, text in code:
    if language != "python":
      joined = text.replace("\\\n", " ").splitlines()
      texts += [line for line in joined if line.startswith(STARTS)]
  found = []
  for text in texts:
    words = []
    for word in [*shlex.split(text, comments=True), "&&"]:
      if word in ("&&", "||", "|", ";"):
        found += [words] if words else []
        words = []
      else:
        words.append(word)
  return found


# Checking commands -----------------------------------------------------------------


def check_command(words: list[str], monkeypatch) -> None:
  """Raises if this command would not be understood."""
  program, *rest = words
  for word in rest:
    if word.startswith(OURS) and "*" not in word:
      assert (ROOT / word).exists(), word
    extra = re.fullmatch(r"EXTRA=(\w+)", word)
    assert not extra or extra[1] in extras(), word
  if words[0] == "flaxlm" or words[:2] == ["python", "-m"]:
    name = rest[0] if program == "flaxlm" else rest[1].removeprefix("flaxlm.")
    arguments = rest[1:] if program == "flaxlm" else rest[2:]
    if name not in {*PLACEHOLDERS, "pytest", "flaxlm"}:
      check_flaxlm(name, arguments, monkeypatch)
  elif program == "python":
    check_benchmark(*rest)
  elif program == "bash":
    check_script(*rest, monkeypatch=monkeypatch)
  elif program == "pip":
    wanted = re.findall(r"\.\[([\w,]+)\]", " ".join(rest))
    assert set(",".join(wanted).split(",")) <= extras() | {""}, words


def check_flaxlm(name: str, arguments: list[str], monkeypatch) -> None:
  assert (ROOT / f"flaxlm/{name}.py").is_file(), f"there is no command {name}"
  if not any(word.startswith("--") for word in arguments):
    return  # the name of a command, not a use of it
  if "--" in arguments:
    at = arguments.index("--")
    inner = arguments[at + 1 :]
    if inner[0] not in PLACEHOLDERS:
      check_command(inner, monkeypatch)
    arguments = [*arguments[:at], "--", "a command"]
  args, rest = parse(name, arguments, monkeypatch)
  unknown = [word for word in rest if not word.startswith("--config.")]
  assert not unknown, f"flaxlm {name} does not know {unknown}"
  overrides = [word.removeprefix("--config.") for word in rest]
  paths = getattr(args, "config", None) or "configs/quickstart.py"
  for path in [paths] if isinstance(paths, str) else paths:
    path = "configs/quickstart.py" if path in PLACEHOLDERS else path
    load_config(path, overrides)


def parse(name: str, arguments: list[str], monkeypatch) -> tuple:
  """Returns (args, remaining arguments) from the command's own parser."""
  original = argparse.ArgumentParser.parse_known_args

  def parse_and_stop(parser, args=None, namespace=None):
    raise Parsed(original(parser, args, namespace))

  with monkeypatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    with pytest.raises(Parsed) as parsed:
      importlib.import_module(f"flaxlm.{name}").main(arguments)
  return parsed.value.args[0]


def check_benchmark(script: str, *arguments: str) -> None:
  known = {
    node.args[0].value
    for node in ast.walk(ast.parse((ROOT / script).read_text()))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == "add_argument"
  }
  given = {word.split("=")[0] for word in arguments if word.startswith("--")}
  assert given <= known, f"{script} does not know {given - known}"


def check_script(script: str, *arguments: str, monkeypatch) -> None:
  path, name = ROOT / script, pathlib.Path(script).stem
  assert path.is_file(), script
  if "..." not in " ".join(arguments) and name in PRINTING:
    fill = [re.sub("=[A-Z]+$", lambda m: m[0].lower(), word) for word in arguments]
    shown = ["bash", path, "--print", *fill]
    done = subprocess.run(shown, capture_output=True, text=True)
    assert done.returncode == 0, f"{script} {arguments}: {done.stderr}"
  elif name not in PRINTING | TO_PYTEST:
    text = path.read_text()
    for word in arguments:
      if word.startswith("--") and not word.startswith("--config."):
        assert f"{word.split('=')[0]})" in text, f"{script} does not know {word}"
  ours = [word for word in arguments if word.startswith(("--config", "--workdir"))]
  if ours:
    check_flaxlm("train", ours, monkeypatch)


def extras() -> set[str]:
  """Returns the extras of setup.py."""
  for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
    if isinstance(node, ast.keyword) and node.arg == "extras_require":
      return {key.value for key in node.value.keys}
  raise AssertionError("setup.py has no extras_require")


# Tests -----------------------------------------------------------------------------


@pytest.fixture
def in_root(monkeypatch, tmp_path):
  """Works in the clone, on a machine that seems to have two GPUs."""
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\necho GPU 0\necho GPU 1\n")
  smi.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  monkeypatch.chdir(ROOT)


def test_the_first_page_is_one_page():
  assert (ROOT / "README.md").read_text().count("\n") <= 150


@of_each(READMES_AND_LIBRARY)
def test_sentences_are_short(page):
  for sentence in sentences(blocks(page)[0]):
    words = [word for word in sentence.split() if re.search(r"\w", word)]
    assert len(words) <= MAX_WORDS, f"{len(words)} words: {sentence}"


@of_each(ALL_PAGES)
def test_paths_and_links_exist(page):
  lines, _ = blocks(page)
  for link in re.findall(r"\]\(([^)]+)\)", "\n".join(lines)):
    target = link.split("#")[0]
    assert "://" in link or (page.parent / target).exists(), link
  for code in inline_code(lines):
    if re.search(r"[\s<*…{=]|NAME|STEP", code) or code.startswith(("runs/", "--")):
      continue
    if code.startswith(OURS) or re.search(r"\.(py|sh|md|yaml)$|\w/$", code):
      places = (ROOT, page.parent, ROOT / "flaxlm")
      file = code.partition("::")[0]  # the test below knows the tests in files
      assert any((place / file).exists() for place in places), code


@of_each(READMES_AND_LIBRARY)
def test_commands_are_understood(page, in_root, monkeypatch):
  for words in commands(page):
    try:
      check_command(words, monkeypatch)
    except (SystemExit, errors.UserError) as error:
      raise AssertionError(f"{shlex.join(words)}: {error}") from error


@of_each(READMES_AND_LIBRARY)
def test_knobs_exist(page):
  lines, _ = blocks(page)
  flat = flatten(base.get_config())
  known = set(flat)
  known |= {".".join(key.split(".")[:n]) for key in known for n in (1, 2)}
  for code in inline_code(lines):
    key, equals, value = code.removeprefix("--").removeprefix("config.").partition("=")
    group = key.split(".")[0]
    if not re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) or group not in known:
      continue
    if re.search(r"\.(py|sh|md|json|model|txt|jsonl)$", key):
      continue
    assert key in known, code
    if equals:
      kind = type(flat[key])
      assert kind is not bool or value in ("true", "false"), code
      check_value(f"config.{key}", key, kind(value))


@of_each(READMES)
def test_python_examples_run(page, in_root):
  for language, text in blocks(page)[1]:
    if language == "python":
      config = base.get_config()
      names = {"base": base, "config": config}
      exec(compile(text, str(page), "exec"), names)
      check_config(names["get_config"]() if "get_config" in names else config)


def test_commands_are_found_in_the_pages():
  """Guards against a change of layout that leaves nothing to check."""
  found = [" ".join(words) for page in READMES for words in commands(page)]
  for name in ("prepare", "train", "evaluate", "generate", "convert", "plan"):
    assert any(text.startswith(f"python -m flaxlm.{name} ") for text in found), name
  assert sum(text.startswith("bash launch/") for text in found) >= 15
  assert sum(text.startswith("python tests/benchmarks/") for text in found) >= 8


# The table of faults ---------------------------------------------------------------


def test_the_table_of_faults_names_tests_that_are_marked():
  rows = re.findall(
    r"^\| ([BFNS]\d+) \|.*\| (.+) \|$", (ROOT / "tests/README.md").read_text(), re.M
  )
  counts = {"B": 23, "F": 32, "N": 9, "S": 16}
  cases = [f"{kind}{i}" for kind, count in counts.items() for i in range(1, count + 1)]
  of_the_server = {f"S{i}" for i in range(8, 14)}
  assert [case for case, _ in rows] == [c for c in cases if c not in of_the_server]
  for case, tests in rows:
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", tests)
    assert named or tests.startswith("none: "), f"{case} has neither tests nor a reason"
    for file, name in named:
      tree = ast.parse((ROOT / file).read_text())
      found = [node for node in tree.body if getattr(node, "name", "") == name]
      assert found, f"{case}: {file} has no {name}"
      marks = [ast.unparse(decorator) for decorator in found[0].decorator_list]
      assert "pytest.mark.faults" in marks, f"{case}: {name} is not marked"
