"""The copier's path: another model and dataset in each script, and nothing else."""

import pytest
from conftest import DDP, STANDALONE, epoch_lines
from test_training import replace_body

MODEL = """
    def __init__(self, input_size):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(8 * 4 * 4, 2)

    def forward(self, images):
        return self.head(self.features(images))
"""
# The top or the bottom half of an image is brighter: something that can be learned.
DATASET = """
    def __init__(self, length, size, seed=0):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randn(1, 12, 12, generator=generator)
        label = index % 2
        image[:, 6 * label : 6 * label + 6] += 1
        return image, label
"""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("command", [DDP, STANDALONE], ids=["ddp", "torchrun"])
def test_another_model_and_dataset(finish, folder, command, workers):
    replace_body(folder / command[-1], "MyModel", MODEL)
    replace_body(folder / command[-1], "MyDataset", DATASET)
    run = finish(command + ["--batch_size", "32", "--num_workers", str(workers)])
    assert run.stderr == "" or "master_addr is" in run.stderr
    losses = [float(loss) for loss, _ in epoch_lines(run.stdout)]
    assert losses[4] < losses[0] / 2 and losses[-1] < losses[-5] / 2, run.stdout


def test_workers_under_every_start_method(finish, folder):
    """Fork, PyTorch's default on Linux up to Python 3.13, is what the others test."""
    command = STANDALONE + ["--epochs", "2"]
    alone = finish(command)
    for method in ("spawn", "forkserver"):
        start = (
            f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\n"
        )
        (folder / "sitecustomize.py").write_text(start)
        run = finish(command + ["--num_workers", "1"], env={"PYTHONPATH": str(folder)})
        assert epoch_lines(run.stdout) == epoch_lines(alone.stdout) != []
