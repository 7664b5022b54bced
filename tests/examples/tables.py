"""A table in an HDF5 file, which each process, or DataLoader worker, opens for itself.

    python ddp.py --definitions tests/examples/tables.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/tables.py

Needs h5py. The file is made in the folder for temporary files, and stays there.
"""

import os
import tempfile
import time
import uuid

import h5py
import torch
from torch.utils.data import Dataset


class Table(Dataset):
    def __init__(self, path, group):
        self.path, self.group, self.file = path, group, None
        with h5py.File(path) as file:  # closed again
            self.length = len(file[group]["labels"])

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.file is None:  # not earlier: a file must not be open when workers fork
            self.file = h5py.File(self.path)
        rows = self.file[self.group]
        return torch.from_numpy(rows["inputs"][index]), int(rows["labels"][index])


def make_datasets(args):
    length, size, seed = args.dataset_length, args.input_size, args.seed
    path = f"{tempfile.gettempdir()}/table-{length}-{size}-{seed}.h5"
    if os.environ["LOCAL_RANK"] == "0" and not os.path.exists(path):
        part = f"{path}.{uuid.uuid4()}"
        write(part, length, size, seed)
        os.replace(part, path)  # the others see a whole file, or none
    while not os.path.exists(path):  # the others of this machine wait
        time.sleep(0.1)
    return Table(path, "training"), Table(path, "validation")


def write(path, length, size, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=generator)
    with h5py.File(path, "w") as file:
        for group, rows in ("training", length), ("validation", length // 10 or 1):
            inputs = torch.randn(rows, size, generator=generator)
            file[f"{group}/inputs"] = inputs.numpy()
            file[f"{group}/labels"] = (inputs @ weights > 0).long().numpy()
