"""Numbers, progress bars, tables and the text of models, for a terminal."""

import re

from flaxlm.errors import printable


def short_number(number: float) -> str:
  """Returns three digits and a unit: 1234567 is "1.23M"."""
  for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    if abs(number) >= 0.9995 * unit:
      return f"{number / unit:.3g}{name}"
  return f"{number:.3g}"


def without_controls(text: str) -> str:
  """Returns a text whose control characters are spelled out, but for \\n and \\t.

  A model may have learnt sequences that a terminal obeys.
  """
  return re.sub(r"[^\n\t]+", lambda part: printable(part[0], len(part[0])), text)


def duration(seconds: float) -> str:
  """Returns the two largest units: 7260 seconds are "2h01m"."""
  minutes, hours = int(seconds + 0.5) // 60, int(seconds + 0.5) // 3600
  if hours >= 48:
    return f"{hours // 24}d{hours % 24:02}h"
  if hours:
    return f"{hours}h{minutes % 60:02}m"
  return f"{minutes}m{int(seconds + 0.5) % 60:02}s" if minutes else f"{seconds:.0f}s"


def live_bar(stream, first_step: int, num_steps: int):
  """Starts and returns a progress bar, which disappears when it is stopped."""
  from rich import console, progress

  bar = progress.Progress(
    progress.TextColumn("training"),
    progress.BarColumn(bar_width=None),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
    console=console.Console(file=stream),
    transient=True,
  )
  bar.add_task("training", total=num_steps, completed=first_step)
  bar.start()
  return bar


def print_card(rows: list[tuple[str, str]], stream) -> None:
  """Prints lines with labels; on a terminal the labels are bold."""
  if stream.isatty():
    from rich import console, table

    card = table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    card.add_column(style="bold", no_wrap=True)
    card.add_column()
    for label, text in rows:
      card.add_row(label, text.replace("[", "\\["))
    console.Console(file=stream, highlight=False).print(card)
    return
  for label, text in rows:
    print(f"{label:<11} {text}", file=stream)
  stream.flush()
