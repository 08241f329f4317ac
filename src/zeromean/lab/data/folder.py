"""Where the data sets lie on this machine: ``$ZEROMEAN_DATA``, else ``zeromean`` in the user's cache folder."""

import os
from pathlib import Path

VARIABLE = "ZEROMEAN_DATA"


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder for ``~``; a ``~name`` of nobody stays as it is, and is then a folder absent."""
    return Path(os.path.expanduser(path))


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that holds all data sets; it need not exist yet.

    The order is: ``root`` if given, the environment variable ``ZEROMEAN_DATA``, ``$XDG_CACHE_HOME/zeromean``,
    ``~/.cache/zeromean``.

    Args:
        root: A folder that takes precedence over the environment.
    """
    if root is not None:
        return expanded(root)
    if named := os.environ.get(VARIABLE):
        return expanded(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zeromean"
