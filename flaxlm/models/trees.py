"""Names for the leaves of a tree of weights."""

from typing import Any

import jax

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns {"model/blocks/wq": leaf}: the names used in files and messages."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    # nnx.Param adds an attribute "value"; a weight of that name keeps it.
    is_attribute = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
    if is_attribute and len(parts) > 1 and parts[-1] == "value":
      parts.pop()
    name = "/".join(parts)
    assert name and name not in leaves, f"two leaves of the state are named {name!r}"
    leaves[name] = leaf
  return leaves


def nest(leaves: dict[str, Any], separator: str = "/") -> dict:
  """Returns the leaves as a tree of dicts, which is how Orbax stores them."""
  root = {}
  for name, leaf in leaves.items():
    *parents, last = name.split(separator)
    node = root
    for parent in parents:
      node = node.setdefault(parent, {})
    assert isinstance(node, dict) and last not in node, (
      f"{name!r} is a leaf and a group"
    )
    node[last] = leaf
  return root
