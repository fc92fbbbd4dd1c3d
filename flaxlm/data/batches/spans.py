"""What a decoder is asked for besides the next token: spans, prefixes, middles.

Each function turns one document, or the piece of one that lies in a row, into a segment
to train on. Documents never share a segment, so nothing is predicted from another text.
All are pure: what is random comes from the generator that is passed in.
"""

from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
  """One document of a row, int32 arrays of one length.

  `targets` holds the token to predict at a position, which is the one after it, or -1.
  `prefix` is 1 where all of the segment sees the token; no such token is a target.
  """

  tokens: np.ndarray
  targets: np.ndarray
  prefix: np.ndarray


def round_randomly(number: float, generator: np.random.Generator) -> int:
  """One of the two whole numbers around `number`, which is then right in the mean."""
  whole = int(number)
  return whole + int(generator.random() < number - whole)


def count_spans(
  length: int, noise: int, mean_span: float, most: int, generator: np.random.Generator
) -> int:
  """How many spans hide `noise` of `length` units; they must fit, with gaps between."""
  wanted = round_randomly(noise / mean_span, generator)
  return max(1, min(wanted, noise, length - noise + 1, most))


def random_spans(
  length: int, noise: int, num_spans: int, generator: np.random.Generator
) -> np.ndarray:
  """Returns a mask (bool, `length`) with `noise` Trues in `num_spans` runs.

  All such masks are equally likely. The lengths of runs are then geometric ones (Joshi
  et al. 2019) of which it is known what they add up to: the budget is met exactly, with
  no span to cut short. Raffel et al. 2020 draw them so, but always hide the last token.

  Args:
    length: units, of which 1 <= noise <= length are hidden.
    num_spans: from 1 to min(noise, length - noise + 1).
  """
  cuts = np.sort(generator.choice(noise - 1, num_spans - 1, replace=False)) + 1
  spans = np.diff(cuts, prepend=0, append=noise)
  # Between two spans lies one unit at least; at both ends there may be none.
  free = length - noise - (num_spans - 1)
  bars = np.sort(generator.choice(free + num_spans, num_spans, replace=False))
  gaps = np.diff(bars, prepend=-1, append=free + num_spans) - 1
  gaps[1:-1] += 1
  runs = np.stack([gaps, np.append(spans, 0)], axis=1).reshape(-1)
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def next_tokens(tokens: np.ndarray, following: int = -1) -> np.ndarray:
  """The targets of next-token prediction; `following` is what comes after the last."""
  return np.append(tokens[1:], following).astype(np.int32)


def keep_whole(tokens: np.ndarray, following: int = -1) -> Segment:
  """A document as it is, predicted from left to right."""
  return Segment(tokens, next_tokens(tokens, following), np.zeros_like(tokens))


def split_prefix(
  tokens: np.ndarray, following: int, generator: np.random.Generator
) -> Segment:
  """Splits a document at random: its head is given, its tail is predicted.

  The prefix language model of Raffel et al. 2020 (section 3.2.1), which is the
  S-denoiser of UL2 (Tay et al. 2022). The head has one token at least.

  Args:
    following: the token after the last one, in the same document; -1 if there is none.
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
  """Hides spans behind sentinels, then asks for them (Raffel et al. 2020, figure 2).

  Input `a b c d e` with `b` and `d e` hidden: `a S0 c S1`, all of it prefix, then the
  target `S0 b S1 d e S2`. UL2's R- and X-denoisers (Tay et al. 2022) differ in
  `mask_rate` and `mean_span` alone. This is len(tokens) + 2 * spans + 1 long.

  A document with less than two tokens of text, or with no room, is given whole: all
  prefix, and nothing is predicted.

  Args:
    is_text: of each token; others stay where they are.
    sentinels: their ids, one for each span and one to end the target.
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
  # A special token inside a span splits it: then the last ones are too many.
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

  With P, M, S for the three symbols, a document is cut at two random tokens and becomes
  `P prefix S suffix M middle` (PSM) or `P S suffix M prefix middle` (SPM, their joint
  variant). What is not text at its ends (bos, eos) stays there. Everything is predicted
  from left to right, as in the paper. This is len(tokens) + 3 long.

  Args:
    is_text: of each token.
    suffix_first: SPM.
  """
  inside = np.flatnonzero(is_text)
  first, stop = (inside[0], inside[-1] + 1) if len(inside) else (0, 0)
  a, b = np.sort(generator.integers(first, stop + 1, 2))
  prefix, middle, suffix = tokens[first:a], tokens[a:b], tokens[b:stop]
  P, M, S = [prefix_id], [middle_id], [suffix_id]
  if suffix_first:
    parts = [P, S, suffix, M, prefix, middle]
  else:
    parts = [P, prefix, S, suffix, M, middle]
  joined = np.concatenate([tokens[:first], *parts, tokens[stop:]]).astype(np.int32)
  # What follows in the store follows the suffix, and no longer the last token here.
  return keep_whole(joined)
