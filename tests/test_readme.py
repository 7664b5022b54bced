"""What the README says to write: its code runs."""

import re
import shutil
import sys
import textwrap

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    STANDALONE,
    both_ways,
    epoch_lines,
    load,
    validation_lines,
)

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(start):
    """Return the code block with this text in it."""
    (found,) = [text for text in blocks("python") if start in text]
    return textwrap.dedent(found)


def loop(before=False):
    """Return the loop before, or after, the diff."""
    (diff,) = blocks("diff")
    other = "+" if before else "-"
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] != other)


def replaced(text, changes):
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_loop_before_and_after_the_diff(start, folder):
    runs = {}
    for name in ("before", "after"):
        (folder / name).mkdir()
        move = f"import os\nos.chdir({name!r})\n"
        (folder / f"{name}.py").write_text(move + loop(name == "before"))
        launcher = [sys.executable] if name == "before" else STANDALONE
        runs[name] = start([*launcher, f"{name}.py"])
    ends = {}
    for name, run in runs.items():
        assert run.wait() == 0, run.stderr
        lines = run.stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["0", "1", "2"]
        # A share of 101 samples, each of them counted once.
        shares = [float(line.split()[1]) for line in lines]
        assert all(abs(101 * share - round(101 * share)) < 1e-3 for share in shares)
        ends[name] = load(folder / name / "model.pt")
        assert ends[name].keys() == ends["before"].keys()
    marks = [re.search(r"# (\d)", line) for line in loop().splitlines()]
    assert {mark.group(1) for mark in marks if mark} == set("123456789")


MODEL = "model = nn.Linear(20, 2)"
NORM = "nn.BatchNorm1d(20), nn.Dropout(0.3), nn.Linear(20, 2)"
CALL = "        return nn.functional.cross_entropy(ddp(batch[0].to(device))"
WRAP = "nn.parallel.DistributedDataParallel(model)"
SAMPLER = ", sampler=sampler)  # 64 in total"
ADAM = "optimizer = torch.optim.Adam(model.parameters())"
SCALED = "optimizer = torch.optim.Adam([*model.parameters(), scale])"
CHANGES = {  # of the loop, and of the check, with what it says then
    "right": ("right", {}, {}),
    "BatchNorm and dropout": (
        "right",
        {MODEL: f"model = nn.Sequential({NORM})"},
        {},
    ),
    "no DDP": ("WRONG", {WRAP: "model"}, {}),
    "no sampler": ("WRONG", {SAMPLER: ")"}, {}),
    "neither": ("WRONG", {WRAP: "model", SAMPLER: ")"}, {}),
    "no_sync": ("WRONG", {}, {CALL: f"        with ddp.no_sync():\n    {CALL}"}),
    "a parameter": (
        "WRONG",
        {ADAM: f"scale = nn.Parameter(torch.ones(()))\n    {SCALED}"},
        {"return nn": "return scale * nn"},
    ),
    "a method": ("WRONG", {}, {CALL: CALL.replace("ddp(", "ddp.module.forward(")}),
}


IN_TURN = """
import os, runpy, socket, sys, time, torch
torch.optim.Adam([torch.zeros(1)])  # imports what takes another second
os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # or the next finds old addresses
def free_port(file):
    # Rank 0 chooses it just before it is used: somebody might take it.
    if os.environ["RANK"] == "0":
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        with open(file + ".tmp", "w") as output:
            output.write(port)
        os.replace(file + ".tmp", file + ".port")
    while not os.path.exists(file + ".port"):
        time.sleep(0.01)
    return open(file + ".port").read()
for file in sys.argv[1:]:
    port = free_port(file)
    if os.fork() == 0:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with open(f"{file}.{os.environ['RANK']}", "w") as sys.stdout:
            runpy.run_path(file, run_name="__main__")
        os._exit(0)  # a test of its own looks at how the loop ends
    assert os.wait()[1] == 0
"""


