"""Handwritten digits, and a convolutional network that gains from a second process.

    python ddp.py --definitions tests/examples/digits.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/digits.py

Needs scikit-learn, which has the 1,797 images. --dataset_length has no effect.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def make_datasets(args):
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    held_out = torch.arange(len(labels)) % 5 == 0  # every fifth one, for validation
    training_set = TensorDataset(images[~held_out], labels[~held_out])
    return training_set, TensorDataset(images[held_out], labels[held_out])


def make_model(args):
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(1024, 10),
    )


def make_optimizer(model, args):
    return torch.optim.AdamW(model.parameters(), lr=0.003)
