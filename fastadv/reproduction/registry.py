"""All items (tables and figures of the papers) by name."""

from __future__ import annotations

from fastadv.ops.values import did_you_mean
from fastadv.reproduction import act, afs, arrest, vfd
from fastadv.reproduction.tables import Item


def all_items() -> dict[str, Item]:
    """Return the items by their names, paper by paper."""
    items = (*arrest.items(), *vfd.items(), *afs.items(), *act.items())
    return {item.id: item for item in items}


def find_item(name: str) -> Item:
    """Return an item.

    Args:
        name: such as "arrest/table2".

    Raises:
        ValueError: for an unknown name.
    """
    items = all_items()
    if name not in items:
        raise ValueError(
            f"item must be one of {', '.join(items)}, got {name!r}{did_you_mean(name, items)}"
        )
    return items[name]
