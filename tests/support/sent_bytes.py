"""Counts the bytes that a training step sends between two processes, with the kernel's TCP counters."""

import os
import socket
import struct
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from meanflow_core.config import GuidanceConfig
from meanflow_core.presets.demo import debug
from meanflow_core.sharding import shard_network
from meanflow_core.training import build_train_state, train_step
from tests.support.training_steps import IDENTITY, make_batch, part_of

GUIDED = replace(debug(), loss=replace(debug().loss, guidance=GuidanceConfig(omega=1.0, kappa=0.5)))


def sent_bytes() -> int:
    """Bytes that this process has sent over TCP so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # closed in the meantime
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                [sent] = struct.unpack_from("Q", info, 200)  # tcpi_bytes_sent, since Linux 4.19
                total += sent
    return total


def count_sent(rank: int) -> dict[str, float]:
    """The bytes that one of two processes sends per step, {"KIND PASSES": bytes}."""
    found = {}
    for kind in ("ddp", "fsdp2"):
        state = build_train_state(
            GUIDED, sample_size=8, in_channels=4, num_classes=10, device=torch.device("cpu"),
            shard=shard_network if kind == "fsdp2" else None,
        )  # fmt: skip
        training_network = state.network
        if kind == "ddp":
            training_network = DistributedDataParallel(
                state.network, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
        for passes in (1, 2):
            rows = GUIDED.global_batch_size // (2 * passes)
            starts = [(rank * passes + number) * rows for number in range(passes)]
            batches = [part_of(make_batch(GUIDED), start, start + rows, GUIDED) for start in starts]
            before = 0
            for number in range(3):  # DDP rebuilds its buckets after the first step
                if number == 1:
                    before = sent_bytes()
                accumulating = {"accumulating": training_network.no_sync} if kind == "ddp" else {}
                train_step(state, training_network, batches, IDENTITY, GUIDED, **accumulating)
            found[f"{kind} {passes}"] = (sent_bytes() - before) / 2
    return found
