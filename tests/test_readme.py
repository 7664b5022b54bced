"""The README's edits, applied to real files: the loop to change, and "Make it yours"."""

import re
import sys

import pytest
from conftest import (
    ROOT,
    SCRIPTS,
    STANDALONE,
    epoch_lines,
    load,
    side_by_side,
    validation_lines,
)

README = (ROOT / "README.md").read_text()
NETWORK = (ROOT / "tests" / "README.md").read_text()


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def edit(path, *changes):
    """Replace texts that a script has exactly once."""
    source = path.read_text()
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path.write_text(source)


def test_the_loop_before_and_after_the_diff(finish, folder):
    diff, _ = blocks("diff")
    for name, other in (("before", "+"), ("after", "-")):
        lines = [line[1:] for line in diff.splitlines() if line[0] != other]
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    ends = []
    for command in ([sys.executable, "before.py"], [*STANDALONE, "after.py"]):
        run = finish(command)
        losses = [float(line.split()[1]) for line in run.stdout.splitlines()]
        assert len(losses) == 3 and losses[2] < losses[0], run.stdout
        ends.append(load(folder / "model.pt"))
    assert ends[0].keys() == ends[1].keys()
    marks = [re.search(r"# (\d)", line) for line in diff.splitlines()]
    assert {mark.group(1) for mark in marks if mark} == set("123456789")


def paste(path, code):
    """Replace a script's definitions by those in `code`."""
    source = path.read_text()
    for part in re.split(r"\n\n\n?(?=class|def)", code.strip()):
        head = re.match(r"(class|def) \w+", part).group()
        old = re.search(rf"{head}\(.*?(?=\n\n\n)", source, re.DOTALL)
        source = source.replace(old.group(), part)
    path.write_text(source)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_network_for_digits(finish, folder, name):
    (code,) = blocks("python", NETWORK)
    paste(folder / SCRIPTS[name][-1], code)
    run = finish(SCRIPTS[name], "--epochs 8 --learning_rate 0.003")
    if name == "torchrun":
        assert epoch_lines(run.stdout)[-1][1] > 97, run.stdout
        assert validation_lines(run.stdout)[-1][1] >= 96, run.stdout
    else:
        assert side_by_side(run.stdout)[-1][3] > 97, run.stdout
        assert "DDP is right" in run.stdout and "Samples of a batch" in run.stdout


TEXTS = """
import sys
sys.path.insert(0, ".")
import models
MyDataset, MyModel, collate = models.Texts, models.TextModel, models.pad
def compute_loss(model, batch):
    loss, count, right = models.token_loss(model, batch)
    return loss, count, right, (batch["tokens"][:, 1:] != 0).sum()
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mean_over_tokens(finish, folder, name):
    """With the diff, each token weighs alike: then nothing is mixed any more."""
    script = folder / SCRIPTS[name][-1]
    _, diff = blocks("diff")
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        old = "".join(line[1:] for line in hunk.splitlines(True) if line[0] != "+")
        new = "".join(line[1:] for line in hunk.splitlines(True) if line[0] != "-")
        edit(script, (old, new))
    changes = [('if __name__ == "__main__":', f'{TEXTS}\nif __name__ == "__main__":')]
    if name == "torchrun":
        line = "            loss, count, right = compute_loss"
        weighed = line.replace("count, right", "_, right, count")
        changes += [("\n" + line, "\n" + weighed)]
    edit(script, *changes)
    flags = "--dataset_length 301 --batch_size 7 --grad_accum_steps 3 --epochs 2"
    if name == "torchrun":
        losses = epoch_lines(finish(SCRIPTS[name], flags).stdout)
        assert losses[1][0] < losses[0][0]
    else:
        run = finish(SCRIPTS[name], flags + " --world_size 3")
        assert "DDP is right" in run.stdout and "Samples of a" not in run.stdout


def code_in_row(start):
    """Return the code in the second cell of a row of the README's table."""
    (cell,) = re.findall(rf"^\| {start} \| (.*) \|$", README, re.MULTILINE)
    return re.findall(r"`([^`]+)`", cell)


