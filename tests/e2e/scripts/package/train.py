"""A module for `torchrun -m package.train`: relative import, torchrun's variables, and `record` of its error file."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from .sizes import WIDTH


@record
def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = torch.full((WIDTH,), float(rank + 1))
    dist.all_reduce(total)
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")
    numbers = [int(os.environ[name]) for name in names]
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    print(
        f"rank {rank} of {world_size} sum {total.tolist()} numbers {numbers} restarts {restarts} "
        f"of {os.environ['TORCHELASTIC_MAX_RESTARTS']} run {os.environ['TORCHELASTIC_RUN_ID']} "
        f"elastic {dist.is_torchelastic_launched()} name {__name__} package {__package__} arguments {sys.argv[1:]}",
        flush=True,
    )
    dist.barrier()
    if rank == 1 and restarts == 0:
        sys.exit(3)
    if rank == 0 and restarts == 1:
        raise OSError("a disk hiccuped")
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    main()
