"""The README's "Make it yours": its edits, applied to a copy, train on a real dataset."""

import re

import pytest
from conftest import DDP, ROOT, STANDALONE, edit, epoch_lines
from test_training import replace_body

README = (ROOT / "README.md").read_text()
SECTION = README[README.index("## Make it yours") : README.index("## Reading the")]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


GETITEMS = """
    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]
"""
REGRESSION = """
    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.answers = self.inputs[:, :3].sum(dim=1, keepdim=True)

    def __len__(self):
        return len(self.answers)

    def __getitem__(self, index):
        return self.inputs[index], self.answers[index]
"""
ITERABLE = """
    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = (self.inputs[:, 0] > 0).long()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def __len__(self):
        return len(self.labels) // self.world_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        count, number = (worker.num_workers, worker.id) if worker else (1, 0)
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self) * self.world_size, generator=generator)
        mine = order[self.rank :: self.world_size]
        for index in mine[number::count]:
            yield self.inputs[index], self.labels[index]
"""


def make_it_mine(script, evaluate):
    """Apply the README's edits to a copy of a script, as the text there says to."""
    model, dataset, function, call = BLOCKS
    for name, block in (("MyModel", model), ("MyDataset", dataset)):
        head, body = block.split("\n", 1)
        assert head.startswith(f"class {name}(")
        replace_body(script, name, body)
    if evaluate:
        before = "def train(args, device, snapshot):\n"
        edit(script, (before, function.strip() + "\n\n\n" + before))
        after = '        model, loader, optimizer, device, args, snapshot["epoch"], save\n    )\n'
        edit(script, (after, after + call))


@pytest.mark.parametrize("command", [DDP, STANDALONE], ids=["ddp", "torchrun"])
def test_the_edits_train_a_network_on_digits(finish, folder, command):
    make_it_mine(folder / command[-1], evaluate=command == STANDALONE)
    if command == STANDALONE:
        last = "        return self.images[index], self.labels[index]\n"
        edit(folder / command[-1], (last, last + GETITEMS))
    run = finish(command + ["--epochs", "10", "--learning_rate", "0.003"])
    assert float(epoch_lines(run.stdout)[-1][1]) > 97, run.stdout
    if command == STANDALONE:
        score = re.search(
            r"^accuracy on the test set: (\S+)%$", run.stdout, re.MULTILINE
        )
        assert float(score.group(1)) >= 97, run.stdout
    else:
        assert "as they have to with BatchNorm or dropout" in run.stdout


def test_a_regression(finish, folder):
    replace_body(folder / "torchrun_ddp.py", "MyDataset", REGRESSION)
    edit(
        folder / "torchrun_ddp.py",
        ("nn.Linear(input_size, 2)", "nn.Linear(input_size, 1)"),
        ("nn.CrossEntropyLoss()", "nn.MSELoss()"),
        ("            correct += (outputs.argmax(dim=1) == labels).sum()\n", ""),
        ("  accuracy {correct / seen:.1%}", ""),
    )
    run = finish(STANDALONE + ["--dataset_length", "10000", "--input_size", "5"])
    losses = re.findall(r"  loss (\S+)  [\d,]+ samples/s", run.stdout)
    assert len(losses) == 5 and float(losses[-1]) < 0.01, run.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_iterable_dataset(finish, folder, workers):
    script = folder / "torchrun_ddp.py"
    replace_body(script, "MyDataset", ITERABLE)
    edit(
        script,
        (
            "class MyDataset(Dataset)",
            "class MyDataset(torch.utils.data.IterableDataset)",
        ),
        ("loader.sampler.set_epoch(epoch)", "loader.dataset.set_epoch(epoch)"),
        ("len(loader.sampler)", "len(loader.dataset)"),
        ("        sampler=sampler,\n", ""),
    )
    text = script.read_text()
    text = re.sub(" +persistent_workers=.*\n", "", text, count=1)
    text = re.sub("    if num_workers > 0:\n        next.*\n", "", text, count=1)
    script.write_text(text)
    flags = ["--snapshot_path", "snapshot.pt", "--num_workers", workers]
    flags += ["--learning_rate", "0.05", "--epochs"]
    finish([*STANDALONE, *flags, "3"])
    run = finish([*STANDALONE, *flags, "6"])
    lines = epoch_lines(run.stdout)
    assert len(lines) == 3 and float(lines[-1][1]) > 90, run.stdout
