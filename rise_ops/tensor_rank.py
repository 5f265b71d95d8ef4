"""One rank of `rise_ops.tensor_parallel`: `python -m rise_ops.tensor_rank SOCKET MEMORY`, two open file descriptors.

Messages are JSON, token ids raw bytes. Whatever this process is at, it ends when the other end of the socket is closed.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import sys
import threading
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rise_ops.config import ModelConfig
from rise_ops.loading import load_model, quiet_transformers
from rise_ops.model_files import ModelFiles, first_line

Json = dict[str, Any]


def main(connection: Connection, memory: int) -> None:
    """Load a part of a model, then answer questions until nobody asks."""
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()
    task = json.loads(messages.get())
    model = None
    while True:
        try:
            if model is None:
                model = _load(task)
                answer = _told(model)
            else:
                answer = _answer(model, messages, memory if task["rank"] == 0 else None)
        except torch.OutOfMemoryError as error:
            answer = {"failure": "memory", "text": first_line(error)}
        except Exception as error:  # noqa: BLE001  told where the model was asked for
            answer = {"failure": "error", "text": f"{type(error).__name__}: {first_line(error)}"}
        connection.send_bytes(json.dumps(answer).encode())
        if "failure" in answer:
            os._exit(1)  # the others may wait for this one: they are all started again


def _listen(connection: Connection, messages: queue.SimpleQueue[bytes]) -> None:
    """Hand messages over; at their end, end the process, which may be waiting for other ranks."""
    try:
        while True:
            messages.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _load(task: Json) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    rank, world = task["rank"], task["world"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(task["threads"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=TCPStore("127.0.0.1", task["port"], is_master=False),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=task["seconds"]),
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    config = ModelConfig.model_validate(task["model"])
    with quiet_transformers():
        files, split = ModelFiles(task["location"], task["commit"]), DistributedConfig(tp_size=world)
        return load_model(config, files, working=0, distributed_config=split)


def _told(model: Any) -> Json:
    parts = [getattr(each, "_local_tensor", each) for each in model.parameters()]
    dtype = str(model.get_output_embeddings().weight.dtype).removeprefix("torch.")
    return {"bytes": sum(each.numel() * each.element_size() for each in parts), "dtype": dtype}


@torch.inference_mode()
def _answer(model: Any, messages: queue.SimpleQueue[bytes], memory: int | None) -> Json:
    question = json.loads(messages.get())
    raw = np.frombuffer(messages.get(), np.int64).reshape(question["shape"])
    ids = torch.from_numpy(raw.copy()).to(model.device)
    if question["what"] == "states":
        found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    else:
        ids, mask = ids
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    if memory is not None:
        room = mmap.mmap(memory, question["room"])
        torch.frombuffer(room, dtype=found.dtype, count=found.numel()).view(found.shape).copy_(found)
    return {"shape": list(found.shape), "dtype": str(found.dtype).removeprefix("torch.")}


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
