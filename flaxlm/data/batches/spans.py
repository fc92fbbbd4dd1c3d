"""Objectives of decoders beside the next token: spans, prefixes, fill in the middle.

Each function turns one document, or its piece in a row, into a segment to train on.
Documents never share a segment, so no text is predicted from another. The functions are
pure: all randomness comes from the generator that is passed in.
"""

from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
  """One document of a row, as int32 arrays of equal length.

  `targets` holds the token after each position if it is to be predicted, else -1.
  `prefix` is 1 for tokens that the whole segment sees; they are never targets.
  """

  tokens: np.ndarray
  targets: np.ndarray
  prefix: np.ndarray


def round_randomly(number: float, generator: np.random.Generator) -> int:
  """Rounds up or down at random, so that the mean is `number`."""
  whole = int(number)
  return whole + int(generator.random() < number - whole)


def count_spans(
  length: int, noise: int, mean_span: float, most: int, generator: np.random.Generator
) -> int:
  """Returns how many spans hide `noise` of `length` units: at most `most`, apart."""
  wanted = round_randomly(noise / mean_span, generator)
  return max(1, min(wanted, noise, length - noise + 1, most))


def random_spans(
  length: int, noise: int, num_spans: int, generator: np.random.Generator
) -> np.ndarray:
  """Returns a mask (bool, `length`) with `noise` Trues in `num_spans` runs.

  All such masks are equally likely. So the lengths of the runs are geometric (Joshi et
  al. 2019), given that their sum is `noise`: no span is cut short. Raffel et al. 2020
  draw lengths in the same way, but always hide the last token.

  Args:
    noise: from 1 to length.
    num_spans: from 1 to min(noise, length - noise + 1).
  """
  cuts = np.sort(generator.choice(noise - 1, num_spans - 1, replace=False)) + 1
  spans = np.diff(cuts, prepend=0, append=noise)
  # There is at least one unit between two spans, but there may be none at the ends.
  free = length - noise - (num_spans - 1)
  bars = np.sort(generator.choice(free + num_spans, num_spans, replace=False))
  gaps = np.diff(bars, prepend=-1, append=free + num_spans) - 1
  gaps[1:-1] += 1
  runs = np.stack([gaps, np.append(spans, 0)], axis=1).reshape(-1)
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def next_tokens(tokens: np.ndarray, following: int = -1) -> np.ndarray:
  """Returns the targets of next-token prediction; `following` is the last of them."""
  return np.append(tokens[1:], following).astype(np.int32)


def keep_whole(tokens: np.ndarray, following: int = -1) -> Segment:
  """Returns a document as it is, to be predicted from left to right."""
  return Segment(tokens, next_tokens(tokens, following), np.zeros_like(tokens))


def split_prefix(
  tokens: np.ndarray, following: int, generator: np.random.Generator
) -> Segment:
  """Splits a document at random: its head is given, its tail is predicted.

  This is the prefix language model of Raffel et al. 2020 (section 3.2.1), and the
  S-denoiser of UL2 (Tay et al. 2022). The head has at least one token.

  Args:
    following: the next token of the document; -1 if the document ends here.
  """
  size = int(generator.integers(1, max(len(tokens), 2)))
  targets = next_tokens(tokens, following)
  targets[: size - 1] = -1
  return Segment(tokens, targets, (np.arange(len(tokens)) < size).astype(np.int32))


def corrupt_spans(
  tokens: np.ndarray,
  is_text: np.ndarray,
  sentinels: np.ndarray,
  mask_rate: float,
  mean_span: float,
  room: int,
  generator: np.random.Generator,
) -> Segment:
  """Replaces spans by sentinels, to be predicted (Raffel et al. 2020, figure 2).

  Of `a b c d e`, with `b` and `d e` hidden, the prefix is `a S0 c S1` and the target is
  `S0 b S1 d e S2`. The R- and X-denoisers of UL2 (Tay et al. 2022) differ only in
  `mask_rate` and `mean_span`. The segment has len(tokens) + 2 * spans + 1 tokens.

  A document with fewer than two tokens of text, or without room, stays whole: it is all
  prefix, and nothing is predicted.

  Args:
    is_text: bool, for each token; the others are never hidden.
    sentinels: ids, one per span and one to end the target.
    room: how many tokens may be added.
  """
  length = int(is_text.sum())
  most = min(len(sentinels) - 1, (room - 1) // 2)
  if length < 2 or most < 1:
    ones, none = np.ones_like(tokens), np.full_like(tokens, -1)
    return Segment(tokens, none, ones)
  noise = round_randomly(mask_rate * length, generator)
  noise = min(max(noise, 1), length - 1)
  num_spans = count_spans(length, noise, mean_span, most, generator)
  hidden = np.zeros(len(tokens), bool)
  hidden[is_text] = random_spans(length, noise, num_spans, generator)
  begins = hidden & ~np.append(False, hidden[:-1])
  span = np.cumsum(begins) - 1
  # A special token inside a span splits it. Then the last spans may be too many.
  hidden &= span < most
  begins &= hidden
  num_spans = int(begins.sum())
  shown = np.where(begins, sentinels[np.clip(span, 0, most)], tokens)
  given = shown[~hidden | begins]
  where = np.flatnonzero(begins[hidden])
  asked = np.insert(tokens[hidden], where, sentinels[:num_spans])
  asked = np.append(asked, sentinels[num_spans])
  joined = np.concatenate([given, asked]).astype(np.int32)
  targets = next_tokens(joined)
  targets[: len(given) - 1] = -1
  prefix = (np.arange(len(joined)) < len(given)).astype(np.int32)
  return Segment(joined, targets, prefix)


def fill_in_middle(
  tokens: np.ndarray,
  is_text: np.ndarray,
  prefix_id: int,
  middle_id: int,
  suffix_id: int,
  suffix_first: bool,
  generator: np.random.Generator,
) -> Segment:
  """Moves the middle of a document to its end (Bavarian et al. 2022, section 3).

  A document is cut at two random tokens. With P, M, S for the three special tokens, it
  becomes `P prefix S suffix M middle` (PSM) or `P S suffix M prefix middle` (SPM, their
  joint variant). bos and eos stay at the ends. Everything is predicted from left to
  right, as in the paper. The segment has len(tokens) + 3 tokens.

  Args:
    is_text: bool, for each token.
    suffix_first: SPM rather than PSM.
  """
  inside = np.flatnonzero(is_text)
  first, stop = (inside[0], inside[-1] + 1) if len(inside) else (0, 0)
  a, b = np.sort(generator.integers(first, stop + 1, 2))
  prefix, middle, suffix = tokens[first:a], tokens[a:b], tokens[b:stop]
  P, M, S = [prefix_id], [middle_id], [suffix_id]
  if suffix_first:
    order = [P, S, suffix, M, prefix, middle]
  else:
    order = [P, prefix, S, suffix, M, middle]
  joined = np.concatenate([tokens[:first], *order, tokens[stop:]]).astype(np.int32)
  # The next token of the document follows its suffix, so it is not a target here.
  return keep_whole(joined)
