"""Processes that torchrun would start, on this machine's CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def two_processes(module: str, *words: str) -> list[str]:
    """Run a module as two processes of one group, which must end well; returns what each of them printed."""
    port, pipe, processes = str(free_port()), subprocess.PIPE, []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        script = [sys.executable, "-m", module, *words]
        processes.append(subprocess.Popen(script, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error for _, error in told)
    return [text for text, _ in told]