def test_the_check_of_a_loop(finish, folder):
    """One start runs all loops, in turn, each in a fork of its own."""
    (folder / "in_turn.py").write_text(IN_TURN)
    files = {}
    for name, (_, in_loop, in_use) in CHANGES.items():
        code = replaced(loop(), {**in_loop, "range(3)": "range(1)"})
        use = textwrap.indent(block("check(ddp, optimizer, compute_loss, next"), "    ")
        use = replaced(use, in_use)
        first = "    for epoch in range(1):\n"
        code = replaced(code, {first: use + first})
        imports = "import contextlib\nimport copy\n"
        files[name] = f"{name.replace(' ', '_')}.py"
        (folder / files[name]).write_text(imports + block("def check(") + code)
    finish([*STANDALONE, "in_turn.py", *files.values()])
    for name, file in files.items():
        output = (folder / f"{file}.0").read_text()
        verdict, difference = output.splitlines()[0].split()
        assert verdict == CHANGES[name][0], (name, output)
        if verdict == "right":
            assert float(difference) < 1e-5
        elif name not in ("no sampler", "neither", "a parameter"):
            assert float(difference) > 0.01, name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_of_ones_own(finish, folder, name):
    (folder / "mine.py").write_text(block("random_split(dataset"))
    run = finish(SCRIPTS[name], "--definitions mine.py")
    assert "From mine.py: make_datasets, make_model\n" in run.stdout
    if name == "torchrun":
        assert validation_lines(run.stdout)[-1]["accuracy"] > 0.9, run.stdout
    else:
        assert "DDP is right" in run.stdout
        assert both_ways(run.stdout)[-1][1]["accuracy"] > 0.9, run.stdout


def test_hugging_face(finish, folder):
    """With a small model that is saved here, as nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    shutil.copy(str(ROOT / "tests/examples/texts.py"), str(folder))
    code = replaced(block("lr=2e-5"), {"google-bert/bert-base-uncased": "small"})
    (folder / "bert.py").write_text(code)
    code = "import texts\ntexts.tokenizer.save_pretrained('small')\n"
    code += "texts.make_model(None).save_pretrained('small')\n"
    (folder / "save.py").write_text(code)
    finish([sys.executable, "save.py"])
    flags = "--definitions bert.py --dataset_length 640 --batch_size 32 --epochs 1"
    flags += " --snapshot_path bert.pt"
    env = {"HF_HUB_OFFLINE": "1"}
    assert len(epoch_lines(finish(SCRIPTS["torchrun"], flags, env=env).stdout)) == 1
    save = re.search(r'python -c "(import bert, torch; .*)"', README).group(1)
    finish([sys.executable, "-c", save], env=env)
    model = transformers.AutoModelForSequenceClassification.from_pretrained
    weights = model(str(folder / "trained")).state_dict()
    for name, value in load(folder / "bert.pt")["model"].items():
        assert torch.equal(value, weights[name]), name


START = """
import contextlib
import gc
import time
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn

def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = torch.nn.Linear(100, 2)
"""
# The mean over the tokens of both ranks, which have different numbers of them.
TOKENS = """
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    inputs, count = torch.randn(1 + rank, 100), torch.tensor(1.0 + rank)
    loss = ddp(inputs).pow(2).mean()
CODE
    gradient = count * torch.autograd.grad(model(inputs).pow(2).mean(), model.weight)[0]
    dist.all_reduce(gradient)
    assert torch.allclose(model.weight.grad, gradient / 3, atol=1e-6)
"""
# Two steps, of four batches and of three; without DDP, these gradients are summed.
ACCUMULATION = """
    model = torch.nn.Linear(100, 2)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, device = torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu")
    torch.manual_seed(rank)
    loader = [(torch.randn(8, 100), torch.randint(2, (8,))) for _ in range(7)]
    weight, bias = (p.detach().clone() for p in model.parameters())
    for batches in (loader[:4], loader[4:]):
        pair = [weight.requires_grad_(), bias.requires_grad_()]
        losses = [nn.functional.cross_entropy(x @ pair[0].T + pair[1], y) for x, y in batches]
        gradients = torch.autograd.grad(sum(losses) / 4, pair)
        for gradient in gradients:
            dist.all_reduce(gradient)
        weight, bias = ((p - 0.1 * g / 2).detach() for p, g in zip(pair, gradients))
