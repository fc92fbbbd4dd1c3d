"""What a request may say: the fields of OpenAI's API, and what becomes of the others.

A field that would change the text and is not supported is refused. A field that nobody
knows is left out and named in the answer's header; with `--strict` it is refused too.
No HTTP here.
"""

import base64
import dataclasses
import difflib
import math

import numpy as np

from flaxlm.errors import DataError
from flaxlm.inference.slots import MAX_BIASES, MAX_LISTED
from flaxlm.json_files import parse_json

MAX_STOPS = 16
_NEUTRAL = {
  "model", "user", "metadata", "store", "service_tier", "safety_identifier",
  "prompt_cache_key",
}  # fmt: skip
# Would change the text; each with the values that ask for nothing.
_UNSUPPORTED = {
  "best_of": (1,), "suffix": ("",), "tools": ([],), "tool_choice": ("none", "auto"),
  "functions": ([],), "function_call": ("none", "auto"), "parallel_tool_calls": (),
  "response_format": ({"type": "text"},), "audio": (), "modalities": (["text"],),
  "reasoning_effort": (), "prediction": (), "web_search_options": (),
  "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
  "min_p": (0,), "logprobs_mode": (), "guided_json": (), "guided_regex": (),
  "guided_grammar": (), "truncate_prompt_tokens": (), "add_special_tokens": (True,),
}  # fmt: skip
_SHARED = {
  "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "seed",
  "stop", "stop_token_ids", "ignore_eos", "logit_bias", "logprobs", "stream",
  "stream_options",
}  # fmt: skip
_COMPLETION = _SHARED | {"prompt", "echo"}
_CHAT = _SHARED | {"messages", "top_logprobs"}


class ApiError(Exception):
  """A request that is not answered, in the form that OpenAI's clients read.

  Args:
    param: the field that is to blame.
    code: a word for programs.
  """

  def __init__(
    self, message: str, param: str | None = None, code: str | None = None,
    status: int = 400, kind: str = "invalid_request_error",
  ):  # fmt: skip
    super().__init__(message)
    self.status = status
    self.body = {
      "error": {"message": message, "type": kind, "param": param, "code": code}
    }


@dataclasses.dataclass
class Asked:
  """A checked request for text.

  Args:
    prompt: texts or lists of ids; of a chat the messages.
    max_tokens: None is as far as the context goes.
    top_logprobs: likeliest tokens to list per place; None lists nothing.
    seed: None is another one each time.
    ignored: names of fields that were left out.
  """

  prompt: list
  max_tokens: int | None
  temperature: float
  top_p: float
  top_k: int
  n: int
  seed: int | None
  stop: tuple[str, ...]
  stop_ids: frozenset[int]
  ignore_eos: bool
  bias: dict[int, float]
  top_logprobs: int | None
  echo: bool
  stream: bool
  usage: bool
  ignored: tuple[str, ...]


def read_body(content: bytes) -> dict:
  """Returns the JSON object that a client sent."""
  try:
    return parse_json(content, "the body")
  except DataError as error:
    raise ApiError(" ".join(str(error).split()), code="invalid_json") from None


def check_model(body: dict, model: str, any_name: bool) -> None:
  """Raises ApiError unless the request asks for the model that is served."""
  name = body.get("model")
  if name is not None and name != model and not any_name:
    message = f"the model {_show(name)} is not served here; {model} is"
    raise ApiError(message, "model", "model_not_found", 404)


def read_completion(body: dict, strict: bool = False) -> Asked:
  """Returns what /v1/completions was asked."""
  ignored = _check_names(body, _COMPLETION, strict)
  top = _whole(body, "logprobs", 0, MAX_LISTED)
  return _read(body, _read_prompts(body.get("prompt")), 16, top, ignored)


def read_chat(body: dict, strict: bool = False) -> Asked:
  """Returns what /v1/chat/completions was asked."""
  ignored = _check_names(body, _CHAT, strict)
  messages, names = _read_messages(body.get("messages"), strict)
  top = _whole(body, "top_logprobs", 0, MAX_LISTED)
  if not _truth(body, "logprobs"):
    if top is not None:
      raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
  else:
    top = top or 0
  return _read(body, messages, None, top, (*ignored, *names))


