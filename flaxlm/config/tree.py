"""Trees of settings by dotted key: `model.moe.router`. No library is imported here."""


def flatten(tree, prefix: str = "") -> dict[str, object]:
  """Returns {dotted key: leaf} of a ConfigDict or of nested dicts, in their order.

  Lists and tuples are leaves. A group without keys has no leaves.
  """
  flat = {}
  for key, value in tree.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def set_value(tree, key: str, value: object) -> None:
  """Sets the leaf at a dotted key; a locked ConfigDict refuses an unknown one."""
  *groups, last = key.split(".")
  for group in groups:
    tree = tree[group]
  tree[last] = value
