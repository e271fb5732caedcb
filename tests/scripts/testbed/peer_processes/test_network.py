import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.testbed.benchmarks.cpu_truth import Truth
from scripts.testbed.peer_processes.network import Network, read
from scripts.testbed.peer_processes.workers import networks

BERT = Network(kind="bert", num_layers=2, width=16, num_heads=2, hidden=24, vocabulary=40, batch=2, length=12)
PEGASUS = dataclasses.replace(BERT, kind="pegasus", backward=True)


@pytest.mark.parametrize("network", [BERT, PEGASUS])
def test_flops_are_those_of_the_products(network: Network) -> None:
    function = networks.forward(networks.built(network, attention="eager"), network)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(torch.from_numpy(network.tokens()))
    assert network.flops == counter.get_total_flops() * (3 if network.backward else 1)


def test_every_process_reads_the_same() -> None:
    assert read(BERT.to_json()) == BERT
    assert (read(BERT.to_json()).tokens() == BERT.tokens()).all()


@pytest.mark.parametrize("network", [BERT, PEGASUS])
def test_ways_to_run_a_network_agree_with_the_truth(network: Network) -> None:
    truth = Truth(network)
    for attention in ("eager", "sdpa"):
        ready = networks.way(network, attention)()
        truth.check(attention, torch.cat([torch.from_numpy(each).flatten() for each in ready.outputs()]).numpy())
