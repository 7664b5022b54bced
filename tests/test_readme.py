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
    return textwrap.dedent(found)


def test_the_loop_before_and_after_the_diff(start, folder):
    (diff,) = blocks("diff")
    texts = {}
    for name, other in (("before", "+"), ("after", "-")):
        lines = [line[1:] for line in diff.splitlines() if line[0] != other]
        if torch.__version__ < "2.13" and name == "after":  # or Gloo can hang at exit
            leave = "    import gc, time; gc.collect(); time.sleep(0.1)"
            lines[-1:] = [leave, lines[-1]]
            lines.insert(0, "import torch.distributed.nn")
        texts[name] = "\n".join(lines) + "\n"
    runs, commands = {}, {}
    for name, text in texts.items():
        (folder / name).mkdir()
        move = f"import os\nos.chdir({name!r})\n"
        (folder / f"{name}.py").write_text(move + text)
        launcher = [sys.executable] if name == "before" else STANDALONE
        commands[name] = [*launcher, f"{name}.py"]
        runs[name] = start(commands[name])
    ends = {}
    for name, run in runs.items():
        while run.wait() != 0:  # Gloo aborts at exit now and then, as the page says
            assert "terminate called without an active exception" in run.stderr
            run = start(commands[name])
        lines = run.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["0", "1", "2"]
        # A share of 101 samples, each of them counted once.
        shares = [float(line.split()[1]) for line in lines]
        assert all(abs(101 * share - round(101 * share)) < 1e-3 for share in shares)
        ends[name] = load(folder / name / "model.pt")
        assert ends[name].keys() == ends["before"].keys()
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


START = """
import gc
import time
import torch
import torch.distributed as dist
import torch.distributed.nn

def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = torch.nn.Linear(100, 2)
"""
# The mean over the tokens of both ranks, of which each has another number.
TOKENS = """
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    inputs, count = torch.randn(1 + rank, 100), torch.tensor(1.0 + rank)
    loss = ddp(inputs).pow(2).mean()
CODE
    gradient = count * torch.autograd.grad(model(inputs).pow(2).mean(), model.weight)[0]
    dist.all_reduce(gradient)
    assert torch.allclose(model.weight.grad, gradient / 3, atol=1e-6)
"""
FSDP = """
    model = torch.nn.Linear(100, 2)
CODE
    whole = torch.load("snapshot.pt", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert value.to_local().shape != value.shape or value.dim() == 0
        assert torch.equal(value.full_tensor(), whole[name]), name
"""
END = """
    print("equal")

main()
gc.collect()
time.sleep(0.1)
dist.destroy_process_group()
"""


def with_block(code, start):
    return code.replace("CODE", textwrap.indent(block(start), "    "))


@pytest.fixture
def trained(finish, folder):
    """A folder where training, with weighted sampling, has saved its best weights.

    A definition in the script is replaced, too.
    """
    code = "import torch\nfrom models import Samples\nclass MyDataset(Samples):\n"
    code += "    def __init__(self, *args, **options):\n"
    code += "        super().__init__(*args, **options)\n"
    code += "        self.sums = self.labels.float().cumsum(0)\n"  # all weight on 1
    code += textwrap.indent(block("def __getitem__(self, _)"), "    ")
    (folder / "mine.py").write_text(code)
    script = folder / "torchrun_ddp.py"
    source = script.read_text()
    steps = (
        "if loss < best:",
        "best = loss",
        'torch.save(model.state_dict(), "best.pt")',
    )
    assert all(f"`{step}`" in README for step in steps)
    says, indent = '            print(f"  validation', " " * 12
    save = f"{indent}{steps[0]}\n{indent}    {steps[1]}\n{indent}    {steps[2]}\n"
    for old, new in (
        (says, save + says),
        ("    seconds = 0\n", "    seconds, best = 0, math.inf\n"),
        ("    return MyModel(args.input_size)\n", "    return nn.Linear(100, 2)\n"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    script.write_text(source)
    flags = "--definitions mine.py --dataset_length 2000 --snapshot_path snapshot.pt"
    return finish(SCRIPTS["torchrun"], flags)


def test_recipes(trained, finish, folder):
    """Weighted sampling, the best weights; tokens in one's own loop; FSDP2."""
    assert epoch_lines(trained.stdout)[-1][1] > 95, trained.stdout
    assert list(load(folder / "best.pt")) == ["weight", "bias"]
    code = START + with_block(TOKENS, "total = count.clone()")
    if torch.__version__ >= "2.6":  # before, FSDP2 was not public
        code += with_block(FSDP, "fully_shard(model)")
    (folder / "recipes.py").write_text(code + END)
    run = finish([*STANDALONE, "recipes.py"])
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
