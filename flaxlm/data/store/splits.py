"""Chooses what each source is validated on, before anything slow is started.

By hash, equal documents get the same split, but a few documents may all get one. So a
source of few documents is validated on the end of each of its files. What was chosen is
in the recipe of the store.
"""

import collections
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from flaxlm import errors
from flaxlm.data.text.documents import Corpus, TextPiece, split_of
from flaxlm.data.text.formats import EMPTY

ENOUGH = 4  # documents that each split has to get by hash
SPLIT_KINDS = ("hash", "tail")


def choose_splits(
  data: ConfigDict, corpora: dict[str, Corpus], stored: dict | None
) -> dict[str, str]:
  """Returns hash or tail by source, as config.data.split says.

  Args:
    stored: the recipe of a store that exists already: its choices are kept.
  """
  if data.split in SPLIT_KINDS:
    return dict.fromkeys(corpora, data.split)
  elif data.split != "auto":
    raise errors.ConfigError("config.data.split", data.split, "auto, hash or tail")
  if stored:
    kept = stored["sources"]
    return {name: kept.get(name, {}).get("validation", "hash") for name in corpora}
  return {
    name: choose_split(data.sources[name], corpus, data.validation_fraction)
    for name, corpus in corpora.items()
  }


def choose_split(source: ConfigDict, corpus: Corpus, fraction: float) -> str:
  """Returns hash if it gives both splits enough documents, or if there is no tail."""
  if not fraction or source.kind == "tfds":
    return "hash"
  one_each = source.kind in ("text", "stdlib") and source.document == "file"
  if one_each and len(corpus.files) < 2 * ENOUGH:
    return "tail"
  counts, _ = count_documents(corpus, fraction, source.max_documents, ENOUGH)
  return "hash" if min(counts["train"], counts["validation"]) >= ENOUGH else "tail"


def describe_split(name: str, kind: str, corpus: Corpus, fraction: float) -> str:
  """Returns a line that says what a source is validated on."""
  if kind == "hash":
    what = f"{fraction:.3g} of the documents, by hash"
  elif kind == "tail":
    what = f"the last {fraction:.3g} of each of its {len(corpus.files)} files"
  else:
    raise ValueError(f"no source is split by {kind}")
  return f"source {name}: {what}, for validation"


def check_documents(data: ConfigDict, corpora: dict[str, Corpus], recipe: dict) -> None:
  """Raises DataError if a source has no text, or one of its splits has none."""
  for name, corpus in corpora.items():
    source = recipe["sources"][name]
    if source["validation_split"]:
      held_out = corpus.read((1, 0))
      if not any(piece.text for piece in held_out):
        raise errors.DataError(
          f"the validation split of source {name} has no tokens",
          f"config.data.sources.{name}.validation_split={source['validation_split']}",
          "examples with text",
        )  # fmt: skip
    # Any text has a tail, so there is no need to read as far as that.
    is_text = source["kind"] in ("text", "stdlib")
    has_tail = source["validation"] == "tail" and is_text
    has_both = has_tail or source["validation_split"]
    fraction = 0.0 if has_both else data.validation_fraction
    most = source["max_documents"]
    counts, problems = count_documents(corpus, fraction, most, 1)
    if not counts.total():
      raise errors.DataError(
        f"source {name} holds no text", describe_problems(problems) or "nothing",
        "documents with text", f"config.data.sources.{name}.path",
      )  # fmt: skip
    for split in ("train", "validation") if fraction else ("train",):
      if not counts[split]:
        raise no_tokens(name, split, counts, problems)


def count_documents(
  corpus: Corpus, fraction: float, most: int, enough: int
) -> tuple[collections.Counter, collections.Counter]:
  """Counts documents with text by split, until each split has `enough`, and problems.

  Args:
    fraction: of the documents that are for validation; 0 if none need be.
    most: documents to read; 0 = all.
  """
  counts, problems, inside = collections.Counter(), collections.Counter(), False
  for piece in first_documents(corpus.read((0, 0)), most):
    problems.update(piece.problems)
    if piece.text and not inside:
      counts[piece.split or split_of(piece.text.encode(), fraction)] += 1
      inside = True
      validated = counts["validation"] >= enough or not fraction
      if validated and counts["train"] >= enough:
        break
    if piece.end and not inside and not piece.problems:
      problems[EMPTY] += 1
    inside = inside and not piece.end
  return counts, problems


def first_documents(pieces: Iterable[TextPiece], count: int) -> Iterator[TextPiece]:
  """Yields the pieces of the first `count` documents; of all of them if it is 0."""
  if not count:
    yield from pieces
    return
  for piece in pieces:
    yield piece
    count -= piece.end
    if not count:
      return


def no_tokens(
  source: str, split: str, counts: dict[str, int], problems: dict[str, int]
) -> errors.DataError:
  """Returns the error for a source with nothing to train on, or to validate on.

  Args:
    counts: documents with text by split.
  """
  given = f"{counts['train']} train and {counts['validation']} validation documents"
  found = describe_problems(problems)
  return errors.DataError(
    f"the {split} split of source {source} has no tokens",
    f"{given} ({found})" if found else given,
    "text in both",
    "a larger config.data.validation_fraction, smaller documents "
    f"(config.data.sources.{source}.document), or config.data.split=auto",
  )


def describe_problems(problems: dict[str, int]) -> str:
  """Returns counted problems in one line."""
  return ", ".join(f"{count:,} x {what}" for what, count in problems.items())


def count_shared_files(corpora: dict[str, Corpus]) -> dict[tuple[str, str], int]:
  """Returns how many files two sources share, by their contents, if they share any."""
  owners, shared = {}, collections.Counter()
  for name, corpus in corpora.items():
    for sha256 in {file.sha256 for file in corpus.seen.values() if file.size}:
      for other in owners.setdefault(sha256, []):
        shared[other, name] += 1
      owners[sha256].append(name)
  return dict(shared)
