"""What the README says to write: its code runs."""

import re
import sys
import textwrap

import pytest
import torch
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


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(start):
    """Return the code block with this text in it."""
    (found,) = [text for text in blocks("python") if start in text]
    return found


def test_the_loop_before_and_after_the_diff(start, folder):
    (diff,) = blocks("diff")
    for name, other in (("before", "+"), ("after", "-")):
        lines = [line[1:] for line in diff.splitlines() if line[0] != other]
        if torch.__version__ < "2.6" and name == "after":  # or Gloo can hang at exit
            lines[-1:] = ["import gc", "gc.collect()", lines[-1]]
            lines.insert(0, "import torch.distributed.nn")
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    ends = []
    for command in ([sys.executable, "before.py"], [*STANDALONE, "after.py"]):
        run = start(command)
        while run.wait() != 0:  # Gloo aborts at exit now and then, as the page says
            assert "terminate called without an active exception" in run.stderr
            run = start(command)
        lines = run.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["0", "1", "2"]
        # A share of 101 samples, each of them counted once.
        shares = [float(line.split()[1]) for line in lines]
        assert all(abs(101 * share - round(101 * share)) < 1e-3 for share in shares)
        ends.append(load(folder / "model.pt"))
    assert ends[0].keys() == ends[1].keys()
    marks = [re.search(r"# (\d)", line) for line in diff.splitlines()]
    assert {mark.group(1) for mark in marks if mark} == set("123456789")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_of_ones_own(finish, folder, name):
    (folder / "mine.py").write_text(block("def make_datasets"))
    run = finish(SCRIPTS[name], "--definitions mine.py --dataset_length 2000")
    assert "From mine.py: make_datasets, make_model\n" in run.stdout
    if name == "torchrun":
        assert validation_lines(run.stdout)[-1][1] > 80, run.stdout
    else:
        assert "DDP is right" in run.stdout
        assert side_by_side(run.stdout)[-1][3] > 80, run.stdout


def test_weighted_sampling(finish, folder):
    """All weight is on samples with label 1."""
    method = textwrap.dedent(block("def __getitem__(self, _)"))
    code = "import torch\nfrom models import Samples\nclass MyDataset(Samples):\n"
    code += "    def __init__(self, *args, **options):\n"
    code += "        super().__init__(*args, **options)\n"
    code += "        self.sums = self.labels.float().cumsum(0)\n"
    code += "".join(f"    {line}\n" for line in method.splitlines())
    (folder / "mine.py").write_text(code)
    run = finish(SCRIPTS["torchrun"], "--definitions mine.py --dataset_length 2000")
    assert epoch_lines(run.stdout)[-1][1] > 95, run.stdout


def test_the_best_weights(finish, folder):
    script = folder / "torchrun_ddp.py"
    source = script.read_text()
    for code in (
        "if loss < best:",
        "best = loss",
        'torch.save(model.state_dict(), "best',
    ):
        assert code in README
    says = '            print(f"  validation'
    save = "            if loss < best:\n                best = loss\n"
    save += '                torch.save(model.state_dict(), "best.pt")\n'
    for old, new in (
        (says, save + says),
        ("    seconds = 0\n", "    seconds, best = 0, 9\n"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    script.write_text(source)
    finish(SCRIPTS["torchrun"], "--epochs 2 --dataset_length 500")
    assert list(load(folder / "best.pt")) == ["linear.weight", "linear.bias"]


@pytest.mark.skipif(torch.__version__ < "2.6", reason="FSDP2 was not public yet")
def test_a_snapshot_in_fsdp2(finish, folder):
    flags = "--epochs 1 --dataset_length 500 --snapshot_path snapshot.pt"
    finish(SCRIPTS["torchrun"], flags)
    code = "import torch\nimport torch.distributed as dist\nimport torchrun_ddp\n"
    code += "dist.init_process_group('gloo')\nmodel = torchrun_ddp.MyModel(100)\n"
    code += block("fully_shard(model)")
    code += "whole = torch.load('snapshot.pt', weights_only=True)['model']\n"
    code += "for name, value in model.state_dict().items():\n"
    code += "    assert value.to_local().shape != value.shape or value.dim() == 0\n"
    code += "    assert torch.equal(value.full_tensor(), whole[name]), name\n"
    code += "print('equal')\nimport gc\ndel model, value\ngc.collect()\n"
    code += "dist.destroy_process_group()\n"
    (folder / "shard.py").write_text(code)
    run = finish([*STANDALONE, "shard.py"])
    assert run.stdout.count("equal") == 2


def test_every_link_and_anchor_exists():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        if not path:
            headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
            slugs = [
                re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
                for h in headings
            ]
            assert anchor in slugs or f'name="{anchor}"' in README, target


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_messages_point_to_is_there(name):
    source = (ROOT / SCRIPTS[name][-1]).read_text()
    titles = set(re.findall(r"README: ([A-Z][a-z]+(?: [a-z]+)*)", source))
    assert len(titles) >= 3
    for title in titles:
        assert re.search(rf"\*\*{title}\b|^#+ {title}\b", README, re.MULTILINE), title
