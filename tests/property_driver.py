"""Train random small combinations with ddp.py's own functions, normally and with DDP.

    python property_driver.py WORLD_SIZE COMBINATIONS SEED

Starts the processes once for all combinations, which is what makes many of them quick.
Prints those that end with different models.
"""

import argparse
import contextlib
import os
import random
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ddp


def worker(rank, world_size, port, combinations):
    ddp.end_with_parent()
    torch.set_num_threads(1)
    ddp.measure_step = lambda *_: None  # takes two seconds
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(rank, world_size, combinations)
    ddp.leave_group()


def train(rank, world_size, combinations):
    cpu = torch.device("cpu")
    for combination in combinations:
        args = argparse.Namespace(**combination)
        # Every rank trains normally, all the same, since train_loop() sees a group.
        normal = ddp.train(0, world_size, False, args, cpu)
        distributed = ddp.train(rank, world_size, True, args, cpu)
        torch.manual_seed(args.seed)
        untrained = ddp.MyModel(args.input_size).state_dict()
        moved = ddp.largest_difference(normal["weights"], untrained)
        difference = ddp.largest_difference(normal["weights"], distributed["weights"])
        if not difference < 1e-4 * moved:
            print(f"differ by {difference} of {moved}: {combination}", file=sys.stderr)


def main():
    world_size, count, seed = map(int, sys.argv[1:])
    choose = random.Random(seed).randint
    combinations = [
        {
            "dataset_length": choose(1, 40),
            "batch_size": choose(1, 12),
            "grad_accum_steps": choose(1, 6),
            "epochs": choose(1, 3),
            "seed": choose(0, 99),
            "input_size": 10,
            "learning_rate": 0.01,
            "num_workers": 0,
            "amp": False,
        }
        for _ in range(count)
    ]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (world_size, store.port, combinations), world_size)
    print(f"{count} combinations in {world_size} processes")


if __name__ == "__main__":
    main()
