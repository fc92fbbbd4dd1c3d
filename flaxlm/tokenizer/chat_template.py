"""Renders conversations with a chat template, as `transformers` does, and encodes them.

A template is Jinja2 source. It renders a list of messages to one text, in which special
tokens are written by name. A name counts only where the template itself wrote it:
"<|im_end|>" in a message stays text and does not end the turn. Apart from such forged
names, the ids are those of `apply_chat_template`.
"""

import datetime
import itertools
import pathlib
import re
import secrets
from typing import NamedTuple

import numpy as np

from flaxlm import errors
from flaxlm.json_files import read_json
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.files_beside import find_template
from flaxlm.tokenizer.pieces import find_special_names
from flaxlm.tokenizer.template_process import TemplateFault, templates

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
# The default: ChatML, after the bos that every document begins with.
CHATML = """{{ bos_token }}{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Some templates write today's date, but training must give the same ids every day. This
# is the date that Llama 3.1's template writes if it has no clock.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


class Turn(NamedTuple):
  """The assistant says text[start:end], its end-of-turn token included."""

  start: int
  end: int


class ChatTemplate:
  """A chat template; `now` is the date that it writes, if it writes one.

  It is rendered in another process, with limits: see template_worker.py.

  Raises:
    ConfigError: it is not Jinja2, or jinja2 is not installed.
  """

  def __init__(self, source: str, now: datetime.datetime = TEMPLATE_DATE):
    self.source, self._now = source, now.isoformat()
    try:
      templates.compile(source, self._now)
    except ImportError as error:
      raise errors.ConfigError(
        "config.task.chat_template", "a Jinja2 template, without jinja2",
        "that library", "pip install jinja2",
      ) from error  # fmt: skip
    except TemplateFault as error:
      raise errors.ConfigError(
        "config.task.chat_template", f"{source[:60]!r}.. ({error})", "a Jinja2 template"
      ) from error

  def render(
    self, messages: list[dict], tokenizer: AnyTokenizer, prompt: bool = False
  ) -> str:
    """Returns the text of a conversation; `prompt` adds the assistant's next header.

    Raises:
      DataError: the template refuses the messages, or fails.
    """
    return self.render_all([(messages, prompt)], tokenizer)[0]

  def render_all(
    self, conversations: list[tuple[list[dict], bool]], tokenizer: AnyTokenizer
  ) -> list[str]:
    """Returns the text of each (messages, prompt); see `render`."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    common = {
      "tools": None,
      "documents": None,
      "bos_token": names.get(tokenizer.bos_id, ""),
      "eos_token": names.get(tokenizer.eos_id, ""),
      "pad_token": names.get(tokenizer.pad_id, ""),
      "unk_token": names.get(tokenizer.unk_id, ""),
    }
    variables = [
      common | {"messages": messages, "add_generation_prompt": prompt}
      for messages, prompt in conversations
    ]
    try:
      return templates.render(self.source, self._now, variables)
    except TemplateFault as error:
      roles = " ".join(message["role"] for message in conversations[-1][0][:8])
      raise errors.DataError(
        "the chat template refuses a conversation",
        f"{roles or 'no messages'} ({error})",
        "messages that config.task.chat_template takes",
      ) from error


def open_template(path: str, tokenizer: AnyTokenizer) -> ChatTemplate:
  """Opens the template of config.task.chat_template.

  Args:
    path: a file of Jinja2 source, a tokenizer_config.json, or a directory with either,
      as `transformers` saves them. "" means the tokenizer's own template, or ChatML.

  Raises:
    MissingInputError: the file does not exist or holds no template.
    ConfigError: ChatML, but the tokenizer has no <|im_start|> and <|im_end|>.
  """
  if path:
    return ChatTemplate(read_template(pathlib.Path(path).expanduser()))
  if tokenizer.chat_template:
    return ChatTemplate(tokenizer.chat_template)
  needed = ("<|im_start|>", "<|im_end|>")
  if any(tokenizer.control_id(name) < 0 for name in needed):
    raise errors.ConfigError(
      "config.task.chat_template", "'' (ChatML)",
      "a tokenizer with the special tokens <|im_start|> and <|im_end|>",
      "train it with --config.tokenizer.user_symbols='<|im_start|>,<|im_end|>'",
    )  # fmt: skip
  return ChatTemplate(CHATML)


