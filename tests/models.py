"""What people bring: models, datasets and mistakes that the tests put into the scripts."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler


class CNN(nn.Sequential):
    """Images of (batch, 1, 8, 8) to 2 logits, with two convolutions."""

    def __init__(self, input_size, *more):
        layers = [nn.Conv2d(1, 8, 3, padding=1), *more, nn.ReLU()]
        layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(256, 2))


class BatchNormCNN(CNN):
    def __init__(self, input_size):
        super().__init__(input_size, nn.BatchNorm2d(8))


class DropoutCNN(CNN):
    def __init__(self, input_size):
        super().__init__(input_size, nn.Dropout(0.3))


class DeepMLP(nn.Sequential):
    """Images to 2 logits through 8 layers."""

    def __init__(self, input_size):
        layers = [nn.Flatten(), nn.Linear(64, 32)]
        for _ in range(7):
            layers += [nn.ReLU(), nn.Linear(32, 32)]
        super().__init__(*layers, nn.Linear(32, 2))


class Transformer(nn.Module):
    """Images, a token for each row, to 2 logits; no dropout."""

    def __init__(self, input_size):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        return self.head(self.encoder(images[:, 0]).mean(dim=1))


class DropoutLSTM(nn.Module):
    """Dropout where no layer of that name shows it."""

    def __init__(self, input_size):
        super().__init__()
        self.lstm = nn.LSTM(8, 16, 2, batch_first=True, dropout=0.5)
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.lstm(images[:, 0])[0][:, -1])


class NaNModel(nn.Linear):
    def __init__(self, input_size):
        super().__init__(input_size, 2)

    def forward(self, inputs):
        return super().forward(inputs) * float("nan")


class LargeModel(nn.Linear):
    """Nearly nothing to compute, and gradients of 40 MB."""

    def __init__(self, input_size):
        super().__init__(input_size, 2)
        self.large = nn.Parameter(torch.zeros(10_000_000))

    def forward(self, inputs):
        return super().forward(inputs) + self.large.sum()


class SlowModel(nn.Linear):
    def __init__(self, input_size):
        super().__init__(input_size, 2)

    def forward(self, inputs):
        time.sleep(0.03)
        return super().forward(inputs)


class SyncCheckedModel(nn.Linear):
    """Forbids to wait for the GPU, from the 4th of its calls to the 300th of 313."""

    mistake = False

    def __init__(self, input_size):
        super().__init__(input_size, 2)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        torch.cuda.set_sync_debug_mode("error" if 3 < self.calls < 300 else 0)
        if self.mistake:
            inputs.sum().item()
        return super().forward(inputs)


class FailingModel(nn.Linear):
    """Fails on rank 1, in DDP training."""

    def __init__(self, input_size):
        super().__init__(input_size, 2)

    def forward(self, inputs):
        if dist.get_rank() == 1:
            raise ValueError("a mistake in the model")
        return super().forward(inputs)


class Images(Dataset):
    """An ordinary dataset of single samples. The brighter half is the label."""

    def __init__(self, length, size, seed=0):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randn(1, 8, 8, generator=generator)
        label = index % 2
        image[:, 4 * label : 4 * label + 4] += 1
        return image, label


class Samples(Dataset):
    """Random inputs and labels; a base for the datasets below."""

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]


class SlowSamples(Samples):
    """A millisecond for each sample: work that two processes do in half the time."""

    def __getitem__(self, index):
        time.sleep(0.001)
        return super().__getitem__(index)


class RecordedSamples(Samples):
    """Notes which samples a process reads, and a checksum of its data."""

    def __getitem__(self, index):
        with open(f"samples of rank {os.environ['RANK']}", "a") as file:
            file.write(f"{index} {self.inputs.sum().item()}\n")
        return super().__getitem__(index)


class UnseededSamples(Samples):
    """A mistake: each rank has other data."""

    def __init__(self, length, size, seed=0):
        super().__init__(length, size, seed + dist.get_rank())


class OverlappingSampler(DistributedSampler):
    """A mistake: each rank reads the same part of the dataset."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rank = 0


class UnsynchronisedDDP(DistributedDataParallel):
    """A mistake: no_sync() is left on."""

    def forward(self, *inputs):
        with self.no_sync():
            return super().forward(*inputs)


class TwiceDividedDDP(DistributedDataParallel):
    """A mistake: the sum of the gradients is divided by the world size twice."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_comm_hook(None, self.divide)

    @staticmethod
    def divide(_, bucket):
        size = dist.get_world_size()
        bucket.buffer().div_(size * size)
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


class CyclicDDP(DistributedDataParallel):
    """In a reference cycle, which only the garbage collector frees."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        vars(self)["cycle"] = self


class SlowDDP(DistributedDataParallel):
    def forward(self, *inputs):
        time.sleep(0.01)
        return super().forward(*inputs)


def no_check(*_):
    """In place of check_gradients."""
    return {}
