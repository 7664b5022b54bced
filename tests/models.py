"""What people bring: jobs, and mistakes, that the tests put into the scripts.

A job is a dict of what it replaces: {"MyDataset": "Texts", "MyModel": "Tagger", …}.
"""

import os
import random
import time

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, DistributedSampler, default_collate


class Images(Dataset):
    """An ordinary dataset of single samples. The brighter half is the label."""

    def __init__(self, length, size, seed=0, train=True):
        self.length, self.seed = length, 2 * seed + train

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + 2 * index)
        image = torch.randn(1, 8, 8, generator=generator)
        label = index % 2
        image[:, 4 * label : 4 * label + 4] += 1
        return self.augment(image), label

    def augment(self, image):
        return image


class TorchAugmented(Images):
    def augment(self, image):
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image + 0.1 * torch.randn_like(image)


class OtherwiseAugmented(Images):
    """With the generators of `random` and of NumPy."""

    def augment(self, image):
        image = image.flip(-1) if random.random() < 0.5 else image
        return image * float(numpy.random.uniform(0.5, 1.5))


class OwnGenerator(Images):
    """Cannot be repeated: its random numbers are those of no global generator."""

    def augment(self, image):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        return image + torch.randn(image.shape, generator=self.generator)


class CNN(nn.Sequential):
    """Images of (batch, 1, 8, 8) to 2 logits, with two convolutions."""

    def __init__(self, input_size, *more):
        layers = [nn.Conv2d(1, 8, 3, padding=1), *more, nn.ReLU()]
        layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(256, 2))


class BatchNormCNN(CNN):
    def __init__(self, input_size):
        super().__init__(input_size, nn.BatchNorm2d(8))


class SyncBatchNormCNN(CNN):
    def __init__(self, input_size):
        super().__init__(input_size, nn.SyncBatchNorm(8))


class DropoutCNN(CNN):
    def __init__(self, input_size):
        super().__init__(input_size, nn.Dropout(0.3))


class NoisyCNN(CNN):
    """Noise, in evaluation mode too, as in a diffusion model."""

    def forward(self, images):
        return super().forward(images + 0.3 * torch.randn_like(images))


class CountingCNN(CNN):
    """Cannot be repeated: each call is another function."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * self.calls


class TrainingOnlyCNN(CNN):
    """Has no loss in evaluation mode, as torchvision's detectors."""

    def forward(self, images):
        if not self.training:
            raise RuntimeError("no loss in evaluation mode")
        return super().forward(images)


class HookedCNN(CNN):
    """Its hook is lost, or refers to the first model, when the model is copied."""

    def __init__(self, input_size):
        super().__init__(input_size)
        self[0].weight.register_hook(lambda gradient: 2 * gradient)


class SpectralCNN(CNN):
    """Spectral norm has buffers that every forward pass changes; with checkpointing."""

    def __init__(self, input_size):
        super().__init__(input_size, nn.BatchNorm2d(8), nn.Dropout(0.2))
        nn.utils.parametrizations.spectral_norm(self[0])

    def forward(self, images):
        convolution, *layers = self
        images = checkpoint(
            nn.Sequential(*layers[:3]), convolution(images), use_reentrant=False
        )
        return nn.Sequential(*layers[3:])(images)


class TeacherCNN(CNN):
    """With a moving average of its weights inside, which is not trained."""

    def __init__(self, input_size):
        super().__init__(input_size)
        self.add_module("teacher", DropoutCNN(input_size))
        for weight in self.teacher.parameters():
            weight.requires_grad = False

    def forward(self, images):
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), list(self.parameters()))
            for average, weight in pairs:
                average.lerp_(weight, 0.1)
            target = self.teacher(images)
        for layer in list(self)[:-1]:
            images = layer(images)
        return images + target


class DeepMLP(nn.Sequential):
    """Images to 2 logits through 8 layers."""

    def __init__(self, input_size):
        layers = [nn.Flatten(), nn.Linear(64, 32)]
        for _ in range(7):
            layers += [nn.ReLU(), nn.Linear(32, 32)]
        super().__init__(*layers, nn.Linear(32, 2))