def test_a_scheduler_clipping_and_the_best_weights(finish, folder):
    """A run that is stopped after two epochs goes on as if it were not."""
    _, _, scheduler, _, step, _ = code_in_row("a scheduler")
    _, best, save = code_in_row("the best weights")
    _, unscaled, clip = code_in_row("gradient clipping")
    model = "    ddp_model = DistributedDataParallel(model"
    whole = "        sampler.skip = 0  # later epochs are whole\n"
    unscaled = f"            {unscaled}  # after this, gradients can be clipped\n"
    says = '            print(f"  validation'
    rate = '            print("rate", optimizer.param_groups[0]["lr"])\n'
    edit(
        folder / "torchrun_ddp.py",
        (model, f"    {scheduler}\n{model}"),
        (whole, f"{whole}        {step}\n"),
        (unscaled, f"{unscaled}            {clip}\n"),
        ("    seconds = 0\n", f"    seconds = 0\n    {best}\n"),
        (says, f"            {save}\n{rate}{says}"),
    )
    outputs = []
    for epochs, path in ((4, "whole.pt"), (2, "parts.pt"), (4, "parts.pt")):
        flags = f"--epochs {epochs} --snapshot_path {path}"
        outputs.append(finish(SCRIPTS["torchrun"], flags).stdout)
    rates = [re.findall(r"rate (\S+)", output) for output in outputs]
    assert rates[0] == rates[1] + rates[2] and len(set(rates[0])) == 4
    whole, parts = (load(folder / name)["model"] for name in ("whole.pt", "parts.pt"))
    assert all(weights.equal(parts[name]) for name, weights in whole.items())
    assert load(folder / "best.pt").keys() == whole.keys()


def test_an_iterable_dataset(finish, folder):
    """Two workers on each of two ranks."""
    code = """
class MyDataset(torch.utils.data.IterableDataset):
    skip = 0
    def __new__(cls, length, size, seed=0, train=True):
        if not train:
            return torch.utils.data.TensorDataset(*cls.two_classes(length, size))
        return super().__new__(cls)
    def __init__(self, length, size, seed=0, train=True):
        self.data = self.two_classes(length, size)
        self.part = range(dist.get_rank(), length, dist.get_world_size())
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __len__(self):
        return len(self.part)
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for index in self.part[info.id :: info.num_workers]:
            yield self.data[0][index], self.data[1][index]
    @staticmethod
    def two_classes(length, size):
        labels = torch.arange(length) // 2 % 2
        return torch.randn(length, size) + labels.view(-1, 1), labels
"""
    _, _, _, _, _, sampler, loader, _, length = code_in_row("an iterable dataset")
    script = folder / "torchrun_ddp.py"
    paste(script, code)
    edit(
        script,
        ("sampler = ResumableSampler(dataset, seed=args.seed)", sampler),
        (
            "    loader = make_loader(dataset, batch_sampler, args, device)",
            f"    {loader}",
        ),
        ("length = len(loader.batch_sampler.sampler)", length),
    )
    flags = "--num_workers 2 --dataset_length 4096 --epochs 3"
    lines = finish(SCRIPTS["torchrun"], flags).stdout
    assert epoch_lines(lines)[-1][1] > 90 and validation_lines(lines)[-1][1] > 90


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCRIPTS)
def test_compiled(finish, folder, name):
    script = folder / SCRIPTS[name][-1]
    wrap = "DistributedDataParallel(model, gradient_as_bucket_view=True)"
    edit(script, (wrap, f"torch.compile({wrap})"))
    run = finish(SCRIPTS[name], "--epochs 2 --dataset_length 2000", timeout=280)
    assert len(epoch_lines(run.stdout) or side_by_side(run.stdout)) == 2
    assert name == "torchrun" or "DDP is right" in run.stdout
