"""What people bring: jobs, and mistakes, that the tests put into the scripts.

A job is a dict of which definition is taken from here: {"MyDataset": "Texts", …}.
"""

import dataclasses
import os
import random
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, default_collate


class Images(Dataset):
    """An ordinary dataset of single samples. The brighter half is the label."""

    def __init__(self, length, size, seed=0):
        self.length, self.seed = length, seed

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
    """Its random numbers are those of no global generator, but the same on all ranks."""

    def augment(self, image):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(0)
        return image + torch.randn(image.shape, generator=self.generator)


class UnseededAugmented(Images):
    """As albumentations: its generator starts with another seed in each process."""

    def augment(self, image):
        if not hasattr(self, "generator"):
            self.generator = numpy.random.default_rng()
        return image + torch.tensor(self.generator.normal(size=image.shape)).float()


class AnySize(Images):
    """Images of unequal sizes: none but batches of one sample are possible."""

    def augment(self, image):
        size = 8 + int(1e4 * image[0, 0, 0].abs()) % 3
        return functional.interpolate(image[None], size=(size, size))[0]


class BlackBorder(Images):
    """A mistake: data that differs between ranks, inside a large and black image."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        large = torch.zeros(1, 80, 80)
        large[:, 36:44, 36:44] = image + 0.01 * dist.get_rank()
        return large, label


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


class GrowingCNN(CNN):
    """Cannot be repeated: each call differs a little from the one before."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) * (1 + 0.004 * self.calls)


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

    def __init__(self, length, size, seed=0):
        choose = random.Random(seed)
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
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def token_loss(model, batch):
    """The mean over the tokens: of these, batches have unequal numbers."""
    tokens = batch["tokens"]
    outputs = model(tokens=tokens[:, :-1], mask=(tokens[:, :-1] != 0).float())
    targets = tokens[:, 1:].flatten()
    loss = functional.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=0)
    correct = (outputs.flatten(0, 1).argmax(dim=1) == targets) & (targets != 0)
    return loss, {"accuracy": correct.sum()}


def label_count(batch):
    return len(batch["label"])


def token_count(batch):
    """Of the tokens that are predicted; there can be none."""
    return (batch["tokens"][:, 1:] != 0).sum()


class Nested(Dataset):
    """Samples that are nested, with a string inside."""

    def __init__(self, length, size, seed=0):
        self.images = Images(length, size, seed)

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
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


class Answers(Dataset):
    """For a regression: the answer is the sum of the first three numbers."""

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
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
    return loss, {"error": (outputs - answers).abs().sum()}  # it has a gradient


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
    correct = (similar.argmax(dim=1) == targets).sum()
    return functional.cross_entropy(similar, targets), {"accuracy": correct}


def siamese_loss(model, batch):
    images, labels = batch
    outputs, others = model(images), model(images.flip(-1))
    loss = functional.cross_entropy(outputs, labels)
    loss = loss + functional.cross_entropy(others, labels)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def overflows_now_and_then(model, batch):
    """The loss is infinite for some batches, always the same ones."""
    inputs, labels = batch
    outputs = model(inputs)
    loss = functional.cross_entropy(outputs, labels)
    overflows = (inputs.flatten()[0] > 2.4) & model.training
    loss = loss * torch.where(overflows, float("inf"), 1.0)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def infinite_on_rank_1(model, batch):
    """The usual loss; once, in training, it is infinite on one rank alone."""
    images, labels = batch
    outputs = model(images)
    loss = functional.cross_entropy(outputs, labels)
    module = getattr(model, "module", model)
    module.calls = getattr(module, "calls", 0) + model.training
    if module.calls == 3 and model.training and dist.get_rank() == 1:
        loss = loss * float("inf")
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


