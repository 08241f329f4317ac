"""What to say about a name that nobody knows."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like the unknown one, if any is, and all of them, as the end of an error message."""
    options = list(known)
    close = difflib.get_close_matches(name.lower(), options, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Choose one of {', '.join(options)}"