def read_template(path: pathlib.Path) -> str:
  """Returns the template's source in a file or a directory; see `open_template`."""
  problem = "no chat_template in it"
  try:
    if path.is_dir():
      file = path / "tokenizer_config.json"
      source = find_template(path, read_json(file) if file.exists() else {})
    elif path.suffix == ".json":
      source = find_template(path.parent, read_json(path))
    else:
      source = path.read_text("utf-8")
  except (OSError, ValueError) as error:
    source, problem = "", str(error)
  if not source:
    raise errors.MissingInputError(
      f"config.task.chat_template={path} holds no template",
      problem,
      "a Jinja2 file, or a tokenizer_config.json with a chat_template",
    )
  return source


def encode_chat(
  messages: list[dict], tokenizer: AnyTokenizer, template: ChatTemplate
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a conversation to learn the assistant's turns.

  A turn is predicted without its header, up to and including the special token that
  ends it. The text is cut where the assistant begins to speak, so the ids before a turn
  are those of `encode_prompt`.

  Args:
    messages: dicts with the texts role and content. Tool calls are refused; other keys
      are ignored.

  Returns:
    (ids int32 L, is_predicted bool L).

  Raises:
    DataError: the messages are malformed, the template refuses them, or its text of
      all messages does not begin with its text of the first ones.
  """
  messages = check_messages(messages)
  text = template.render(messages, tokenizer)
  turns = find_turns(messages, tokenizer, template, text)
  pieces = encode_pieces(messages, tokenizer, template, text, turns, False)
  specials = special_names(tokenizer)
  special_ids = {tokenizer.special_tokens[name] for name in specials}
  rows, marks = [], []
  for start, stop, ids in pieces:
    mark = np.zeros(len(ids), bool)
    for turn in turns:
      if turn.start <= start and stop <= turn.end:
        mark[:] = True
      elif turn.start <= start < turn.end:  # the piece continues after the turn
        count = len(find_special_names(text[start : turn.end], specials))
        places = [i for i, token in enumerate(ids) if token in special_ids]
        mark[: places[count - 1] + 1] = True
    rows.append(ids)
    marks.append(mark)
  return np.concatenate(rows), np.concatenate(marks)


def encode_prompt(
  messages: list[dict], tokenizer: AnyTokenizer, template: ChatTemplate
) -> np.ndarray:
  """Returns the ids (int32 L) that the assistant's answer follows."""
  messages = check_messages(messages)
  text = template.render(messages, tokenizer, prompt=True)
  turns = find_turns(messages, tokenizer, template, text)
  pieces = encode_pieces(messages, tokenizer, template, text, turns, True)
  return np.concatenate([ids for _, _, ids in pieces])


def check_messages(messages: object) -> list[dict[str, str]]:
  """Returns the messages with role and content alone; DataError names a wrong one."""
  if not isinstance(messages, list) or not messages:
    raise malformed(f"{str(messages)[:60]}", "a list of messages")
  checked = []
  for number, message in enumerate(messages, 1):
    where = f"message {number} of {len(messages)}"
    if not isinstance(message, dict):
      raise malformed(f"{where} is {str(message)[:60]!r}", "a dict of role and content")
    role, content = message.get("role"), message.get("content")
    if role not in CHAT_ROLES:
      raise malformed(f"{where} has role {role!r}", f"one of {' '.join(CHAT_ROLES)}")
    if not isinstance(content, str):
      raise malformed(f"{where} ({role}) has content {content!r:.60}", "a text")
    calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
    if calls:
      raise malformed(f"{where} ({role}) has {calls[0]}", "content alone")
    checked.append({"role": role, "content": content})
  return checked


def malformed(given: str, needed: str) -> errors.DataError:
  """Returns the error for a conversation that cannot be encoded."""
  return errors.DataError("a conversation is malformed", given, needed)


def find_turns(
  messages: list[dict], tokenizer: AnyTokenizer, template: ChatTemplate, text: str
) -> list[Turn]:
  """Returns where the assistant speaks in the text of a conversation."""
  names, turns = special_names(tokenizer), []
  spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
  wanted = [pair for i in spoken for pair in ((i, True), (i + 1, False))]
  rendered = iter(
    template.render_all([(messages[:i], p) for i, p in wanted], tokenizer)
    if wanted
    else []
  )
  for number in spoken:
    message, prompt, until = messages[number], next(rendered), next(rendered)
    start, content = len(prompt), message["content"].strip()
    at = text.find(content, start) if text.startswith(prompt) else -1
    if at < 0:
      raise errors.DataError(
        "the chat template rewrites what came before",
        f"message {number + 1}, which should follow {prompt[-30:]!r}",
        "a text of all messages that begins with the text of the first ones, and "
        "holds what the assistant says unchanged",
      )
    stop = at + len(content)
    # A turn ends with the first special token after its content, if there is one before
    # the next turn. Templates without special tokens end it with their own text.
    shared = common_prefix(text, until)
    following = [end for _, end in find_special_names(text, names) if end > stop]
    is_own = following and (following[0] <= shared or shared < stop)
    turns.append(Turn(start, following[0] if is_own else max(shared, stop)))
  return turns


def common_prefix(a: str, b: str) -> int:
  """Returns how many characters two texts have in common at their beginning."""
  if a.startswith(b):  # nearly always
    return len(b)
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def special_names(tokenizer: AnyTokenizer) -> list[str]:
  """Returns the names of special tokens, without <unk>: plain text may become that."""
  return [name for name, i in tokenizer.special_tokens.items() if i != tokenizer.unk_id]


def encode_pieces(
  messages: list[dict],
  tokenizer: AnyTokenizer,
  template: ChatTemplate,
  text: str,
  turns: list[Turn],
  prompt: bool,
) -> list[tuple[int, int, np.ndarray]]:
  """Encodes the text of a conversation in pieces; returns (start, stop, ids) of each.

  It is cut where the assistant begins to speak, where a turn ends without a special
  token, and inside forged names of special tokens: half a name is plain text.
  """
  names = special_names(tokenizer)
  forged = find_forged(messages, tokenizer, template, text, prompt)
  ends = {end for start, end in find_special_names(text, names) if start not in forged}
  cuts = {turn.start for turn in turns} | {start + 1 for start in forged}
  cuts |= {turn.end for turn in turns} - ends
  bounds = sorted({0, len(text)} | cuts)
  pieces = []
  for start, stop in itertools.pairwise(bounds):
    ids = encode_part(tokenizer, text[start:stop], is_first=start == 0)
    pieces.append((start, stop, np.array(ids, np.int32)))
  if forged:
    special_ids = [tokenizer.special_tokens[name] for name in names]
    found = sum(int(np.isin(ids, special_ids).sum()) for _, _, ids in pieces)
    if found != len(find_special_names(text, names)) - len(forged):
      raise malformed("special tokens in a message", "text that can be told from them")
  return pieces


def encode_part(tokenizer: AnyTokenizer, text: str, is_first: bool) -> list[int]:
  """Encodes a piece of a rendered conversation, special tokens included.

  Some tokenizers put a space before every text (Llama 2, Mistral), which is wrong for
  all pieces but the first. That space then replaces the one that the piece begins with,
  or is removed together with a newline that is put before the piece.
  """
  names = special_names(tokenizer)
  starts_special = any(text.startswith(name) for name in names)
  if is_first or not tokenizer.adds_prefix or starts_special:
    return tokenizer.encode(text, specials=True)
  if text.startswith(" "):
    return tokenizer.encode(text[1:], specials=True)
  line = tokenizer.encode("\n")
  ids = tokenizer.encode("\n" + text, specials=True)
  if line and ids[: len(line)] == line:
    return ids[len(line) :]
  return tokenizer.encode(text, specials=True)


def find_forged(
  messages: list[dict],
  tokenizer: AnyTokenizer,
  template: ChatTemplate,
  text: str,
  prompt: bool,
) -> list[int]:
  """Returns where a message, not the template, wrote a special token's name in `text`.

  Contents that hold such names are replaced by random words, and the template is
  rendered again. Its own text around those words shows where the contents are.
  """
  names = special_names(tokenizer)
  contents, masked = {}, []  # by the random word that replaces them
  for message in messages:
    if find_special_names(message["content"], names):
      word = secrets.token_hex(16)
      contents[word] = message["content"]
      masked.append(message | {"content": word})
    else:
      masked.append(message)
  if not contents:
    return []
  rendered = template.render(masked, tokenizer, prompt)
  pattern = ""
  for part in re.split(f"({'|'.join(contents)})", rendered):
    if part in contents:  # templates may strip spaces around a content
      content = contents[part]
      forms = {content, content.strip(), content.lstrip(), content.rstrip()}
      forms = sorted(forms, key=len, reverse=True)
      pattern += f"({'|'.join(map(re.escape, forms))})"
    else:
      pattern += re.escape(part)
  match = re.fullmatch(pattern, text)
  if match is None:
    raise malformed(
      "special tokens in a message that the chat template rewrites",
      "messages without them, or a template that leaves messages as they are",
    )
  spans = [match.span(i + 1) for i in range(len(match.groups()))]
  return [
    start
    for start, end in find_special_names(text, names)
    if any(start < last and end > first for first, last in spans)
  ]
