"""Tensors that took long to compute, kept for the next time with a key of what they follow from and with their sum."""

import hashlib
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from zeromean.lab.store import write_whole


def recall(file: Path, key: str, names: tuple[str, ...], what: str) -> tuple[Tensor, ...] | None:
    """Return the tensors that `keep` wrote, or None, with a warning if the file is there and is not what was written.

    Args:
        file: Where.
        key: Names all that the tensors follow from.
        names: Of the tensors, in the order in which they were kept.
        what: They are, for the warning.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            found, tensors = opened.metadata(), tuple(opened.get_tensor(name) for name in names)
        if found == {"key": key, "sha256": _sum(tensors)}:
            return tensors
        damage = "its sum does not fit its content"
    except (SafetensorError, OSError) as error:
        damage = str(error)
    warnings.warn(f"{file} is damaged ({damage}): {what} is computed anew", stacklevel=4)
    return None


def keep(file: Path, key: str, tensors: dict[str, Tensor], what: str) -> None:
    """Write tensors of the CPU for `recall`; a warning tells where that is not possible."""
    from safetensors.torch import save

    try:
        write_whole(file, save(tensors, {"key": key, "sha256": _sum(tensors.values())}))
    except OSError as error:
        warnings.warn(f"{what} is not kept for the next time: {error}", stacklevel=4)


def _sum(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