def read_texts(body: dict) -> list[str]:
  """Returns the texts to embed or classify, of the field input."""
  texts = body.get("input")
  texts = [texts] if isinstance(texts, str) else texts
  known = isinstance(texts, list) and 0 < len(texts) <= 2048
  if not known or not all(isinstance(text, str) for text in texts):
    raise ApiError("input must be a text, or a list of up to 2048 texts", "input")
  return texts


def encode_vector(body: dict, vector: np.ndarray) -> list[float] | str:
  """Returns a vector as numbers or as base64 of little-endian float32."""
  if (form := body.get("encoding_format") or "float") not in ("float", "base64"):
    raise ApiError(f"encoding_format {_show(form)} is not known", "encoding_format")
  if body.get("dimensions") not in (None, len(vector)):
    message = f"dimensions: this model's vectors have {len(vector)}"
    raise ApiError(message, "dimensions")
  if form == "base64":
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
  return vector.tolist()


def _read(body: dict, prompt: list, max_tokens: int | None, top, ignored) -> Asked:
  limits = [_whole(body, name, 0) for name in ("max_tokens", "max_completion_tokens")]
  given = {limit for limit in limits if limit is not None}
  if len(given) > 1:
    message = "max_tokens and max_completion_tokens say different numbers"
    raise ApiError(message, "max_tokens")
  echo = _truth(body, "echo")
  max_tokens = given.pop() if given else max_tokens
  if max_tokens == 0 and not echo:
    raise ApiError("max_tokens is 0, which only makes sense with echo", "max_tokens")
  options = _object(body, "stream_options")
  stream = _truth(body, "stream")
  if options and not stream:
    raise ApiError("stream_options needs stream: true", "stream_options")
  return Asked(
    prompt,
    max_tokens,
    temperature=_number(body, "temperature", 0, 100, 1.0),
    top_p=_number(body, "top_p", 0, 1, 1.0) or 1e-9,
    top_k=max(_whole(body, "top_k", -1) or 0, 0),
    n=_whole(body, "n", 1, 128) or 1,
    seed=_whole(body, "seed", -(2**63), 2**64 - 1),
    stop=_read_stop(body.get("stop")),
    stop_ids=frozenset(_ids(body, "stop_token_ids")),
    ignore_eos=_truth(body, "ignore_eos"),
    bias=_read_bias(_object(body, "logit_bias")),
    top_logprobs=top,
    echo=echo,
    stream=stream,
    usage=_truth(options, "include_usage", "stream_options.include_usage"),
    ignored=tuple(ignored),
  )