YES, NO = True, False  # for COUNTS_DIFFER
CNN_JOB = {"MyDataset": "Images", "MyModel": "CNN"}
TEXT_JOB = {"MyDataset": "Texts", "MyModel": "TextModel", "collate": "pad"}
TEXT_JOB.update(compute_loss="text_loss", count_items="label_count")
JOBS = {
    "padded dicts": {
        "MyDataset": "PaddedTexts",
        "MyModel": "TextModel",
        "compute_loss": "text_loss",
        "count_items": "label_count",
    },
    "texts": TEXT_JOB,
    "nested": dict(CNN_JOB, MyDataset="Nested", compute_loss="nested_loss"),
    "augmented": {"MyDataset": "TorchAugmented", "MyModel": "BatchNormCNN"},
    "otherwise augmented": {"MyDataset": "OtherwiseAugmented", "MyModel": "DropoutCNN"},
    "regression": {
        "MyDataset": "Answers",
        "MyModel": "Regression",
        "compute_loss": "squared_error",
    },
    "tokens": dict(
        TEXT_JOB,
        compute_loss="token_loss",
        count_items="token_count",
        COUNTS_DIFFER="YES",
    ),
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


class SlowModel(nn.Linear):
    slow_ranks = (0, 1)

    def __init__(self, input_size):
        super().__init__(input_size, 2)

    def forward(self, inputs):
        time.sleep(0.03 if dist.get_rank() in self.slow_ranks else 0)
        return super().forward(inputs)


class SlowOnRank1(SlowModel):
    """Rank 0 waits for rank 1, when it averages gradients."""

    slow_ranks = (1,)


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

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)
        self.use = "validation" if seed else "samples"

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

    who = ""

    def __getitem__(self, index):
        with open(f"{self.who}{self.use} of rank {os.environ['RANK']}", "a") as file:
            file.write(f"{index} {self.inputs.sum().item()}\n")
        return super().__getitem__(index)


class ResumedSamples(RecordedSamples):
    who = "resumed "


class ChangedSamples(RecordedSamples):
    who = "changed "


class UnseededImages(TorchAugmented):
    """A mistake: each rank has other data."""

    def __init__(self, length, size, seed=0):
        super().__init__(length, size, seed + dist.get_rank())


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


# What the scripts must survive, or warn of.


class SparseOrComplex(nn.Module):
    """With old PyTorch an embedding with sparse gradients, or else a complex parameter.

    Old versions cannot send complex numbers with gloo. Newer ones can corrupt memory
    when DDP averages sparse gradients (see README.md here).
    """

    is_sparse = torch.__version__ < "2.7"
    kind = torch.complex64 if torch.__version__ >= "2.13" else torch.float32

    def __init__(self, input_size):
        super().__init__()
        self.embed = nn.Embedding(50, 16, sparse=self.is_sparse)
        self.rotate = nn.Parameter(torch.randn(8, dtype=self.kind))
        self.output = nn.Linear(16, 2)

    def forward(self, tokens, mask):
        states = torch.view_as_complex(self.embed(tokens).unflatten(-1, (8, 2)))
        states = torch.view_as_real(states * self.rotate).flatten(-2)
        return self.output(states)


def sgd(model, args):
    return torch.optim.SGD(model.parameters(), args.learning_rate)


class ConvBiasNorm(CNN):
    """The bias before each BatchNorm has a gradient of 0, but for rounding."""

    def __init__(self, input_size):
        super().__init__(
            input_size, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )


class TinyLayer(CNN):
    """A layer of one number, whose gradient is a hundred thousand times smaller."""

    def __init__(self, input_size):
        super().__init__(input_size)
        self.tiny = nn.Parameter(torch.ones(1))

    def forward(self, images):
        outputs = 1e-4 * self.tiny * images.mean(dim=(1, 2, 3)).view(-1, 1)
        return super().forward(images) + outputs * torch.tensor([1.0, 0.0])