class Transformer(nn.Module):
    """Images, a token for each row, to 2 logits."""

    def __init__(self, input_size):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
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


class Texts(Dataset):
    """Dicts of a sentence of tokens, of unequal lengths, and whether the first is odd."""

    length = None  # pad to this

    def __init__(self, length, size, seed=0, train=True):
        choose = random.Random(2 * seed + train)
        numbers = [choose.randint(3, 20) for _ in range(length)]
        self.texts = [[choose.randint(1, 49) for _ in range(n)] for n in numbers]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        tokens = self.texts[index]
        if self.length:
            tokens = tokens + [0] * (self.length - len(tokens))
        return {"tokens": torch.tensor(tokens), "label": self.texts[index][0] % 2}


class PaddedTexts(Texts):
    length = 20


def pad(samples):
    """In place of collate: pad the texts of a batch to the longest of them."""
    tokens = pad_sequence([sample["tokens"] for sample in samples], batch_first=True)
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"tokens": tokens, "label": labels, "language": "en"}


def mask_and_pad(samples):
    """Hide random tokens."""
    batch = pad(samples)
    hidden = torch.rand(batch["tokens"].shape) < 0.15
    batch["tokens"] = batch["tokens"].masked_fill(hidden, 1)
    return batch


def mixup(samples):
    images, labels = default_collate(samples)
    share = random.random()
    return share * images + (1 - share) * images[torch.randperm(len(images))], labels


class TextModel(nn.Module):
    """Called with keywords. The embedding's weights are those of the output, too."""

    def __init__(self, input_size):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.output = nn.Linear(16, 50, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, tokens, mask):
        states, _ = self.gru(self.embed(tokens) * mask.unsqueeze(-1))
        return self.output(states)


def text_loss(model, batch):
    """The mean over the texts. It takes the batch apart, as many do."""
    tokens, labels = batch.pop("tokens"), batch.pop("label")
    mask = (tokens != 0).float()
    outputs = model(tokens=tokens, mask=mask)
    # In place of its mean over the tokens, which would count the padding:
    outputs = (outputs * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    loss = functional.cross_entropy(outputs, labels)
    return loss, len(labels), (outputs.argmax(dim=1) == labels).sum()


def token_loss(model, batch):
    """The mean over the tokens: of these, batches have unequal numbers."""
    tokens = batch["tokens"]
    outputs = model(tokens=tokens[:, :-1], mask=(tokens[:, :-1] != 0).float())
    targets = tokens[:, 1:].flatten()
    loss = functional.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=0)
    right = (outputs.flatten(0, 1).argmax(dim=1) == targets).sum()
    return loss, len(tokens), right / targets.numel()


def tokens_counted(model, batch):
    """A mistake: it counts tokens in place of samples."""
    loss, _, right = text_loss(model, dict(batch))
    return loss, batch["tokens"].numel(), right


class Nested(Dataset):
    """Samples that are nested, with a string inside."""

    def __init__(self, length, size, seed=0, train=True):
        self.images = Images(length, size, seed, train)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return ({"top": image[:, :4], "rest": [image[:, 4:]]}, ("name", label))


def nested_loss(model, batch):
    image, (names, labels) = batch
    assert names[0] == "name"
    outputs = model(torch.cat([image["top"], *image["rest"]], dim=2))
    loss = functional.cross_entropy(outputs, labels)
    return loss, len(labels), (outputs.argmax(dim=1) == labels).sum()


class Answers(Dataset):
    """For a regression: the answer is the sum of the first three numbers."""

    def __init__(self, length, size, seed=0, train=True):
        generator = torch.Generator().manual_seed(2 * seed + train)
        self.inputs = torch.randn(length, 5, generator=generator)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.inputs[index, :3].sum(dim=0, keepdim=True)


class Regression(nn.Linear):
    def __init__(self, input_size):
        super().__init__(5, 1)


