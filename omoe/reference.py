"""The meaning of OMoE: one expert linear, one matrix per expert, a loop for every sum.

It works in the dtype of its weights; float64 is the truth that tests measure against.

Shapes: O output features, I input features, R rows (tokens) of one expert.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omoe.config import OMoEConfig

BaseStep = Callable[[int, Tensor, int], Tensor]
"""(expert, its gradient, step from 0) -> what the base optimizer adds to the weight, decoupled decay apart."""


def owm(projector_II: Tensor, mean_I: Tensor, alpha: float) -> Tensor:
    """P - k k^T / (alpha + r.k) with k = P r.

    Source: OWM (arXiv:1810.01256).
    """
    k_I = projector_II @ mean_I
    return projector_II - torch.outer(k_I, k_I) / (alpha + mean_I @ k_I)


def outside_span(step_OI: Tensor, changes: Sequence[Tensor]) -> Tensor:
    """The step less its projection on the span of the changes, by their singular vectors; parallel changes count once.

    Source: our definition, update space (the paper's text gives none).
    """
    columns = [change.flatten() / change.norm() for change in changes if change.norm() > 0]
    if not columns:
        return step_OI
    left, singular, _ = torch.linalg.svd(torch.stack(columns, dim=1), full_matrices=False)
    basis = left[:, singular**2 > (len(changes) + 1) * torch.finfo(step_OI.dtype).eps]
    return step_OI - (basis @ (basis.T @ step_OI.flatten())).view_as(step_OI)


class ReferenceOMoE:
    """One expert linear under OMoE.

    Args:
        weights: One (O, I) matrix per expert; not modified.
        base_step: The base optimizer.
        decay: Share of a weight that decoupled decay takes per step, lr * weight_decay.
        config: Every choice of the method.

    Source: our definition, section 4, pseudo-code.
    """

    def __init__(self, weights: Sequence[Tensor], base_step: BaseStep, decay: float, config: OMoEConfig) -> None:
        self.weights = [weight.clone() for weight in weights]
        self.start = [weight.clone() for weight in weights]
        self.base_step = base_step
        self.decay = decay
        self.config = config
        identity = torch.eye(weights[0].shape[1 if config.side == "input" else 0], dtype=weights[0].dtype)
        self.projectors = [identity.clone() for _ in weights]
        self.union_projectors = [identity.clone() for _ in weights]
        self.num_tokens = [0 for _ in weights]
        self.t = 0

    def step(self, gradients: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """One step.

        Args:
            gradients: One (O, I) matrix per expert.
            rows: What every expert's linear saw, (R, I), or for side=output gave, (R, O); read for source=inputs of
                space=input only.

        Source: our definition, section 4, pseudo-code.
        """
        config, given = self.config, gradients
        orthogonal_step = self.t >= config.first_orthogonal_step and self.t % config.period == config.period - 1
        if orthogonal_step and config.projects == "gradient":
            gradients = [self._projected(expert, gradient) for expert, gradient in enumerate(gradients)]
        steps = [self.base_step(expert, gradient, self.t) for expert, gradient in enumerate(gradients)]
        if orthogonal_step and config.projects == "step":
            steps = [self._projected(expert, step) for expert, step in enumerate(steps)]
        for expert, step in enumerate(steps):
            self.weights[expert] = self.weights[expert] - self.decay * self.weights[expert] + step
        if config.space == "input" and (not orthogonal_step or config.refresh_in_orthogonal):
            self._refresh(given, rows)
        self.t += 1

    def others(self, expert: int) -> list[int]:
        """Every expert but this one.

        Source: our definition, section 4.
        """
        return [other for other in range(len(self.weights)) if other != expert]

    def others_projector(self, expert: int) -> Tensor:
        """Q of one expert.

        Source: our definition, section 4, item 2, and the alternatives of section 4.1.
        """
        if self.config.combine == "union":
            return self.union_projectors[expert]
        others = self.others(expert)
        if self.config.combine == "product":
            product = torch.eye(len(self.projectors[0]), dtype=self.projectors[0].dtype)
            for other in others:
                product = product @ self.projectors[other]
            return product
        tokens = [self.num_tokens[other] if self.config.combine == "load" else 1 for other in others]
        if sum(tokens) == 0:
            tokens = [1 for _ in others]
        total = torch.zeros_like(self.projectors[0])
        for other, count in zip(others, tokens, strict=True):
            total = total + self.projectors[other] * (count / sum(tokens))
        return total

    def _projected(self, expert: int, step_OI: Tensor) -> Tensor:
        if self.config.space == "input":
            projector = self.others_projector(expert)
            return step_OI @ projector if self.config.side == "input" else projector.T @ step_OI
        return outside_span(step_OI, [self.weights[other] - self.start[other] for other in self.others(expert)])

    def _seen(self, expert: int, gradients: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """Rows (R, I), or columns as rows (R, O) for side=output, whose mean refreshes the expert's projector.

        They are its linear's inputs or outputs, or those of its weight after the step, or of its gradient before the
        base optimizer and any projection; none without tokens, or where the gradient is zero. Not in the paper.
        """
        if self.config.source == "inputs":
            return rows[expert]
        matrix_OI = self.weights[expert] if self.config.source == "weights" else gradients[expert]
        seen = matrix_OI if self.config.side == "input" else matrix_OI.T
        return seen if self.config.source == "weights" or seen.any() else seen[:0]

    def _refresh(self, gradients: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        alpha = self.config.alpha_at(self.t)
        kept = self.config.forgetting
        if kept < 1:
            identity = torch.eye(len(self.projectors[0]), dtype=self.projectors[0].dtype)
            self.projectors = [kept * projector + (1 - kept) * identity for projector in self.projectors]
            self.union_projectors = [kept * projector + (1 - kept) * identity for projector in self.union_projectors]
        for expert in range(len(self.weights)):
            own_rows = self._seen(expert, gradients, rows)
            if own_rows.shape[0] == 0:
                continue
            mean = own_rows.sum(0) / own_rows.shape[0]
            self.projectors[expert] = owm(self.projectors[expert], mean, alpha)
            for other in self.others(expert):
                self.union_projectors[other] = owm(self.union_projectors[other], mean, alpha)
            self.num_tokens[expert] += own_rows.shape[0]
        if (self.t + 1) % 1000 == 0:
            self.projectors = [(projector + projector.T) / 2 for projector in self.projectors]
            self.union_projectors = [(projector + projector.T) / 2 for projector in self.union_projectors]
