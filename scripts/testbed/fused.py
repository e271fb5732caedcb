"""Fused kernels inside a network that others made: `fusion` computes its attention, and `moe_pipeline`'s experts.

R: rows sorted by expert, M: model width
"""

from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

import moe_pipeline
from fusion.experts import feed_forward
from fusion.graph.activation import activation_of
from fusion.hugging_face import NAME
from fusion.plan.stages import Activation
from fusion.run.executors import DEFAULT, executors


class FusedExperts(moe_pipeline.FeedForwardExperts):
    """The experts of a layer as chains: the same parameters under the same names.

    Args:
        experts: Whose parameters and settings.
        activation: Name of its activation.
        executor: Name of what runs the chains.
    """

    def __init__(
        self, experts: moe_pipeline.FeedForwardExperts, activation: Activation, executor: str = DEFAULT
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.gated, self.name = experts.num_experts, experts.gated, activation
        self.executor = executor
        self.up, self.activation, self.dropout, self.down = (
            experts.up, experts.activation, experts.dropout, experts.down,
        )  # fmt: skip

    def forward(self, rows_RM: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Compute every row by the expert that owns it; where there is dropout or no kernel, as the layer did.

        Args:
            rows_RM: Rows sorted by expert.
            counts: Rows per expert, summing to R.

        Returns:
            rows_RM of results.
        """
        as_before = partial(super().forward, rows_RM, counts)
        if self.training and self.dropout.p > 0:
            return as_before()
        up, down = self.up, self.down
        return feed_forward(
            rows_RM,
            counts,
            up.weight,
            up.bias,
            down.weight,
            down.bias,
            activation=self.name,
            gated=self.gated,
            executor=self.executor,
            otherwise=as_before,
        )


def fuse(network: PreTrainedModel, *, patience_flops: float = 0.0) -> list[str]:
    """Let chains compute a network's attention and its experts, in place; parameters and their names stay.

    Args:
        network: Of Hugging Face's library, dense or upcycled.
        patience_flops: What torch computes of an interval of sizes before a kernel is looked for.

    Returns:
        Names of the layers whose experts are chains now.
    """
    executors.be_patient(DEFAULT, patience_flops)
    network.set_attn_implementation(NAME)
    names = []
    for name, layer in network.named_modules():
        if isinstance(layer, moe_pipeline.MoELayer) and type(layer.experts) is moe_pipeline.FeedForwardExperts:
            activation = activation_of(layer.experts.activation)
            if activation is not None:
                layer.experts = FusedExperts(layer.experts, activation).train(layer.training)
                names.append(name)
    return names
