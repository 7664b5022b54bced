"""A moving average of the weights (EMA), which is what validation uses.

    python ddp.py --definitions tests/examples/averaged.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/averaged.py

Needs scikit-learn, as digits.py does. The average is a part of the model, so that it is
saved in snapshots. --learning_rate and --dataset_length have no effect.
"""

import copy

import digits
import torch
from torch import nn

make_datasets = digits.make_datasets


class Averaged(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)

    def forward(self, images):
        return (self.network if self.training else self.average)(images)

    @torch.no_grad()
    def update(self, *_):
        new, old = self.network, self.average
        for weight, average in zip(new.parameters(), old.parameters()):
            average.lerp_(weight, 0.1)
        for value, average in zip(new.buffers(), old.buffers()):
            average.copy_(value)  # BatchNorm's statistics are averages already


def make_model(args):
    return Averaged(digits.make_model(args))


def make_optimizer(model, args):
    optimizer = digits.make_optimizer(model.network, args)
    optimizer.register_step_post_hook(model.update)  # after each step, on all ranks
    return optimizer