CODE
    assert torch.allclose(model.weight, weight, atol=1e-6)
    assert torch.allclose(model.bias, bias, atol=1e-6)
"""
FSDP = """
    model = torch.nn.Sequential(torch.nn.Linear(100, 2))
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
    sums = "self.sums = weights.cumsum(0)"
    draw = (
        "index = torch.searchsorted(self.sums, torch.rand(()) * self.sums[-1]).item()"
    )
    best = (
        'best = torch.load("best.pt", map_location="cpu")["loss"]'
        + ' if os.path.exists("best.pt") else math.inf',
        'if means["loss"] < best:',
        'best = means["loss"]',
        'torch.save({"loss": best, "model": self.model.state_dict()}, "best.pt")',
    )
    assert all(f"`{code}`" in README for code in (sums, draw, *best))
    code = f"""
import torch
from models import Samples


class MyDataset(Samples):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        weights = self.labels.float()  # all weight on 1
        {sums}

    def __getitem__(self, index):
        {draw}
        return self.inputs[index], self.labels[index]
"""
    (folder / "mine.py").write_text(code)
    script = folder / "torchrun_ddp.py"
    prints, indent = '                    print(f"  validation', 20 * " "
    lines = [f"{indent}{best[1]}", f"{indent}    {best[2]}", f"{indent}    {best[3]}"]
    epochs = "        while self.epochs_done < self.args.epochs:\n"
    layer = "nn.Sequential(nn.Linear(100, 2))"
    changes = {
        prints: "\n".join([*lines, prints]),
        epochs: f"        {best[0]}\n{epochs}",
        "    return MyModel(args.input_size)\n": f"    return {layer}\n",
    }
    script.write_text(replaced(script.read_text(), changes))
    flags = "--definitions mine.py --dataset_length 2000 --snapshot_path snapshot.pt"
    return finish(SCRIPTS["torchrun"], flags)


def test_recipes(trained, finish, folder):
    """Weighted sampling, the best weights; tokens, accumulation; FSDP2."""
    assert epoch_lines(trained.stdout)[-1]["accuracy"] > 0.95, trained.stdout
    best = load(folder / "best.pt")
    assert list(best["model"]) == ["0.weight", "0.bias"]
    losses = [epoch["loss"] for epoch in validation_lines(trained.stdout)]
    assert best["loss"] == pytest.approx(min(losses), abs=1e-4)
    code = START + with_block(TOKENS, "total = count.clone()")
    code += with_block(ACCUMULATION, "is_last")
    if torch.__version__ >= "2.6":  # before, FSDP2 was not public
        fsdp = with_block(FSDP, "fully_shard(block)")
        code += replaced(fsdp, {"model.layers": "model"})
    (folder / "recipes.py").write_text(code + END)
    run = finish([*STANDALONE, "recipes.py"])
    assert run.stdout.count("equal") == 2


def test_every_link_and_anchor_exists():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        text = (ROOT / path).read_text() if path else README
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = [re.sub(r"[^a-z0-9 -]", "", h.lower()) for h in headings]
        slugs = [slug.replace(" ", "-") for slug in slugs]
        assert not anchor or anchor in slugs or f'name="{anchor}"' in text, target


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_the_messages_point_to_is_there(name):
    source = (ROOT / SCRIPTS[name][-1]).read_text()
    titles = set(re.findall(r'"([A-Z][a-z]+(?: [a-z]+)*)" in the README', source))
    assert len(titles) >= 2
    for title in titles:
        assert re.search(rf"\*\*{title}\b|^#+ {title}\b", README, re.MULTILINE), title