def wrap_without_tiny(model):
    """A mistake: one parameter is not synchronised."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [".tiny"]
    )
    return DistributedDataParallel(model)


class NaNAfter(DistributedDataParallel):
    """A mistake: the loss is not finite, with DDP alone."""

    def forward(self, *inputs):
        return super().forward(*inputs) * float("nan")


def wrap_nan(model):
    return NaNAfter(model)


def wrap_nan_in_first(model):
    """A mistake: with DDP alone, the gradient of the first parameter is not finite."""
    next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    return DistributedDataParallel(model)


class Experts(nn.Module):
    """Each batch goes to one of two experts: the other one gets no gradient."""

    def __init__(self, input_size):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(64, 2), nn.Linear(64, 2)])

    def forward(self, images):
        flat = images.flatten(1)
        return self.experts[int(flat.sum() > flat.numel() / 2)](flat)


def wrap_unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


class TurnedBuffer(CNN):
    """A buffer that is not contiguous, and differs between ranks after the first step."""

    def __init__(self, input_size):
        super().__init__(input_size)
        self.register_buffer("turned", torch.zeros(2, 3).t())

    def forward(self, images):
        if self.training:
            with torch.no_grad():
                self.turned += images.mean()
        return super().forward(images)


@dataclasses.dataclass
class Pair:
    __slots__ = ("image", "label")
    image: torch.Tensor
    label: torch.Tensor


def collate_pair(samples):
    return {"pair": Pair(*default_collate(samples)), "language": "en"}


def pair_loss(model, batch):
    assert batch["language"] == "en", batch
    pair = batch.pop("pair")
    outputs = model(pair.image)
    loss = functional.cross_entropy(outputs, pair.label)
    return loss, {"accuracy": (outputs.argmax(dim=1) == pair.label).sum()}


def pair_count(batch):
    return len(batch["pair"].label)


class OpenedLate(Images):
    """Opens its file at the first read: the process that then forks must not read."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # A lambda is not pickled, as it would have to be for other start methods.
        forks = torch.multiprocessing.get_start_method() == "fork"
        self.opened_by, self.double = None, (lambda x: 2 * x) if forks else abs

    def __getitem__(self, index):
        self.opened_by = self.opened_by or os.getpid()
        assert self.opened_by == os.getpid(), "opened by another process"
        assert torch.utils.data.get_worker_info(), "read outside a worker"
        image, label = super().__getitem__(index)
        return self.double(image), label


class AugmentedBatches(Samples):
    """Whole batches are augmented."""

    def __getitems__(self, indices):
        inputs = self.inputs[torch.tensor(indices)]
        return inputs + 0.1 * torch.randn_like(inputs), self.labels[
            torch.tensor(indices)
        ]


