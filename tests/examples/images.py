"""Images in folders, one for each class, and a ResNet-18 (torchvision) from scratch.

    python ddp.py --definitions tests/examples/images.py \
        --dataset_length 1000 --batch_size 16
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/images.py --dataset_length 1000 --batch_size 16

Needs torchvision. Set IMAGES=/path for images in /path/train/CLASS and /path/val/CLASS:
without it, --dataset_length images are made. --learning_rate has no effect.
"""

import math
import os

import torch
from torchvision import datasets, models
from torchvision.transforms import v2

IMAGES, SIZE = os.environ.get("IMAGES"), 32  # 224 for photographs
CLASSES = len(datasets.folder.find_classes(f"{IMAGES}/train")[0]) if IMAGES else 3


class Tinted(datasets.FakeData):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        image[label] += 0.05  # noise, with a little more of one colour
        return image, label


def make_datasets(args):
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    crop = v2.RandomResizedCrop(SIZE, scale=(0.5, 1))
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), *end])
    plain = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE), *end])
    if IMAGES:
        training_set = datasets.ImageFolder(f"{IMAGES}/train", augment)
        return training_set, datasets.ImageFolder(f"{IMAGES}/val", plain)
    length, shape = args.dataset_length, (3, 40, 40)
    training_set = Tinted(length, shape, CLASSES, augment)
    return training_set, Tinted(length // 10 or 1, shape, CLASSES, plain, None, length)


def make_model(args):
    return models.resnet18(num_classes=CLASSES)


def make_optimizer(model, args):
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases, and norms'
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0003, weight_decay=0.05)


def make_scheduler(optimizer, total_steps, args):
    """Return a warm-up, for a tenth of the steps, and then half a cosine, to 0."""

    def factor(step):
        done = step / total_steps
        return min(10 * (step + 1) / total_steps, (1 + math.cos(math.pi * done)) / 2)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
