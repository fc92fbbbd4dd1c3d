"""From prompts to texts: encodes, decodes and streams; prints nothing.

A text ends at the tokenizer's end-of-text token, which is not part of it.
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np

from flaxlm.errors import ConfigError
from flaxlm.inference.decoding import for_decoding, generate
from flaxlm.inference.sampling import Sampling
from flaxlm.models.transformer import Transformer
from flaxlm.parallel.mesh import one_device
from flaxlm.runs.weights import restore_model
from flaxlm.tokenizer.files import AnyTokenizer
from flaxlm.tokenizer.sentencepiece import Decoder


def load_for_decoding(
  workdir: str | os.PathLike, config, step: int | None = None
) -> Transformer:
  """Restores a run's model on one device, in the type of its training."""
  rules = config.mesh.rules.to_dict()
  model, _ = restore_model(workdir, config, one_device(), rules, step)
  return for_decoding(model)  # here, so that the stacked weights are freed


def tokenize_prompt(tokenizer: AnyTokenizer, text: str) -> list[int]:
  """Returns the ids of a prompt, after the beginning-of-text token if there is one.

  Raises:
    ConfigError: there are no ids, so nothing to decode from.
  """
  ids = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
  ids += tokenizer.encode(text)
  if not ids:
    needed = "a text: this tokenizer has no bos token to begin with"
    raise ConfigError("the prompt", "none", needed)
  return ids


def text_ids(tokenizer: AnyTokenizer, vocab_size: int) -> np.ndarray:
  """Returns which ids stand for text or end it, bool V.

  Args:
    vocab_size: the model's; its embedding may have rows to spare.
  """
  allowed_V = np.zeros(vocab_size, bool)
  for i, piece in enumerate(tokenizer.pieces()):
    allowed_V[i] = i == tokenizer.eos_id or (piece != b"" and i != tokenizer.unk_id)
  return allowed_V


class TextStream:
  """The text of one row, as its tokens arrive."""

  def __init__(self, tokenizer: AnyTokenizer):
    self.is_done = False  # the end-of-text token has come; what follows is ignored
    self._eos_id = tokenizer.eos_id
    self._decoder = Decoder(tokenizer)

  def __call__(self, ids: Sequence[int], final: bool = False) -> str:
    """Returns the text that is complete now; `final` also flushes what is not."""
    ids = [] if self.is_done else list(ids)
    if self._eos_id in ids:
      ids, self.is_done = ids[: ids.index(self._eos_id)], True
    return self._decoder(ids, final)


def write_texts(
  model: Transformer,
  tokenizer: AnyTokenizer,
  prompts: list[list[int]],
  max_tokens: int,
  sampling: Sampling | Sequence[Sampling],
) -> Iterator[list[str]]:
  """Yields what is new of each text, until all have ended or have `max_tokens`.

  Args:
    prompts: as `tokenize_prompt` returns them; their text is not yielded.
    sampling: one per prompt or one for all, as in `generate`.
  """
  allowed_V = text_ids(tokenizer, model.config.vocab_size)
  streams = [TextStream(tokenizer) for _ in prompts]
  for new in generate(model, prompts, max_tokens, sampling, allowed_V):
    yield [stream(row) for stream, row in zip(streams, new.tolist(), strict=True)]
    if all(stream.is_done for stream in streams):
      break
  yield [stream([], final=True) for stream in streams]
