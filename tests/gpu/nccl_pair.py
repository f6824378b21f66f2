"""One of two ranks of an NCCL group that meet on one card: python -m tests.gpu.nccl_pair RANK PORT"""

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

BYTES = 10_000_000


def main(rank: int, port: int) -> None:
    """Rank 0 broadcasts; rank 1 prints what came and how long a second broadcast took."""
    torch.cuda.set_device(0)
    within = timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=within)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=2, timeout=within)
    sent = torch.full((BYTES,), 7 if rank == 0 else 0, dtype=torch.uint8, device="cuda")
    dist.broadcast(sent, 0)
    torch.cuda.synchronize()
    began = time.perf_counter()
    dist.broadcast(sent, 0)
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    if rank:
        print(json.dumps({"right": bool((sent == 7).all()), "seconds": took}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
