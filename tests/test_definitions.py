"""--definitions: what a file defines takes the place of the scripts' own."""

import json

import pytest
from conftest import ROOT, SCRIPTS, both_ways, epoch_lines

SHORT = "--epochs 2 --dataset_length 400"
both = pytest.mark.parametrize("name", SCRIPTS)
NEIGHBOUR = """
import os
import torch
from torch import nn
from shapes import HIDDEN

assert os.environ["RANK"] in "01" and os.environ["WORLD_SIZE"] == "2"

class MyModel(nn.Sequential):
    def __init__(self, input_size):
        super().__init__(nn.Linear(input_size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))

class MyDataset(torch.utils.data.Dataset):
    def __init__(self, length, size, seed=0):
        self.length, self.size = length, size
    def __len__(self):
        return self.length
    def __getitem__(self, index):
        label = index % 2
        return torch.randn(self.size) + label, label
"""


@pytest.mark.parametrize(
    "name, method",
    [
        ("ddp", "forkserver"),
        pytest.param("torchrun", "spawn", marks=pytest.mark.slow),
    ],
)
def test_a_file_in_another_folder(finish, folder, name, method):
    """It imports its neighbour; DataLoader's workers find it, however they start."""
    place = folder / "elsewhere"
    place.mkdir()
    (place / "shapes.py").write_text("HIDDEN = 7\n")
    start = f"torch.multiprocessing.set_start_method('{method}', force=True)\n"
    (place / "my-own.py").write_text(NEIGHBOUR + start)
    flags = f"--definitions elsewhere/my-own.py {SHORT} --num_workers 1"
    run = finish(SCRIPTS[name], flags)
    assert run.stdout.count("From elsewhere/my-own.py: MyDataset, MyModel\n") == 1
    lines = both_ways if name == "ddp" else epoch_lines
    assert len(lines(run.stdout)) == 2
    assert name == "torchrun" or "DDP is right" in run.stdout


@both
def test_a_file_that_defines_nothing(finish, folder, name):
    place = folder / "elsewhere"
    place.mkdir()
    (place / "none.py").write_text("MyModle = None")
    flags = "--definitions elsewhere/none.py"
    run = finish(SCRIPTS[name], flags, code=2 if name == "ddp" else 1)
    assert run.stdout.count("From elsewhere/none.py: none of MyDataset, MyM") == 1
    # torchrun adds a traceback of its own.
    assert run.stderr.count("Traceback") == (name == "torchrun")
    assert name == "ddp" or "exitcode  : 2 " in run.stderr
    assert not epoch_lines(run.stdout) and not both_ways(run.stdout)


@both
def test_an_edited_copy_of_torchrun_ddp(finish, folder, name):
    """ddp.py then checks the very script that trains."""
    source = (ROOT / "torchrun_ddp.py").read_text()
    layer = "self.linear = nn.Linear(input_size, 2)"
    assert source.count(layer) == 1
    wider = "self.linear = nn.Sequential(nn.Linear(input_size, 5), nn.Linear(5, 2))"
    (folder / "mine.py").write_text(source.replace(layer, wider))
    flags = f"--definitions mine.py {SHORT}"
    run = finish(SCRIPTS[name], f"{flags} --json a.json" if name == "ddp" else flags)
    assert "From mine.py: MyDataset, MyModel, make_datasets, make_model," in run.stdout
    assert run.stderr == ""
    if name == "ddp":
        assert "DDP is right" in run.stdout
        figures = json.loads((folder / "a.json").read_text())
        assert figures["gradient_bytes"] == 4 * (101 * 5 + 6 * 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@both
def test_compiled(finish, define, name):
    code = "import torch\nfrom torch.nn.parallel import DistributedDataParallel\n"
    code += "def wrap_in_ddp(model):\n    return torch.compile(DistributedDataParallel(model))\n"
    flags = define({"MyModel": "ConvBiasNorm", "MyDataset": "Images"}, code)
    run = finish(SCRIPTS[name], f"{flags} {SHORT}", timeout=280)
    assert len(epoch_lines(run.stdout) or both_ways(run.stdout)) == 2
    assert name == "torchrun" or "DDP is right" in run.stdout
