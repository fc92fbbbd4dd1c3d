"""Chat templates are programs of others: what they do is their fault, and bounded."""

import os
import time

import psutil
import pytest

from flaxlm import errors
from flaxlm.tokenizer.chat_template import CHATML, ChatTemplate
from flaxlm.tokenizer.template_process import TemplateFault, TemplateProcess, templates

pytest.importorskip("jinja2")

NOW = "2024-07-26"
MESSAGES = [{"role": "user", "content": "hi"}]


class Plain:
  """A tokenizer without special tokens."""

  special_tokens: dict = {}  # noqa: RUF012
  bos_id = eos_id = pad_id = unk_id = -1


@pytest.fixture(scope="module")
def impatient():
  process = TemplateProcess(seconds=0)  # ends in the second second
  yield process
  process.close()


@pytest.mark.parametrize(
  ("source", "needle"),
  [
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ 'a' | center(10 ** 10) }}", "MemoryError"),
    ("{{ messages[0].content * 10 ** 10 }}", "MemoryError|OverflowError"),
    ("{% for i in range(20000) %}{{ 'a' * 1000 }}{% endfor %}", "characters of output"),
    ("{{ 1 / (messages | length - 1) }}", "ZeroDivisionError"),
    ("{{ range(10 ** 9) | length }}", "OverflowError"),
    ("{{ messages.x.y }}", "UndefinedError"),
    ("{{ messages[0]['content'] + 1 }}", "TypeError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ strftime_now(3) }}", "TypeError"),
    ("{{ {1: 2} | tojson(indent='x' * 9, default=3) }}", "Error|x"),
    ("{{ raise_exception(messages) }}", "role"),
    ("{% include 'x' %}", "TypeError|Error"),
  ],
)
def test_what_a_template_raises_is_its_own_fault(source, needle):
  try:
    text = ChatTemplate(source).render(MESSAGES, Plain)
  except errors.UserError as error:
    assert "chat" in str(error).splitlines()[0]
    text = str(error)
  assert any(part in text for part in needle.split("|")), text
  # The process goes on, with this template and with others.
  assert "hi" in ChatTemplate(CHATML).render(MESSAGES, Plain)


def test_messages_of_a_template_do_not_reach_the_terminal_as_they_are():
  template = ChatTemplate("{{ raise_exception('\x1b[31mred\x07\n' * 99) }}")
  with pytest.raises(errors.DataError, match="refuses a conversation") as caught:
    template.render(MESSAGES, Plain)
  shown = errors.terminal_text(caught.value)
  assert "\x1b" not in shown and "\x07" not in shown and "red" in shown
  assert len(shown) < 1000


def test_a_template_that_does_not_end_is_ended(impatient):
  source = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
  )
  start = time.process_time()
  with pytest.raises(TemplateFault, match="took more than"):
    impatient.render(source, NOW, [{}])
  assert time.process_time() - start < 1  # none of it was ours
  assert impatient.render("{{ x }}", NOW, [{"x": 1}, {"x": "é"}]) == ["1", "é"]


def test_memory_of_a_template_is_bounded():
  process = TemplateProcess()
  source = "{% set n = namespace(s='a') %}" + "{% set n.s = n.s ~ n.s %}" * 40
  with pytest.raises(TemplateFault, match=r"MemoryError|more than 512 MiB"):
    process.render(source, NOW, [{}])
  assert process.render("{{ 1 }}", NOW, [{}]) == ["1"]
  process.close()


def test_a_process_that_has_died_is_replaced():
  template = ChatTemplate(CHATML)
  before = templates._process
  psutil.Process(before.pid).kill()
  before.wait()
  assert "hi" in template.render(MESSAGES, Plain)
  assert templates._process.pid != before.pid
  # It ends with the process that asks, and is not shared with a fork of it.
  process = TemplateProcess()
  process.compile("{{ 1 }}", NOW)
  child = process._process
  process._owner = os.getpid() + 1  # as it looks in a fork
  assert process.render("{{ 2 }}", NOW, [{}]) == ["2"]
  assert process._process.pid != child.pid and child.poll() is None
  child.stdin.close()
  assert child.wait(10) == 0
  child.stdout.close()
  process.close()
