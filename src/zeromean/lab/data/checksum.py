"""The SHA-256 sum that every data set is held to before any of it is used."""

import hashlib


def verify(content: bytes, sha256: str, *, name: str, remedy: str) -> None:
    """Compare the SHA-256 sum of ``content`` with the pinned one.

    Args:
        content: The whole content, from which the data set is then made.
        sha256: The pinned sum, in hexadecimal.
        name: What the content is, for the message.
        remedy: What to do about a wrong sum, for the message.

    Raises:
        ValueError: If the sums differ.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{name} is damaged or another file: expected SHA-256 {sha256}, found {found} over {len(content)} bytes. "
            f"{remedy}"
        )
