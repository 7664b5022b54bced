"""The README's edits, applied to real files: the loop to change, and "Make it yours"."""

import re
import sys

import pytest
from conftest import ROOT, SCRIPTS, STANDALONE, epoch_lines, load

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_loop_before_and_after_the_diff(finish, folder):
    (diff,) = blocks("diff")
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


def insert(path, before, text):
    source = path.read_text()
    assert source.count(before) == 1
    path.write_text(source.replace(before, text + before))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_edits_train_a_network_on_digits(finish, folder, name):
    classes, evaluate = blocks("python")
    script = folder / SCRIPTS[name][-1]
    source = script.read_text()
    for part in re.split(r"\n\n\n?(?=class)", classes.strip()):
        head = re.match(r"class \w+\(", part).group()
        old = re.search(rf"{re.escape(head[:-1])}\(.*?(?=\n\n\n)", source, re.DOTALL)
        source = source.replace(old.group(), part)
    script.write_text(source)
    if name == "torchrun":
        insert(script, "def train(args, device):\n", evaluate + "\n\n")
        (call,) = re.findall(r"`(evaluate\(.*?\))`", README)
        insert(script, '    if rank == 0:\n        print(f"DDP', f"    {call}\n")
    run = finish(SCRIPTS[name], "--epochs 10 --learning_rate 0.003")
    assert epoch_lines(run.stdout)[-1][1] > 97, run.stdout
    if name == "torchrun":
        score = re.search(
            r"^accuracy on the test set: (\S+)%$", run.stdout, re.MULTILINE
        )
        assert float(score.group(1)) >= 96, run.stdout
    else:
        text = " ".join(run.stdout.split())
        assert "DDP is right: without BatchNorm2d and Dropout" in text


def test_a_regression(finish, variant):
    code = """
class Answers(Samples):
    def __getitem__(self, index):
        return self.inputs[index], self.inputs[index, :3].sum(dim=0, keepdim=True)
class Regression(nn.Linear):
    def __init__(self, input_size):
        super().__init__(input_size, 1)
script.MyDataset, script.MyModel = Answers, Regression
script.nn.functional.cross_entropy = nn.functional.mse_loss
"""
    run = finish(variant("torchrun", code), "--input_size 5 --batch_size 256")
    losses = [loss for loss, _ in epoch_lines(run.stdout)]
    assert losses[-1] < losses[0] / 20, run.stdout
