"""A conversation at a terminal or through a pipe, with a model that is a script."""

import io
import os
import signal
import sys

import numpy as np
import pytest

from flaxlm import chat
from flaxlm.errors import ConfigError


class Model:
  """Stands for a `LanguageModel`: answers with given pieces, keeps what was asked."""

  def __init__(self, *answers, template=True, finish=""):
    self.answers, self.asked, self.options = list(answers), [], []
    self.template = object() if template else None
    self.finish, self.config = [finish], type("Config", (), {"max_len": 64})

  def stream(self, prompts, **options):
    if isinstance(prompts[0], str):
      self.asked.append(prompts[0])
      self.options.append(options)
    return self

  def chat_stream(self, messages, **options):
    self.asked.append([(m["role"], m["content"]) for m in messages])
    self.options.append(options)
    return self

  def __iter__(self):
    answer = self.answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    for piece in answer:
      if piece == "^C":
        os.kill(os.getpid(), signal.SIGINT)
        continue
      yield [piece]


@pytest.fixture
def talk(monkeypatch, capsys):
  """Runs the command on lines; returns what it printed, and its messages."""
  monkeypatch.setattr(chat, "find_model", lambda *_: None)
  monkeypatch.setattr(chat.machine, "keep_freed_memory", lambda: "")

  def run(model, lines, *flags, terminal=False):
    monkeypatch.setattr(chat, "load_model", lambda *_, **__: model)
    stdin = io.StringIO(lines)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    chat.main(["--workdir=x", *flags])
    return capsys.readouterr()

  return run


def test_a_conversation_is_remembered_until_it_is_begun_again(talk):
  model = Model(["4", "."], ["6."], ["8."])
  out, _ = talk(
    model, "2 + 2?\n\n3 + 3?\n/new\n4 + 4?", "--system=Be short.", "--stop=x"
  )
  assert out == "4.\n6.\n8.\n"
  first = [("system", "Be short."), ("user", "2 + 2?")]
  assert model.asked == [
    first,
    [*first, ("assistant", "4."), ("user", "3 + 3?")],
    [("system", "Be short."), ("user", "4 + 4?")],
  ]
  assert model.options[0]["stop"] == ["x"] and "max_tokens" not in model.options[0]


def test_without_a_template_each_line_is_continued(talk):
  model = Model([" upon"], [" time"], template=False)
  assert talk(model, "Once\nA\n", "--max_tokens=5").out == " upon\n time\n"
  assert model.asked == ["Once", "A"] and model.options[0]["max_tokens"] == 5
  with pytest.raises(ConfigError, match="--system"):
    talk(model, "", "--system=Be short.")


def test_ctrl_c_stops_the_answer_and_twice_the_program(talk):
  before = signal.getsignal(signal.SIGINT)
  model = Model(["One", "^C", " two", " three"], ["Four"])
  out, _ = talk(model, "Count.\nGo on.\n")
  assert out == "One two\nFour\n"
  assert model.asked[1][1] == ("assistant", "One two")
  with pytest.raises(KeyboardInterrupt):
    talk(Model(["One", "^C", "^C", "two"]), "Count.\n")
  assert signal.getsignal(signal.SIGINT) == before


def test_a_failed_turn_ends_a_pipe_but_not_a_conversation(talk, monkeypatch):
  full = ConfigError("the prompt", "70 tokens", "at most 63")
  with pytest.raises(ConfigError, match="at most 63"):
    talk(Model(full), "a\nb\n")
  lines = iter(["a", KeyboardInterrupt(), "b"])

  def typed(prompt):
    line = next(lines, EOFError())
    if isinstance(line, BaseException):
      raise line
    return line

  monkeypatch.setattr("builtins.input", typed)
  model = Model(full, ["B"], finish="context")
  out, err = talk(model, "", terminal=True)
  assert "B\n" in out and "Ctrl-D" in out and model.asked[1] == [("user", "b")]
  assert "at most 63" in err and "the context of 64 tokens is full" in err


def test_a_terminal_obeys_nothing_that_a_model_writes(talk, monkeypatch):
  model = Model(["a\x1b[2Jb\tc\n\u009b"])
  assert talk(model, "x\n").out == "a\x1b[2Jb\tc\n\u009b\n"
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  model = Model(["a\x1b[2Jb\tc\n\u009b"])
  assert talk(model, "x\n").out == "a\\x1b[2Jb\tc\n\\x9b\n"


def test_flags_are_refused_by_their_names(talk):
  class Strict(Model):
    def stream(self, prompts, **options):
      raise ConfigError("max_tokens", options["max_tokens"], "a whole number")

  with pytest.raises(ConfigError, match=r"^--max_tokens cannot"):
    talk(Strict(), "a\n", "--max_tokens=0")
  with pytest.raises(ConfigError, match=r"^--temperature cannot"):
    talk(None, "a\n", f"--temperature={np.nan}")  # before the model is read
