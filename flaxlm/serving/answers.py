"""From the engine's tokens to the objects that clients of OpenAI's API read."""

import dataclasses
import functools
import secrets
import time
from collections.abc import Iterator, Sequence

from flaxlm.errors import UserError
from flaxlm.inference.engine import Candidates, Engine, Request
from flaxlm.inference.language_model import LanguageModel
from flaxlm.inference.sampling import Sampling
from flaxlm.inference.text import TextStream, end_of_turn, tokenize_prompt
from flaxlm.serving.fields import ApiError, Asked
from flaxlm.tokenizer.chat_template import encode_prompt

_LEAST = -9999.0  # stands for a log probability of minus infinity
_FINISH = {"end": "stop", "stop": "stop", "length": "length"}


class Texts:
  """What a model's tokenizer and template make of requests and tokens."""

  def __init__(self, model: LanguageModel, engine: Engine):
    self.model, self.engine, self.tokenizer = model, engine, model.tokenizer
    self.end_ids = frozenset(
      i for i in (self.tokenizer.eos_id, *model.end_ids) if i >= 0
    )
    self._pieces = self.tokenizer.pieces()
    self._names = {i: name for name, i in self.tokenizer.special_tokens.items()}

  @functools.cached_property
  def end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return end_of_turn(self.tokenizer, self.model.template)

  def prompts(self, asked: Asked) -> list[list[int]]:
    """Returns the ids of each prompt of a completion; ids are taken as they are."""
    return [
      tokenize_prompt(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
      for prompt in asked.prompt
    ]

  def conversation(self, asked: Asked) -> list[int]:
    """Returns the ids that the assistant's answer follows.

    Raises:
      ApiError: the model has no chat template, or its template refuses the messages.
    """
    if self.model.template is None:
      message = (
        "this model has no chat template: it continues texts, see /v1/completions; "
        "or serve it with --chat_template=FILE"
      )
      raise ApiError(message, "messages", "no_chat_template")
    try:
      return encode_prompt(asked.prompt, self.tokenizer, self.model.template).tolist()
    except UserError as error:
      raise ApiError(one_line(error), "messages") from None

  def requests(
    self, asked: Asked, prompts: Sequence[list[int]], client: str, chat: bool
  ) -> list["Choice"]:
    """Returns the choices of an answer, in their order, checked but not yet queued."""
    ends, stops = self.end_of_turn if chat else ((), ())
    end_ids = frozenset() if asked.ignore_eos else self.end_ids | frozenset(ends)
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    choices = []
    for prompt in prompts:
      room = self.engine.context - len(prompt)
      for index in range(asked.n):
        request = Request(
          prompt,
          max(room, 1) if asked.max_tokens is None else asked.max_tokens,
          Sampling(asked.temperature, asked.top_k, asked.top_p, seed, index),
          end_ids | asked.stop_ids,
          asked.bias,
          lists=asked.top_logprobs is not None,
          scores_prompt=asked.echo and asked.top_logprobs is not None,
          client=client,
          streams=asked.stream,
        )
        self._check(request)
        begins = chat or not any(map(self.bytes_of, prompt))
        stream = TextStream(self.tokenizer, end_ids, (*asked.stop, *stops), begins)
        choices.append(Choice(len(choices), request, stream, asked, self))
    return choices

  def _check(self, request: Request) -> None:
    room = self.engine.context - len(request.prompt)
    if room < request.max_tokens:
      message = (
        f"this model's context is {self.engine.context} tokens; the prompt has "
        f"{len(request.prompt)} and max_tokens asks for {request.max_tokens}"
      )
      raise ApiError(message, "max_tokens", "context_length_exceeded")
    if max(request.prompt) >= len(self._pieces):
      message = f"prompt: the tokenizer has ids from 0 to {len(self._pieces) - 1}"
      raise ApiError(message, "prompt")
    try:
      self.engine.check(request)
    except UserError as error:
      raise ApiError(one_line(error), getattr(error, "key", None)) from None

  def name(self, token: int) -> str:
    """Returns a text for a token: its own, or its bytes if they are no whole text."""
    if token in self._names:
      return self._names[token]
    piece = self._pieces[token] if token < len(self._pieces) else b""
    try:
      return piece.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
      return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

  def bytes_of(self, token: int) -> list[int]:
    return list(self._pieces[token]) if token < len(self._pieces) else []

  def likeliest(self, token: int, log_p: float, best, best_log_p, count: int) -> dict:
    """Returns {text: log p} of the `count` likeliest tokens and of the token itself."""
    found = {}
    for i, p in [(token, log_p), *zip(best[:count], best_log_p[:count], strict=True)]:
      name = self.name(i)
      if name in found and i != token:  # another token of the same text
        name = f"token_id:{i}"
      found[name] = max(p, _LEAST)
    return found


@dataclasses.dataclass
class Choice:
  """One text of an answer, as it grows."""

  index: int
  request: Request
  stream: TextStream
  asked: Asked
  texts: Texts
  seen: int = 0  # tokens that were taken from the request
  text: str = ""  # that they make
  offset: int = 0  # characters before the next token
  finish: str | None = None

  def take(self) -> tuple[str, list[int]]:
    """Returns what is new: (text, its tokens).

    Tokens are taken one by one, so that what is made while a stop string is found
    counts no more than what is made before: the answer depends on no timing.
    """
    request, text, first = self.request, "", self.seen
    ended, tokens = request.finish, request.tokens  # in this order
    while self.finish is None and self.seen < len(tokens):
      text += self.stream([tokens[self.seen]])
      self.seen += 1
      if self.stream.is_done:
        self.finish = "stop"
        request.cancel()
    if self.finish is None and ended:
      text += self.stream([], final=True)
      self.finish = _FINISH.get(self.stream.finish or ended, "error")
    self.text += text
    return text, tokens[first : self.seen]

  @property
  def is_over(self) -> bool:
    return self.finish is not None

  def echoed(self) -> str:
    """Returns the text of the prompt, if it is part of the answer."""
    if not self.asked.echo:
      return ""
    given = self.asked.prompt[self.index // self.asked.n]
    return given if isinstance(given, str) else self.texts.model.decode(given)

  def list_prompt(self) -> dict | None:
    """Returns the log probabilities of the prompt, the first of which has none."""
    if not self.asked.echo or self.asked.top_logprobs is None:
      return None
    prompt, texts = self.request.prompt, self.texts
    first = texts.name(prompt[0])
    found = {
      "tokens": [first], "token_logprobs": [None], "top_logprobs": [None],
      "text_offset": [0],
    }  # fmt: skip
    self.offset = len(texts.model.decode(prompt[:1]))
    rest = self._list(prompt[1:], self.request.prompt_listed, 0)
    return {key: value + rest[key] for key, value in found.items()}

  def list_tokens(self, new: list[int]) -> dict | None:
    """Returns the log probabilities of the last tokens, as completions have them."""
    if self.asked.top_logprobs is None:
      return None
    return self._list(new, self.request.listed, self.seen - len(new))

  def _list(self, tokens: Sequence[int], listed: Candidates, first: int) -> dict:
    names, tops, offsets, texts = [], [], [], self.texts
    for place, token in enumerate(tokens, first):
      best = listed.best[place], listed.best_log_p[place]
      log_p = listed.log_p[place]
      names.append(texts.name(token))
      tops.append(texts.likeliest(token, log_p, *best, self.asked.top_logprobs))
      offsets.append(self.offset)
      self.offset += len(texts.model.decode([token]))
    log_p = [max(x, _LEAST) for x in listed.log_p[first : first + len(tokens)]]
    return {
      "tokens": names, "token_logprobs": log_p, "top_logprobs": tops,
      "text_offset": offsets,
    }  # fmt: skip

  def list_chat(self, new: list[int]) -> dict | None:
    """Returns the log probabilities of the last tokens, as chats have them."""
    if self.asked.top_logprobs is None:
      return None
    listed, first = self.request.listed, self.seen - len(new)

    def entry(token: int, log_p: float) -> dict:
      own = self.texts.bytes_of(token)
      return {
        "token": self.texts.name(token),
        "logprob": max(log_p, _LEAST),
        "bytes": own,
      }

    content = []
    for place, token in enumerate(new, first):
      best = zip(listed.best[place], listed.best_log_p[place], strict=True)
      tops = [entry(*pair) for pair in best][: self.asked.top_logprobs]
      content.append(entry(token, listed.log_p[place]) | {"top_logprobs": tops})
    return {"content": content, "refusal": None}


class Answer:
  """The objects of one answer, whole or in chunks."""

  def __init__(self, choices: list[Choice], model: str, chat: bool):
    self.choices, self.model, self.chat = choices, model, chat
    kind = "chatcmpl" if chat else "cmpl"
    self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())

  def usage(self) -> dict:
    """Returns how many tokens were read and made; equal prompts are counted once."""
    asked = self.choices[0].asked
    prompts = [choice.request for choice in self.choices[:: asked.n]]
    read = sum(len(request.prompt) for request in prompts)
    made = sum(choice.seen for choice in self.choices)
    reused = sum(request.reused for request in prompts)
    return {
      "prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made,
      "prompt_tokens_details": {"cached_tokens": reused},
    }  # fmt: skip

  def whole(self) -> dict:
    """Returns the answer, when all its requests have ended."""
    name = "chat.completion" if self.chat else "text_completion"
    choices = [self._whole_choice(choice) for choice in self.choices]
    return self._object(name, choices) | {"usage": self.usage()}

  def _whole_choice(self, choice: Choice) -> dict:
    prompt, new = choice.list_prompt(), choice.request.tokens[: choice.seen]
    if self.chat:
      message = {"role": "assistant", "content": choice.text, "refusal": None}
      return self._choice(choice, {"message": message}, choice.list_chat(new))
    listed = choice.list_tokens(new)
    if prompt is not None:
      listed = {key: prompt[key] + listed[key] for key in prompt}
    return self._choice(choice, {"text": choice.echoed() + choice.text}, listed)

  def begin(self) -> Iterator[dict]:
    """Yields the chunks that come before any token."""
    for choice in self.choices:
      if self.chat:
        yield self._chunk(choice, {"role": "assistant", "content": ""}, None)
      elif choice.asked.echo:
        yield self._chunk(choice, choice.echoed(), choice.list_prompt())

  def news(self) -> Iterator[dict]:
    """Yields chunks with what is new of each text, and why it ended."""
    for choice in self.choices:
      if choice.is_over:
        continue
      text, new = choice.take()
      listed = choice.list_chat(new) if self.chat else choice.list_tokens(new)
      if text or (listed and new):
        delta = {"content": text} if self.chat else text
        yield self._chunk(choice, delta, listed, over=False)
      if choice.is_over:
        yield self._chunk(choice, {} if self.chat else "", None)

  def last(self) -> dict:
    """Returns the chunk with the usage, which has no choices."""
    name = "chat.completion.chunk" if self.chat else "text_completion"
    return self._object(name, []) | {"usage": self.usage()}

  def _chunk(self, choice: Choice, delta, listed, over: bool = True) -> dict:
    content = {"delta": delta} if self.chat else {"text": delta}
    one = self._choice(choice, content, listed)
    if not over:
      one["finish_reason"] = None
    name = "chat.completion.chunk" if self.chat else "text_completion"
    chunk = self._object(name, [one])
    return chunk | {"usage": None} if choice.asked.usage else chunk

  def _object(self, name: str, choices: list) -> dict:
    return {
      "id": self.id, "object": name, "created": self.created, "model": self.model,
      "choices": choices,
    }  # fmt: skip

  def _choice(self, choice: Choice, content: dict, listed: dict | None) -> dict:
    return {
      "index": choice.index, **content, "logprobs": listed,
      "finish_reason": choice.finish,
    }  # fmt: skip


def one_line(error: UserError) -> str:
  """Returns the message of an error in one line."""
  return " ".join(str(error).split())