class ClassesFromSet(Images):
    """A mistake: class numbers in the order of a set, which differs between processes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        names = list({"cat", "dog", "bird", "fish", "cow", "horse", "ant", "bee"})
        self.numbers = [names.index(name) for name in sorted(names)]

    def __getitem__(self, index):
        image, _ = super().__getitem__(index)
        number = self.numbers[index % len(self.numbers)]
        # It changes the image, too. Otherwise, ranks would often agree by chance.
        return image + number, number % 2


class Unseeded(Samples):
    """A mistake: each process draws other data."""

    def __init__(self, length, size, seed=0):
        super().__init__(length, size, random.SystemRandom().randrange(2**40))


class Unequal(Samples):
    """A mistake: each rank has a dataset of another length."""

    def __init__(self, length, size, seed=0):
        super().__init__(length + 100 * dist.get_rank(), size, seed)


class PastTheWrapper(CNN):
    def encode(self, images):
        return super().forward(images)


def past_the_wrapper(model, batch):
    """A mistake: it calls a method of the model, so DDP never sees a forward pass."""
    images, labels = batch
    outputs = getattr(model, "module", model).encode(images)
    loss = functional.cross_entropy(outputs, labels)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def second_optimizer(model, batch):
    """A mistake: a part of the model has an optimizer that DDP knows nothing of."""
    images, labels = batch
    outputs = model(images)
    plain = getattr(model, "module", model)
    if model.training:
        with torch.no_grad():
            head = list(plain.modules())[-1].bias
            head -= 0.001 * torch.autograd.functional.jacobian(
                lambda bias: (outputs.detach() + bias).logsumexp(1).mean(), head
            )
    loss = functional.cross_entropy(outputs, labels)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def weighted_loss(model, batch):
    """With class weights: a batch has a fractional number of items."""
    inputs, labels = batch
    weights = torch.tensor([0.3, 1.7], device=inputs.device)
    outputs = model(inputs)
    loss = functional.cross_entropy(outputs, labels, weights)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def weight_count(batch):
    return torch.tensor([0.3, 1.7])[batch[1]].sum()


def one_cycle(optimizer, total_steps, args):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps)


def groups(model, args):
    """Two groups, told apart by the names of the plain model."""
    decay = [p for name, p in model.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("weight")]
    assert decay and not any(
        n.startswith("module.") for n, _ in model.named_parameters()
    )
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest}])


class PartlyLabelled(Dataset):
    """Pairs of 12 tokens and targets. A third of the texts has no target at all."""

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(50, (length, 12), generator=generator)
        hidden = torch.rand(length, 12, generator=generator) < 0.5
        hidden[::3] = True
        self.targets = self.tokens.roll(1, dims=1).masked_fill(hidden, -100)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index], self.targets[index]


class Tagger(nn.Sequential):
    def __init__(self, input_size):
        super().__init__(nn.Embedding(50, 8), nn.Linear(8, 50))


class NaNTagger(Tagger):
    def forward(self, tokens):
        return super().forward(tokens) * float("nan")


def target_loss(model, batch):
    tokens, targets = batch
    outputs = model(tokens).flatten(0, 1)
    loss = functional.cross_entropy(outputs, targets.flatten())  # NaN without targets
    correct = (outputs.argmax(dim=1) == targets.flatten()).sum()
    return loss, {"accuracy": correct}


def target_count(batch):
    return (batch[1] != -100).sum()


def reads_a_value(model, batch):
    """A mistake: it waits for the GPU."""
    inputs, labels = batch
    loss = functional.cross_entropy(model(inputs), labels)
    return loss, {"read": loss.item()}


def makes_a_tensor(model, batch):
    """A mistake: it waits for the GPU, too."""
    inputs, labels = batch
    loss = functional.cross_entropy(model(inputs), labels)
    return loss * loss.new_tensor(len(labels)), {}


PARTLY = {"MyDataset": "PartlyLabelled", "MyModel": "Tagger"}
PARTLY.update(compute_loss="target_loss", count_items="target_count")
PARTLY["COUNTS_DIFFER"] = "YES"
PAIR_JOB = {"collate": "collate_pair", "compute_loss": "pair_loss"}
PAIR_JOB["count_items"] = "pair_count"


def two_metrics(model, batch):
    images, labels = batch
    outputs = model(images)
    loss = functional.cross_entropy(outputs, labels)
    correct = (outputs.argmax(dim=1) == labels).sum()
    return loss, {"accuracy": correct, "ones": 1.0 * len(labels)}


def no_metrics(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1]), {}


def no_validation(args):
    return Images(args.dataset_length, args.input_size), None


def downloads(args):
    """Make a file on local rank 0, in two parts. The other ranks have to find both."""
    path = Path(f"downloaded for {args.epochs} epochs")
    if os.environ["LOCAL_RANK"] == "0":
        path.write_text("a half")
        time.sleep(1)
        path.write_text("all of it")
    assert path.read_text() == "all of it", path.read_text()
    return Images(args.dataset_length, args.input_size), None


class ConstantModel(CNN):
    """One model for the whole process, made when this module is imported."""

    def __new__(cls, *args):
        if "model" not in vars(cls):
            cls.model = CNN(0)
        return cls.model


def cosine(optimizer, total_steps, args):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def decaying(model, args):
    """Another weight decay than that of `groups`."""
    optimizer = groups(model, args)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    return optimizer


def killed(*_):
    """In place of a function: the process ends there."""
    sys.exit()