def _check_names(body: dict, known: set[str], strict: bool) -> list[str]:
  """Returns the names of fields that nobody knows."""
  for name, neutral in _UNSUPPORTED.items():
    value = body.get(name)
    if name not in known and value is not None and value not in neutral:
      message = f"{name} is not supported: it would change the text"
      raise ApiError(message, name, "unsupported_parameter")
  unknown = [name for name in body if name not in known | _NEUTRAL | set(_UNSUPPORTED)]
  if strict and unknown:
    close = difflib.get_close_matches(unknown[0], known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    message = f"{_show(unknown[0])} is no field of this request{hint}"
    raise ApiError(message, unknown[0], "unknown_parameter")
  return unknown


def _read_prompts(prompt: object) -> list:
  """Returns texts or lists of ids, from any of the four forms of a prompt."""
  if isinstance(prompt, str):
    return [prompt]
  if not isinstance(prompt, list) or not prompt:
    message = "prompt must be a text, token ids, or a list of either; not empty"
    raise ApiError(message, "prompt")
  if _are_ids(prompt):
    return [prompt]
  if all(isinstance(x, str) for x in prompt) or all(map(_are_ids, prompt)):
    return prompt
  raise ApiError("prompt mixes texts and token ids, or has neither", "prompt")


def _are_ids(value: object) -> bool:
  return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _read_messages(messages: object, strict: bool) -> tuple[list[dict], list[str]]:
  """Returns messages of role and content, and the names of other fields."""
  if not isinstance(messages, list) or not messages:
    raise ApiError("messages must be a list of one or more", "messages")
  read, ignored = [], []
  for number, message in enumerate(messages):
    where = f"messages[{number}]"
    if not isinstance(message, dict):
      raise ApiError(f"{where} must be an object of role and content", where)
    content = _read_content(message.get("content"), where)
    if message.get("tool_calls") or message.get("function_call"):
      raise ApiError(f"{where}: calls of tools are not supported", where)
    others = [name for name in message if name not in ("role", "content", "name")]
    others = [name for name in others if message[name] not in (None, [])]
    if strict and others:
      message = f"{where}: {_show(others[0])} is no field of a message"
      raise ApiError(message, where, "unknown_parameter")
    ignored += [f"messages.{name}" for name in others]
    role = message.get("role")
    role = "system" if role == "developer" else role
    read.append({"role": role, "content": content})
  return read, list(dict.fromkeys(ignored))


def _read_content(content: object, where: str) -> str:
  """Returns the text of a message, from a text or a list of parts."""
  if isinstance(content, list) and content:
    texts = [
      part.get("text")
      if isinstance(part, dict) and part.get("type") == "text"
      else None
      for part in content
    ]
    content = "".join(texts) if all(isinstance(x, str) for x in texts) else None
  if not isinstance(content, str):
    message = f"{where}.content must be a text, or a list of parts of type text"
    raise ApiError(message, f"{where}.content")
  return content


def _read_stop(stop: object) -> tuple[str, ...]:
  stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
  texts = isinstance(stops, list) and all(isinstance(x, str) and x for x in stops)
  if not texts or len(stops) > MAX_STOPS:
    raise ApiError(f"stop must be a text, or up to {MAX_STOPS} texts", "stop")
  return tuple(stops)


def _read_bias(bias: dict) -> dict[int, float]:
  """Returns {id: what is added to its logit}."""
  if len(bias) > MAX_BIASES:
    raise ApiError(f"logit_bias has more than {MAX_BIASES} tokens", "logit_bias")
  read = {}
  for name in bias:
    if not name.isascii() or not name.isdigit() or len(name) > 9:
      raise ApiError(f"logit_bias: {_show(name)} is no token id", "logit_bias")
    read[int(name)] = _number(bias, name, -100, 100, 0.0, "logit_bias")
  return read


def _ids(body: dict, name: str) -> list[int]:
  ids = body.get(name)
  if ids is None or ids == []:
    return []
  if not _are_ids(ids) or len(ids) > 64:
    raise ApiError(f"{name} must be a list of up to 64 token ids", name)
  return ids


def _object(body: dict, name: str) -> dict:
  value = body.get(name)
  if value is not None and not isinstance(value, dict):
    raise ApiError(f"{name} must be an object", name)
  return value or {}


def _truth(body: dict, name: str, param: str = "") -> bool:
  value = body.get(name)
  if value is not None and not isinstance(value, bool):
    raise ApiError(f"{param or name} must be true or false", param or name)
  return bool(value)


def _whole(body: dict, name: str, low: int, high: int = 2**31 - 1) -> int | None:
  value = body.get(name)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if value is not None and (type(value) is not int or not low <= value <= high):
    message = f"{name} must be a whole number from {low} to {high}"
    raise ApiError(f"{message}, not {_show(value)}", name)
  return value


def _number(
  body: dict, name: str, low: float, high: float, default: float, param: str = ""
) -> float:
  value = body.get(name)
  if value is None:
    return default
  known = isinstance(value, int | float) and not isinstance(value, bool)
  if not known or not math.isfinite(value) or not low <= value <= high:
    message = f"{param or name} must be a number from {low} to {high}"
    raise ApiError(f"{message}, not {_show(value)}", param or name)
  return float(value)


def _show(value: object) -> str:
  return f"{value!r:.60}"
