"""From prompts to texts: encodes, decodes and streams; prints nothing.

A text ends at one of the model's end tokens or at a stop string. Neither is part of it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import generate
from flaxlm.inference.sampling import Sampling
from flaxlm.models.transformer import Transformer
from flaxlm.tokenizer.chat_template import ChatTemplate, find_turns, special_names
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.pieces import Decoder, find_special_names


def beginning(tokenizer: AnyTokenizer) -> list[int]:
  """Returns what the tokenizer puts before every text: the bos token, or nothing."""
  return list(tokenizer.begin_ids)


def tokenize_prompt(
  tokenizer: AnyTokenizer, text: str, specials: bool = False
) -> list[int]:
  """Returns the ids of a prompt, after those that begin a text if there are any.

  A prompt without text is the token that begins documents, also where the tokenizer
  puts nothing before a text.

  Args:
    specials: the name of a special token in the text is that token. A prompt that
      begins with the beginning-of-text token gets no second one.
  Raises:
    ConfigError: there are no ids, so nothing to decode from.
  """
  begin, ids = beginning(tokenizer), tokenizer.encode(text, specials)
  if not specials or ids[: len(begin)] != begin:
    ids = begin + ids
  if not ids and tokenizer.bos_id >= 0:
    return [tokenizer.bos_id]
  if not ids:
    needed = "a text: this tokenizer has no bos token to begin with"
    raise ConfigError("the prompt", "none", needed)
  return ids


def text_ids(
  tokenizer: AnyTokenizer, vocab_size: int, end_ids: Sequence[int] = ()
) -> np.ndarray:
  """Returns which ids stand for text or end it, bool V.

  Args:
    vocab_size: the model's; its embedding may have rows to spare.
    end_ids: that end a text, besides the tokenizer's.
  """
  allowed_V = np.zeros(vocab_size, bool)
  for i, piece in enumerate(tokenizer.pieces()[:vocab_size]):
    allowed_V[i] = piece != b"" and i != tokenizer.unk_id
  allowed_V[[i for i in (tokenizer.eos_id, *end_ids) if 0 <= i < vocab_size]] = True
  return allowed_V


def end_of_turn(
  tokenizer: AnyTokenizer, template: ChatTemplate
) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """Returns what ends the assistant's turn: (ids of special tokens, stop strings).

  That is the special token after what the assistant says. In a template without one,
  it is the text up to what the user says next.
  """
  asked, said = "QQQ", "AAA"
  user, assistant = {"role": "user", "content": asked}, {"role": "assistant"}
  messages = [user, assistant | {"content": said}, user]
  text = template.render(messages, tokenizer)
  turn = find_turns(messages, tokenizer, template, text)[0]
  closing = text[text.index(said, turn.start) + len(said) : turn.end]
  names = special_names(tokenizer)
  if spans := find_special_names(closing, names):
    return (tokenizer.special_tokens[closing[slice(*spans[-1])]],), ()
  stop = (closing + text[turn.end :].partition(asked)[0]).rstrip()
  return (), (stop,) if stop else ()


class TextStream:
  """The text of one row, as its tokens arrive.

  Args:
    end_ids: that end the text, besides the tokenizer's.
    stop: texts that end it too. What may become one of them is held back.
    begins: the row begins a text, as an answer does; else it continues a prompt, and
      a space at its start belongs to it.
  """

  def __init__(
    self,
    tokenizer: AnyTokenizer,
    end_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    begins: bool = False,
  ):
    if "" in stop:
      raise ConfigError("stop", "''", "texts of one character or more")
    self.finish = ""  # why the text ended: end | stop | context; "" if it has not
    self._end_ids, self._stop = {tokenizer.eos_id, *end_ids}, tuple(stop)
    self._decoder = Decoder(tokenizer, begins)
    self._held = ""

  @property
  def is_done(self) -> bool:
    """Whether the text has ended; what follows is ignored."""
    return bool(self.finish)

  def __call__(self, ids: Sequence[int], final: bool = False) -> str:
    """Returns the text that is complete now; `final` also flushes what is not.

    Args:
      ids: new tokens; -1 where the context was full.
    """
    if self.is_done:
      return ""
    at = next((n for n, i in enumerate(ids) if i < 0 or i in self._end_ids), None)
    if at is not None:
      self.finish = "context" if ids[at] < 0 else "end"
      ids = ids[:at]
    final = final or self.is_done
    text = self._held + self._decoder(ids, final)
    found = [(text.find(stop), stop) for stop in self._stop if stop in text]
    if found:
      self.finish, self._held = "stop", ""
      return text[: min(found)[0]]
    size = 0 if final else _beginning_of_stop(text, self._stop)
    self._held = text[len(text) - size :]
    return text[: len(text) - size]


def _beginning_of_stop(text: str, stops: Sequence[str]) -> int:
  """Returns how many of the last characters may be the beginning of a stop string."""
  sizes = [
    size
    for stop in stops
    for size in range(1, min(len(stop), len(text) + 1))
    if text.endswith(stop[:size])
  ]
  return max(sizes, default=0)


class Writing:
  """Iterates over what is new of each text, until all end or have `max_tokens`.

  Args:
    prompts: as `tokenize_prompt` returns them; their text is not part of the result.
    sampling: one per prompt or one for all, as in `generate`.
    end_ids, stop: what ends a text; see `TextStream`.
    when_full: stop | continue, when a text fills the context; see `generate`.
    begins: the texts do not continue the prompts, but begin after them, as answers do.
  """

  def __init__(
    self,
    model: Transformer,
    tokenizer: AnyTokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling | Sequence[Sampling],
    end_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    when_full: str = "stop",
    begins: bool = False,
  ):
    if max_tokens < 1:
      raise ConfigError("max_tokens", max_tokens, "a whole number from 1 up")
    pieces = tokenizer.pieces()
    self._streams = [
      TextStream(tokenizer, end_ids, stop, begins or not any(pieces[i] for i in prompt))
      for prompt in prompts
    ]
    allowed_V = text_ids(tokenizer, model.config.vocab_size, end_ids)
    self._tokens = generate(model, prompts, max_tokens, sampling, allowed_V, when_full)

  def __iter__(self) -> Iterator[list[str]]:
    for new in self._tokens:
      pairs = zip(self._streams, new.tolist(), strict=True)
      yield [stream(row) for stream, row in pairs]
      if all(stream.is_done for stream in self._streams):
        break
    yield [stream([], final=True) for stream in self._streams]

  @property
  def finish(self) -> list[str]:
    """Why each text ended: end | stop | context; "" at `max_tokens`."""
    return [stream.finish for stream in self._streams]
