"""A model whose layers are split among processes: transformers' tensor parallelism, one process for each part.

This process runs no part of the model. It sends token ids to all ranks (`rise_ops.tensor_rank`), takes the hidden
states of the first out of memory that both have mapped, and holds the LM head. So whatever happens to a rank (it dies,
it stops, it runs out of memory in the middle of an exchange with the others) ends here as an error; all ranks are
killed then, and the next call starts them again.

The ranks are bound to this process: each holds one end of a socket, and ends when the other end is gone, also after a
SIGKILL. They are on this machine; their exchange is NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rise_ops.config import ModelConfig
from rise_ops.engines import Engine
from rise_ops.errors import ModelError
from rise_ops.head_files import read_head
from rise_ops.model_files import resolve_model
from rise_ops.model_shape import model_settings
from rise_ops.placement import WeightPlan

START_SECONDS = 3_600.0
"""For all ranks to load their parts."""
STEP_SECONDS = 600.0
"""For one micro-batch."""
_GRACE_SECONDS = 2.0
"""After one rank's failure others are waited for: the first to tell need not be the cause."""
_CAUSES = ("memory", "ended", "error")
"""Of failures told at the same time, the likeliest cause of the others first."""

Json = dict[str, Any]


class TensorParallelEngine(Engine):
    """Ranks that run a model together, and its LM head.

    Raises
    ------
    ModelError
        The model cannot be split in so many parts, or a rank fails.
    """

    def __init__(self, config: ModelConfig, plan: WeightPlan) -> None:
        self._config = config
        self._device = plan.head_device
        self._lock = threading.Lock()
        self._ranks: _Ranks | None = None
        started = self._started()
        dtype = getattr(torch, started[0]["dtype"])
        weight, bias = read_head(config, dtype=dtype, device=plan.head_device)
        weights: dict[str, int] = {str(plan.head_device): weight.numel() * weight.element_size()}
        for rank, told in enumerate(started):
            place = "cpu" if self._device.type == "cpu" else f"cuda:{rank}"
            weights[place] = weights.get(place, 0) + int(told["bytes"])
        super().__init__(model_settings(config), weight, bias, shape=plan.shape, weights=weights)

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that hold the model now."""
        return [] if self._ranks is None else [each.pid for each in self._ranks.processes]

    def hidden_states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [B, L, D] of int [B, L], on the LM head's device.

        Raises
        ------
        ModelError
            A rank fails or does not answer.
        torch.OutOfMemoryError
            A rank has no memory for so many.
        """
        return self._ask("states", ids, (*ids.shape, self.weight.shape[1]))

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The model's own logits [N, V] at the N positions of a mask int [B, L]."""
        return self._ask("logits", torch.stack((ids, mask)), (int(mask.sum()), self.weight.shape[0]))

    def _ask(self, what: str, ids: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        with self._lock:
            self._started()
            assert self._ranks is not None
            try:
                found = self._ranks.ask(what, ids.cpu().numpy(), shape, self.weight.dtype)
            except BaseException:
                self._ranks.end()
                self._ranks = None
                raise
        return found.clone() if self._device.type == "cpu" else found.to(self._device)

    def _started(self) -> list[Json]:
        """Start the ranks, if none are there; what they tell when they have loaded."""
        if self._ranks is not None:
            return []
        ranks = _Ranks(self._config, self._device)
        try:
            told = ranks.answers(START_SECONDS)
        except BaseException:
            ranks.end()
            raise
        self._ranks = ranks
        return told


class _Ranks:
    """Processes with a part of the model each, and the memory in which the first one leaves results."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._name, world = config.name, config.tensor_parallel
        self._memory = os.memfd_create("rise-ops-states")
        self._map: mmap.mmap | None = None
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self.end = weakref.finalize(self, _end, self.processes, self._connections, self._memory)
        files = resolve_model(config)
        for rank in range(world):
            ours, theirs = socket.socketpair()
            with theirs:
                self.processes.append(_start(theirs.fileno(), self._memory, device))
            self._connections.append(Connection(ours.detach()))
            task = {
                "model": config.model_dump(mode="json"),
                "location": files.location,
                "commit": files.commit,
                "rank": rank,
                "world": world,
                "port": self._store.port,
                "threads": max(1, torch.get_num_threads() // world),
                "seconds": START_SECONDS,
            }
            self._connections[-1].send_bytes(json.dumps(task).encode())

    def ask(self, what: str, ids: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Have all ranks compute; the result of the first, valid until the next call."""
        size = int(np.prod(shape)) * dtype.itemsize
        if self._map is None or len(self._map) < size:
            os.ftruncate(self._memory, size)
            self._map = mmap.mmap(self._memory, size)
        question = json.dumps({"what": what, "shape": ids.shape, "room": len(self._map)}).encode()
        for connection in self._connections:
            try:
                connection.send_bytes(question)
                connection.send_bytes(np.ascontiguousarray(ids, np.int64).tobytes())
            except OSError:
                break  # it has ended, which its answer will tell
        told = self.answers(STEP_SECONDS)[0]
        if tuple(told["shape"]) != shape or told["dtype"] != str(dtype)[6:]:
            raise ModelError(
                f"model {self._name} returned {what} {told['shape']} in {told['dtype']} for {list(ids.shape)} tokens, "
                f"{list(shape)} in {str(dtype)[6:]} expected; this model cannot be used with model.tensor_parallel"
            )
        return torch.frombuffer(self._map, dtype=dtype, count=int(np.prod(shape))).view(shape)

    def answers(self, seconds: float) -> list[Json]:
        """One answer of each rank, in their order."""
        found: dict[int, Json] = {}
        failures: list[tuple[int, int, str]] = []
        limit = time.monotonic() + seconds
        while len(found) + len(failures) < len(self._connections):
            heard = {each for _, each, _ in failures} | found.keys()
            waiting = {each: rank for rank, each in enumerate(self._connections) if rank not in heard}
            ready = wait(list(waiting), timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for rank in (waiting[each] for each in ready if isinstance(each, Connection)):
                answer = self._receive(rank)
                if "failure" not in answer:
                    found[rank] = answer
                    continue
                failures.append((_CAUSES.index(answer["failure"]), rank, answer["text"]))
                limit = min(limit, time.monotonic() + _GRACE_SECONDS)
        if failures:
            self._raise(*min(failures))
        if len(found) < len(self._connections):
            silent = [rank for rank in range(len(self._connections)) if rank not in found]
            raise ModelError(
                f"model {self._name}: rank {silent[0]} of {len(self._connections)} has not answered for {seconds:g} s; "
                "look whether its device works"
            )
        return [found[rank] for rank in range(len(self._connections))]

    def _receive(self, rank: int) -> Json:
        try:
            answer: Json = json.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            try:
                code = self.processes[rank].wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            return {"failure": "ended", "text": f"its process has ended with code {code}"}
        return answer

    def _raise(self, cause: int, rank: int, text: str) -> None:
        message = f"model {self._name}: rank {rank} of {len(self._connections)} failed ({text})"
        if _CAUSES[cause] == "memory":
            raise torch.OutOfMemoryError(message)
        raise ModelError(f"{message}; try again, or run the model without model.tensor_parallel")


def _start(connection: int, memory: int, device: torch.device) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH")
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",  # all are on this machine
        **os.environ,
        "PYTHONPATH": package if not known else f"{package}{os.pathsep}{known}",
    }
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, "-m", "rise_ops.tensor_rank", str(connection), str(memory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # ours may be read by a program
        env=environment,
        pass_fds=(connection, memory),
    )


def _end(processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection], memory: int) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for connection in connections:
        connection.close()
    os.close(memory)
