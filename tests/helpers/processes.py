"""Functions and scripts that run in several processes, connected by gloo."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
TIMEOUT = timedelta(seconds=120)


def run_in_processes(function: Callable[..., Any], *args: Any) -> None:
    """Run `function(rank, *args)` in two new processes of one group; an error in one of them is raised here."""
    mp.spawn(_run, args=(_free_port(), function, args), nprocs=WORLD, join=True)


def run_script_in_processes(script: str | Path, words: Sequence[str], timeout: float = 240) -> None:
    """Run a script on the CPU in two processes of one group, as a launcher does; fail if one of them fails."""
    port, settings = _free_port(), {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(script), *words]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | settings | _environment(rank, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def _environment(rank: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_RANK": str(rank),
    }


def _run(rank: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(_environment(rank, port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    try:
        function(rank, *args)
    finally:
        # Sharded networks are in reference cycles, and their process groups must not outlive the interpreter
        gc.collect()
        dist.destroy_process_group()
