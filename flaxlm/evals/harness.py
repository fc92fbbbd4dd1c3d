"""The model that lm-eval (EleutherAI's evaluation harness, 0.4.13) asks.

Texts are encoded as lm-eval's own `hf` model does, special tokens by name included, and
all rows of the embedding count. So both give the same numbers for the same weights. The
one difference: where a token spans the whole continuation, `hf` has nothing to score
and fails; here the two texts are encoded apart.

This module needs lm-eval; nothing but the command imports it.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import lm_eval.models  # noqa: F401  fills the registry that `register` adds to
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from flaxlm.errors import ConfigError
from flaxlm.evals.requests import (
  ScoreRequest,
  causal_segments,
  encode_after,
  rolling_requests,
)
from flaxlm.evals.run import batch_rows, fitting_length
from flaxlm.evals.scoring import Scorer, score_segments
from flaxlm.inference.language_model import LanguageModel
from flaxlm.inference.text import beginning
from flaxlm.parallel.sharding import use_mesh

_LOG = logging.getLogger(__name__)
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed"}
_BATCHES_AT_ONCE = 8  # after which results go to lm-eval's cache


class HarnessModel(TemplateLM):
  """A `LanguageModel` as lm-eval's model "flaxlm".

  Args:
    batch_size: rows per call; "auto" and 1, which is lm-eval's default, leave the
      choice to us. It does not change the numbers.
    max_gen_toks: tokens per answer, where the task does not say.
  Raises:
    ConfigError: the model is not causal or has no tokenizer.
  """

  def __init__(
    self,
    loaded: LanguageModel,
    batch_size: int | str = 1,
    max_gen_toks: int = 256,
  ):
    super().__init__()
    config = loaded.config
    if not config.causal or config.head != "lm":
      given = f"model.head={config.head}, causal={config.causal}"
      raise ConfigError("lm-eval", given, "a causal language model", "flaxlm evaluate")
    if loaded.tokenizer is None:
      raise ConfigError("lm-eval", "a model without a tokenizer", "one with its own")
    self.loaded, self.tokenizer = loaded, loaded.tokenizer
    self.max_length, self.max_gen_toks = config.max_len, int(max_gen_toks)
    self.merged = 0  # pairs so far in which a token spanned the join
    self._rows = 0 if batch_size == "auto" else int(batch_size)
    self._scorers: dict[int, Scorer] = {}

  @property
  def tokenizer_name(self) -> str:
    return f"flaxlm-{self.tokenizer.sha256}"

  @property
  def eot_token_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
    return bos if bos >= 0 else eos

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Returns the ids of a text, after bos if the model begins texts with it."""
    ids, begin = self.tokenizer.encode(string, specials=True), beginning(self.tokenizer)
    if add_special_tokens is False:
      return ids
    has_begun = add_special_tokens is None and ids[: len(begin)] == begin
    return ids if has_begun else begin + ids

  def _encode_pair(self, context: str, continuation: str):
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before, whole = self.tok_encode(stripped), self.tok_encode(stripped + continuation)
    after = whole[len(before) :]
    self.merged += whole[: len(before)] != before or not after
    return before, after or encode_after(self.tokenizer, continuation)

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    asked = [ScoreRequest(context, rest) for _, context, rest in requests]
    names = [f"the continuation {texts[1]!r:.40}" for texts, _, _ in requests]
    found = []
    for scores in self._score(asked, names):
      new = [(float(p), bool(g)) for p, g in zip(*scores, strict=True)]
      for (texts, _, _), result in zip(requests[len(found) :], new, strict=False):
        self.cache_hook.add_partial("loglikelihood", texts, result)
      found += new
    if self.merged:
      _LOG.warning("%d continuations begin inside a token so far", self.merged)
    return found

  def _score(self, requests: Sequence[ScoreRequest], names: Sequence[str]) -> Iterator:
    """Yields (log p, greedy) of a few batches of requests at a time, in their order."""
    segments = [
      segment
      for request, name in zip(requests, names, strict=True)
      for segment in causal_segments(request, self.max_length, name)
    ]
    if not segments:
      return
    length = fitting_length(max(len(segment.tokens) for segment in segments))
    with use_mesh(self.loaded.mesh, self.loaded.rules):
      if length not in self._scorers:
        rows = self._rows if self._rows > 1 else batch_rows(length)
        vocab_size = self.loaded.config.vocab_size
        self._scorers[length] = Scorer(self.loaded.model, rows, length, vocab_size)
      scorer, start = self._scorers[length], 0
      while start < len(segments):
        stop, room = start, _BATCHES_AT_ONCE * scorer.batch_rows * length
        while stop < len(segments) and room > 0:
          room, stop = room - len(segments[stop].tokens), stop + 1
        part = segments[start:stop]
        scores = score_segments(scorer, self.loaded.model, part, range(len(part)))
        yield scores.log_p, scores.greedy
        start = stop

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Returns the sum of log p of each text, in windows of the whole context."""
    texts = [request.args[0] for request in requests]
    windows, owners = [], []
    for i, text in enumerate(texts):
      start = [self.prefix_token_id]
      found = rolling_requests(self.tok_encode(text), start, self.max_length)
      windows += found
      owners += [i] * len(found)
    totals, done = [0.0] * len(texts), 0
    for scores, _ in self._score(windows, ["a window"] * len(windows)):
      for log_p in scores:
        totals[owners[done]] += float(log_p)
        done += 1
        if done == len(owners) or owners[done] != owners[done - 1]:  # its last window
          i = owners[done - 1]
          self.cache_hook.add_partial("loglikelihood_rolling", (texts[i],), totals[i])
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Returns the text after each context, up to a stop text; no stop text in it."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      groups.setdefault(repr(request.args[1]), []).append(i)
    answers = [""] * len(requests)
    for numbers in groups.values():
      given = requests[numbers[0]].args[1]
      options, room = self._options(given)
      contexts = [requests[i].args[0] for i in numbers]
      ids = [
        self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts
      ]
      # Writing changes the form of the weights: those that score keep theirs.
      texts = dataclasses.replace(self.loaded).generate(ids, **options)
      for i, text in zip(numbers, texts, strict=True):
        answers[i] = text
        if not options["temperature"]:  # what is drawn at random is never cached
          self.cache_hook.add_partial("generate_until", requests[i].args, text)
    return answers

  def _options(self, given: dict) -> tuple[dict, int]:
    """Returns (arguments of `LanguageModel.generate`, room for a context in tokens)."""
    known = normalize_gen_kwargs(given, self.max_gen_toks)
    if unknown := known.keys() - _KNOWN:
      needed = " ".join(sorted(_KNOWN))
      raise ConfigError("generation_kwargs", " ".join(sorted(unknown)), needed)
    room = self.max_length - known["max_gen_toks"]
    if room < 1:
      needed = f"a context of more than {self.max_length} tokens, or fewer to write"
      given = f"max_gen_toks={known['max_gen_toks']}"
      raise ConfigError(
        "generation_kwargs", given, needed, "--gen_kwargs max_gen_toks=64"
      )
    sampled = known["do_sample"]
    return {
      "max_tokens": known["max_gen_toks"],
      "temperature": float(known.get("temperature", 1.0)) if sampled else 0.0,
      "top_k": int(known.get("top_k", 0)),
      "top_p": float(known.get("top_p", 1.0)),
      "seed": int(known.get("seed", 0)),
      "stop": tuple(text for text in known["until"] if text),
    }, room

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Returns the source of the model's own template, the only one that it has."""
    return self._template().source if chat_template else None

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    """Returns the text of a conversation; an unfinished last message stays open."""
    history = [{"role": m["role"], "content": m["content"]} for m in chat_history]
    text = self._template().render(
      history, self.tokenizer, prompt=add_generation_prompt
    )
    if add_generation_prompt:
      return text
    last = history[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]

  def _template(self):
    if self.loaded.template is None:
      raise ConfigError("--apply_chat_template", "a model without one", "a chat model")
    return self.loaded.template


def register(loaded: LanguageModel) -> None:
  """Makes `loaded` the model "flaxlm" of lm-eval, in this process.

  lm-eval 0.4.13 has no entry points that would find it.
  """

  class OpenedModel(HarnessModel):
    """Takes what lm-eval always passes: "cuda:0", and a limit for its "auto"."""

    def __init__(self, device=None, max_batch_size=None, **options):
      super().__init__(loaded, **options)

  register_model("flaxlm")(OpenedModel)
