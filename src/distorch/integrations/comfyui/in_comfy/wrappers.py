"""Nodes over loaders of other packs."""


def nodes() -> dict[str, type]:
    """Return these nodes by their class keys."""
    return {}
