"""--definitions: what a file defines takes the place of the scripts' own."""

import pytest
from conftest import SCRIPTS, epoch_lines, side_by_side

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
    def __init__(self, length, size, seed=0, train=True):
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
    lines = side_by_side if name == "ddp" else epoch_lines
    assert len(lines(run.stdout)) == 2
    assert name == "torchrun" or "DDP is right" in run.stdout


@both
def test_a_file_that_defines_nothing(finish, folder, name):
    place = folder / "elsewhere"
    place.mkdir()
    (place / "none.py").write_text("MyModle = None")
    flags = "--definitions elsewhere/none.py"
    run = finish(SCRIPTS[name], flags, code=2 if name == "ddp" else 1)
    assert run.stderr.count("none.py defines none of MyDataset, MyModel, make_") == 1
    # torchrun adds a traceback of its own.
    assert run.stderr.count("Traceback") == (name == "torchrun")
    assert name == "ddp" or "exitcode  : 2 " in run.stderr
    assert not epoch_lines(run.stdout) and not side_by_side(run.stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)
@both
def test_compiled(finish, define, name):
    code = "import torch\nfrom torch.nn.parallel import DistributedDataParallel\n"
    code += (
        "def wrap(model):\n    return torch.compile(DistributedDataParallel(model))\n"
    )
    flags = define({"MyModel": "ConvBiasNorm", "MyDataset": "Images"}, code)
    run = finish(SCRIPTS[name], f"{flags} {SHORT}", timeout=280)
    assert len(epoch_lines(run.stdout) or side_by_side(run.stdout)) == 2
    assert name == "torchrun" or "DDP is right" in run.stdout