def squared_error(model, batch):
    inputs, answers = batch
    outputs = model(inputs)
    loss = functional.mse_loss(outputs, answers)
    return loss, len(inputs), (outputs - answers).abs().sum()  # it has a gradient


class Views(Images):
    """Pairs of views of an image."""

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        return tuple(image + 0.1 * torch.randn_like(image) for _ in range(2))


class Encoder(nn.Sequential):
    def __init__(self, input_size):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1))


def contrastive_loss(model, batch):
    """Calls the model twice, and compares each sample with all others of its batch."""
    one, other = (functional.normalize(model(view).float()) for view in batch)
    targets = torch.arange(len(one), device=one.device)
    similar = 5 * one @ other.T
    right = (similar.argmax(dim=1) == targets).sum()
    return functional.cross_entropy(similar, targets), len(one), right


def siamese_loss(model, batch):
    images, labels = batch
    outputs, others = model(images), model(images.flip(-1))
    loss = functional.cross_entropy(outputs, labels)
    loss = loss + functional.cross_entropy(others, labels)
    return loss, len(labels), (outputs.argmax(dim=1) == labels).sum()


def infinite_on_rank_1(model, batch):
    """The usual loss; once, in training, it is infinite on one rank alone."""
    images, labels = batch
    outputs = model(images)
    loss = functional.cross_entropy(outputs, labels)
    module = getattr(model, "module", model)
    module.calls = getattr(module, "calls", 0) + model.training
    if module.calls == 3 and model.training and dist.get_rank() == 1:
        loss = loss * float("inf")
    return loss, len(labels), (outputs.argmax(dim=1) == labels).sum()


CNN_JOB = {"MyDataset": "Images", "MyModel": "CNN"}
TEXT_JOB = {"MyDataset": "Texts", "MyModel": "TextModel", "collate": "pad"}
JOBS = {
    "padded dicts": {
        "MyDataset": "PaddedTexts",
        "MyModel": "TextModel",
        "compute_loss": "text_loss",
    },
    "texts": dict(TEXT_JOB, compute_loss="text_loss"),
    "nested": dict(CNN_JOB, MyDataset="Nested", compute_loss="nested_loss"),
    "augmented": {"MyDataset": "TorchAugmented", "MyModel": "BatchNormCNN"},
    "otherwise augmented": {"MyDataset": "OtherwiseAugmented", "MyModel": "DropoutCNN"},
    "regression": {
        "MyDataset": "Answers",
        "MyModel": "Regression",
        "compute_loss": "squared_error",
    },
    "tied weights": dict(TEXT_JOB, compute_loss="token_loss"),
    "contrastive": {
        "MyDataset": "Views",
        "MyModel": "Encoder",
        "compute_loss": "contrastive_loss",
    },
}


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


class Samples(Dataset):
    """Random inputs and labels, one by one; a base for the datasets below."""

    def __init__(self, length, size, seed=0, train=True):
        generator = torch.Generator().manual_seed(2 * seed + train)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)
        self.train = train

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
        use = "samples" if self.train else "validation"
        with open(f"{use} of rank {os.environ['RANK']}", "a") as file:
            file.write(f"{index} {self.inputs.sum().item()}\n")
        return super().__getitem__(index)


class SlowValidation(Samples):
    """Nearly all of the time goes into validation."""

    def __getitem__(self, index):
        time.sleep(0 if self.train else 0.05)
        return super().__getitem__(index)


class UnseededImages(TorchAugmented):
    """A mistake: each rank has other data."""

    def __init__(self, length, size, seed=0, train=True):
        super().__init__(length, size, seed + dist.get_rank(), train)


class OverlappingSampler(DistributedSampler):
    """A mistake: each rank reads the same part of the dataset."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rank = 0


class NoDDP(nn.Module):
    """A mistake: the model is not wrapped, so nothing is averaged."""

    def __init__(self, module, **options):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)

    def no_sync(self):
        return torch.enable_grad()


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


def no_check(*_):
    """In place of ddp.py's check."""
    return {"gradient_bytes": 0}


def float16(*_):
    """In place of choose_precision."""
    return "float16"
