"""Contrastive learning: two views of each signal, and the InfoNCE loss.

    python ddp.py --definitions tests/examples/contrastive.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/contrastive.py

Needs nothing but PyTorch. The loss compares the samples of one rank's batch only: a
larger --batch_size makes it harder, more processes do not.
"""

import torch
from torch import nn
from torch.utils.data import Dataset


class Pairs(Dataset):
    """Sums of three waves, and of each a pair of views: both shifted, with noise."""

    def __init__(self, length, size, seed):
        generator = torch.Generator().manual_seed(seed)
        waves = torch.randint(1, 20, (length, 3, 1), generator=generator)
        times = torch.arange(size) / size
        self.signals = torch.sin(2 * torch.pi * waves * times).sum(dim=1, keepdim=True)

    def __len__(self):
        return len(self.signals)

    def __getitem__(self, index):
        return self.view(index), self.view(index)

    def view(self, index):
        signal = self.signals[index]
        shift = int(torch.randint(signal.shape[1], ()))
        return signal.roll(shift, dims=1) + 0.3 * torch.randn_like(signal)


def make_datasets(args):
    length, size, seed = args.dataset_length, args.input_size, args.seed
    validation_set = Pairs(max(1, length // 10), size, 2 * seed)
    return Pairs(length, size, 2 * seed + 1), validation_set


def make_model(args):
    one = nn.Conv1d(1, 32, 9, stride=2, padding=4), nn.ReLU()
    two = nn.Conv1d(32, 64, 9, stride=2, padding=4), nn.ReLU()
    return nn.Sequential(*one, *two, nn.AdaptiveAvgPool1d(1), nn.Flatten())


def compute_loss(model, batch):
    """Return InfoNCE, and how many first views have their own second view nearest."""
    vectors = nn.functional.normalize(model(torch.cat(batch)), dim=1)
    first, second = vectors.chunk(2)
    similarities = first @ second.T / 0.1  # of all pairs; 0.1 is the temperature
    targets = torch.arange(len(first), device=first.device)
    loss = nn.functional.cross_entropy(similarities, targets)
    nearer = (similarities > similarities.diagonal().unsqueeze(1)).sum(dim=1)
    return loss, {"nearest": (nearer == 0).sum(), "top5": (nearer < 5).sum()}


def count_items(batch):
    return len(batch[0])
