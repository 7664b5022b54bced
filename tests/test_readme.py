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
    """And after it, with a loss that is a mean over unequal numbers of tokens."""
    (diff,) = blocks("diff")
    texts = {}
    for name, other in (("before", "+"), ("after", "-")):
        lines = [line[1:] for line in diff.splitlines() if line[0] != other]
        if torch.__version__ < "2.13" and name == "after":  # or Gloo can hang at exit
            leave = "    import gc, time; gc.collect(); time.sleep(0.1)"
            lines[-1:] = [leave, lines[-1]]
            lines.insert(0, "import torch.distributed.nn")
        texts[name] = "\n".join(lines) + "\n"
    (old,) = re.findall(r"\n( +)loss.backward\(\).*", texts["after"])
    step = "count = torch.tensor(1.0 + rank)\n"
    step += textwrap.dedent(block("total = count.clone()"))
    step += "loss = nn.functional.cross_entropy(model(inputs), labels)\n"
    step += "gradient = count * torch.autograd.grad(loss, model.weight)[0]\n"
    step += "dist.all_reduce(gradient)\n"
    step += "assert torch.allclose(model.weight.grad, gradient / total, atol=1e-6)\n"
    step = textwrap.indent(step, old)
    texts["tokens"] = re.sub(r" +loss.backward\(\).*", step, texts["after"])
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


@pytest.fixture
def trained(finish, folder):
    """A folder where training, with weighted sampling, has saved its best weights.

    A definition in the script is replaced, too.
    """
    code = "import torch\nfrom models import Samples\nclass MyDataset(Samples):\n"
    code += "    def __init__(self, *args, **options):\n"
    code += "        super().__init__(*args, **options)\n"
    code += "        self.sums = self.labels.float().cumsum(0)\n"  # all weight on 1
    code += textwrap.indent(textwrap.dedent(block("def __getitem__(self, _)")), "    ")
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
    """Weighted sampling, the best weights, and a snapshot in FSDP2."""
    assert epoch_lines(trained.stdout)[-1][1] > 95, trained.stdout
    assert list(load(folder / "best.pt")) == ["weight", "bias"]
    if torch.__version__ < "2.6":
        return  # FSDP2 was not public yet
    code = "import torch\nimport torch.distributed as dist\n"
    code += "dist.init_process_group('gloo')\nmodel = torch.nn.Linear(100, 2)\n"
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
