"""Functions that run in several processes, connected by gloo."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
TIMEOUT = timedelta(seconds=120)


def run_in_processes(function: Callable[..., Any], *args: Any) -> None:
    """Run `function(rank, *args)` in two new processes of one group; an error in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_run, args=(port, function, args), nprocs=WORLD, join=True)


def _run(rank: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    try:
        function(rank, *args)
    finally:
        # Sharded networks are in reference cycles, and their process groups must not outlive the interpreter
        gc.collect()
        dist.destroy_process_group()
