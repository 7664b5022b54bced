"""Graph classification: graphs of unequal size, and a GIN (PyTorch Geometric).

    python ddp.py --definitions tests/examples/graphs.py
    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py \
        --definitions tests/examples/graphs.py

Needs torch_geometric. The graphs are made here.
"""

import warnings

import torch
from torch import nn

with warnings.catch_warnings():  # this import uses what PyTorch deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import MLP, GINConv, global_mean_pool

collate = Batch.from_data_list


def make_datasets(args):
    training_set = make_graphs(args.dataset_length, 2 * args.seed + 1)
    return training_set, make_graphs(args.dataset_length // 10 or 1, 2 * args.seed)


def make_graphs(length, seed):
    """Return random graphs. The label: has it more than two edges for each node?"""
    generator, graphs = torch.Generator().manual_seed(seed), []
    for nodes in torch.randint(5, 21, (length,), generator=generator).tolist():
        edges = int(torch.randint(nodes, 3 * nodes, (), generator=generator))
        ends = torch.randint(nodes, (2, edges), generator=generator)
        x, y = torch.ones(nodes, 1), int(edges > 2 * nodes)
        graphs.append(Data(x=x, edge_index=ends, y=y))
    return graphs


class GIN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = GINConv(MLP([1, 32, 32])), nn.Linear(32, 2)

    def forward(self, graphs):
        x = self.conv(graphs.x, graphs.edge_index).relu()
        return self.head(global_mean_pool(x, graphs.batch, graphs.num_graphs))


def make_model(args):
    return GIN()


def compute_loss(model, batch):
    outputs = model(batch)
    loss = nn.functional.cross_entropy(outputs, batch.y)
    return loss, {"accuracy": (outputs.argmax(dim=1) == batch.y).sum()}


def count_items(batch):
    return batch.num_graphs
