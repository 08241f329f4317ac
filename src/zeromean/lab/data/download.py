"""Downloads, through pooch: to a temporary file beside the goal, compared with the published sum, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def download(name: str, md5: str, addresses: tuple[str, ...], folder: Path) -> Path:
    """Download one file from the first address that gives it whole, with a progress bar where rich is installed.

    Args:
        name: The file name, appended to each address, and the name it gets in ``folder``.
        md5: The published MD5 sum of the file as it is downloaded.
        addresses: URLs ending in a slash, tried in this order.
        folder: Where it goes; made if absent.

    Returns:
        The path of the whole, checked file. A broken or wrong download leaves nothing.

    Raises:
        ConnectionError: If no address gave the file; the message has the reason for each.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ConnectionError("downloading needs pooch: pip install 'zeromean[lab]'") from error
    failures = []
    for address in addresses:
        with _progress_bar(name) as bar:
            transfer = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16)
            try:
                return Path(pooch.retrieve(address + name, f"md5:{md5}", name, folder, downloader=transfer))
            except OSError as error:
                failures.append(f"{address}: {shorten(str(error), 120)}")
            except ValueError as error:
                failures.append(f"{address}: {error}")
    raise ConnectionError("; ".join(failures))


@contextmanager
def _progress_bar(name: str) -> Iterator["_Bar | bool"]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
    except ModuleNotFoundError:
        yield False
        return
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, name)


class _Bar:
    """A rich progress bar with the four names that pooch calls."""

    total = 0

    def __init__(self, progress: "Progress", name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None)

    def update(self, count: int) -> None:
        self._progress.update(self._task, total=self.total or None, advance=count)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Nothing to close: the bar ends with its context."""
