"""All commands in one: `flaxlm train …` is `python -m flaxlm.train …`.

The overview reads the commands' docstrings from their files, because importing them
takes seconds.
"""

import ast
import os
import pathlib
import runpy
import sys

import flaxlm

# In the order in which a user meets them.
COMMANDS = (
  "prepare",
  "train",
  "evaluate",
  "lm_eval",
  "generate",
  "chat",
  "serve",
  "convert",
  "plan",
  "doctor",
  "supervise",
)


def main() -> None:
  """Runs the command that the first argument names, as `python -m` would."""
  command = "".join(sys.argv[1:2])
  if command == "lm-eval":  # as that program writes itself; ours is a module too
    command = "lm_eval"
  if "_ARGCOMPLETE" in os.environ:
    command = _completed_command()
  if command in ("", "-h", "--help"):
    print(overview())
  elif command == "--version":
    print(flaxlm.__version__)
  elif command in COMMANDS:
    del sys.argv[1:2]
    if not sys.flags.safe_path and sys.path[0] != os.getcwd():
      sys.path.insert(0, os.getcwd())  # a user's own modules: configs, TFDS builders
    runpy.run_module(f"flaxlm.{command}", run_name="__main__", alter_sys=True)
  else:
    from flaxlm import cli

    cli.run_command(lambda: _refuse(command), cache=False)


def overview() -> str:
  """Returns the usage, one line per command, and how to get help for each."""
  lines = [flaxlm.__doc__.strip(), "", "usage: flaxlm COMMAND [arguments]"]
  lines += ["       python -m flaxlm.COMMAND [arguments]", ""]
  for command in COMMANDS:
    source = (pathlib.Path(__file__).parent / f"{command}.py").read_text("utf-8")
    summary = ast.get_docstring(ast.parse(source)).splitlines()[0]
    lines.append(f"  {command:10} {summary}")
  return "\n".join([*lines, "", "`flaxlm COMMAND --help` explains a command."])


def _refuse(command: str) -> None:
  import difflib

  from flaxlm.errors import ConfigError

  near = difflib.get_close_matches(command, COMMANDS, n=2)
  needed = "one of " + " ".join(COMMANDS)
  raise ConfigError("the command", command, needed, " or ".join(near))


def _completed_command() -> str:
  """Completes the command for a shell, or returns it to complete its own flags.

  The protocol is argcomplete's: `eval "$(register-python-argcomplete flaxlm)"`.
  """
  import argparse

  import argcomplete

  line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
  words = line.split(" ")  # the last one is incomplete
  if len(words) > 2 and words[1] in COMMANDS:
    os.environ["_ARGCOMPLETE"] = "2"  # argcomplete: the second word starts the line
    return words[1]
  parser = argparse.ArgumentParser()
  parser.add_argument("command", choices=COMMANDS)
  argcomplete.autocomplete(parser)
  raise AssertionError("argcomplete ends the process")


if __name__ == "__main__":
  main()
