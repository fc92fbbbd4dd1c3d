"""The command: what it asks of the model, and what it prints."""

import pytest

from flaxlm import generate
from flaxlm.errors import ConfigError


class Writing:
  """Stands for what `LanguageModel.stream` returns."""

  def __init__(self, pieces, finish):
    self.pieces, self.finish = pieces, finish

  def __iter__(self):
    yield from self.pieces


@pytest.fixture
def ask(monkeypatch, capsys):
  """Runs the command on a model that writes these pieces; returns what it printed."""
  monkeypatch.setattr(generate, "find_model", lambda *_: None)
  monkeypatch.setattr(generate.machine, "keep_freed_memory", lambda: "")
  asked = {}

  def run(pieces, *flags, finish=("",)):
    class Model:
      class config:
        max_len = 64

      def stream(self, prompts, **options):
        asked.update(options, prompts=prompts)
        if options["max_tokens"] < 1:
          raise ConfigError("max_tokens", options["max_tokens"], "1 or more", "5")
        return Writing(pieces, list(finish))

    monkeypatch.setattr(generate, "load_model", lambda *_, **__: Model())
    generate.main(["--workdir=x", *flags])
    return capsys.readouterr(), asked

  return run


def test_one_text_is_printed_after_its_prompt(ask):
  flags = "--prompt=Once", "--special", "--stop=a", "--stop=b", "--when_full=continue"
  (out, err), asked = ask([[" upon"], [" a time"]], *flags)
  assert out == "Once upon a time\n" and err == ""
  assert asked == {
    "prompts": ["Once"], "specials": True, "stop": ["a", "b"], "max_tokens": 200,
    "when_full": "continue", "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": 0,
  }  # fmt: skip


def test_several_texts_are_printed_when_they_are_complete(ask):
  pieces = [["1", "2"], ["3", "4"]]
  (out, _), asked = ask(pieces, "--prompt=a", "--num_samples=2", finish=("", "end"))
  assert out == "--- 1 of 2 ---\na13\n--- 2 of 2 ---\na24\n"
  assert asked["prompts"] == ["a", "a"] and not asked["specials"]


def test_a_full_context_is_said_beside_the_text(ask):
  (out, err), _ = ask([["b"]], finish=("context",))
  assert out == "b\n" and "64 tokens is full; --when_full=continue" in err


def test_flags_are_refused_by_their_names(ask):
  with pytest.raises(ConfigError, match=r"^--max_tokens cannot.*\n.*0\n.*1 or.*\n.*5"):
    ask([], "--max_tokens=0")
  with pytest.raises(ConfigError, match=r"^--top_p cannot"):
    ask([], "--top_p=0")
  with pytest.raises(ConfigError, match=r"^--num_samples"):
    ask([], "--num_samples=0")
