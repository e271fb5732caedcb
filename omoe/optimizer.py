"""OMoE: any torch optimizer, whose finished step keeps every expert out of the other experts' subspace.

Shapes: E experts of this rank, N experts of all ranks, O output features, I input features, K = O * I.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from omoe.base_step import base_step_EOI, decay_share
from omoe.config import OMoEConfig
from omoe.control import along_own, random_like, seed_of, shortened
from omoe.cost import Cost, cost
from omoe.experts import ExpertLinear, equal_experts, expert_weights, select_linears
from omoe.input_space import others_trace, rank_error, refresh, removed
from omoe.inputs import MeanInput, MeanInputs, mean_rows
from omoe.leftover import left_in_changes, left_in_inputs
from omoe.schedule import Cycles, Schedule
from omoe.spread import ExpertGroup
from omoe.start import changes, rounding_E, start_EOI
from omoe.state import LinearState, initial_state, loaded_state
from omoe.subspace import WeightRows, project, removed_by_span


class OMoE(Optimizer):
    """Wraps an optimizer; in orthogonal steps, experts' steps lose what lies in the other experts' subspace.

    It shares the base's `param_groups` and `state`, so schedulers and trainers see one ordinary optimizer. All but the
    experts' linears steps as the base steps it, and so do those in the accumulating phase, bit for bit. Its own state
    is made at the first step and lies in `state_dict()` under "omoe".

    Args:
        base: Any torch optimizer that holds the experts' parameters.
        expert_linears: From `find_expert_linears`; those that `config.linears` names are projected.
        config: Every choice of the method.
        process_group: For space=input with data-parallel ranks: the ranks that hold copies of these experts; their
            mean inputs are averaged over it. Any other source, and space=update, needs none: equal weights and
            gradients give equal projections.
        expert_group: Where experts are spread: the ranks over which one copy of all experts lies, each with as many, in
            the order of the ranks. What the others' projectors need travels in every orthogonal step.
        schedule: The phases; None takes the config's cycles.
        measure_every: Steps, the last orthogonal one of which also measures what it leaves in the others' subspace; see
            `leftover`. 0 measures nothing, and costs nothing.

    Raises:
        TypeError: base is no torch optimizer.
        ValueError: An expert linear is alone, nameless among others, not held by base or without modules to observe
            (source=inputs of space=input); there is none; base has an unknown kind of weight decay; there are ranks but
            no group (the same).

    Source: OMoE (arXiv:2310.09762) for the phases and the base optimizer; our definition, section 4, for the rest.
    """

    def __init__(
        self,
        base: Optimizer,
        expert_linears: Sequence[ExpertLinear],
        config: OMoEConfig,
        *,
        process_group: dist.ProcessGroup | None = None,
        expert_group: dist.ProcessGroup | None = None,
        schedule: Schedule | None = None,
        measure_every: int = 0,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base: got {type(base).__name__}; give a torch.optim.Optimizer, such as torch.optim.AdamW")
        self.base = base
        self.config = config
        self.expert_linears = select_linears(expert_linears, config.linears)
        self.ranks = ExpertGroup(expert_group)
        self.schedule: Schedule = schedule or Cycles(config.period, config.first_orthogonal_step)
        _check_linears(self.expert_linears, base, config, num_ranks=self.ranks.size)
        if isinstance(measure_every, bool) or not isinstance(measure_every, int) or measure_every < 0:
            raise ValueError(f"measure_every={measure_every!r}: give a number of steps, or 0 to measure nothing")
        self.measure_every = measure_every
        self.num_steps = 0
        self.linear_state: dict[str, LinearState] = {}
        self._before: dict[str, Tensor] = {}
        super().__init__([dict(group) for group in base.param_groups], base.defaults)
        self._share_with_base()
        self.inputs: MeanInputs | None = None
        if config.space == "input" and config.source == "inputs":
            _check_process_group(process_group)
            self.inputs = MeanInputs(self.expert_linears, process_group=process_group, side=config.side)

    def cost(self) -> Cost:
        """Memory, arithmetic and traffic beside the base optimizer's, known before the first step.

        Source: our definition, section 9.
        """
        copies = all(equal_experts(linear) for linear in self.expert_linears)
        return cost(self.expert_linears, self.config, copies=copies)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the base optimizer, projected if the schedule says so.

        Args:
            closure: Handed to the base optimizer.

        Returns:
            What the base optimizer returns.

        Raises:
            RuntimeError: Inputs are the source, and an expert linear has gradients although no forward of it was
                observed.
            ValueError: There is a closure, and the gradient is needed before the base makes it.

        Source: our definition, section 4, pseudo-code.
        """
        if not self.linear_state:
            self.linear_state = {linear.name: initial_state(linear, self.config) for linear in self.expert_linears}
        gradients: dict[str, MeanInput] = {}
        if self.config.source == "gradients":
            _refuse(closure, "source='gradients'")
            gradients = self._mean_rows()
        before: dict[str, Tensor] = {}
        if self._orthogonal():
            before = {linear.name: self._copied(linear) for linear in self.expert_linears}
            if self.config.projects == "gradient":
                _refuse(closure, "projects='gradient'")
                self._project_gradients(before)
        loss = self.base.step() if closure is None else self.base.step(closure)
        if before:
            self._finish(before)
        if self.config.space == "input":
            self._refresh(gradients)
        self.num_steps += 1
        return loss

    @torch.no_grad()
    def _copied(self, linear: ExpertLinear) -> Tensor:
        """The weights now, in memory that is kept from step to step."""
        dtype = torch.promote_types(linear.parameters[0].dtype, torch.float32)
        copy_EOI = self._before.get(linear.name)
        if copy_EOI is None:
            copy_EOI = torch.empty(linear.shape_EOI, dtype=dtype, device=linear.parameters[0].device)
            self._before[linear.name] = copy_EOI
        torch._foreach_copy_(copy_EOI.unbind(0), expert_weights(linear))
        return copy_EOI

    @torch.no_grad()
    def _finish(self, before: dict[str, Tensor]) -> None:
        """Project what the base has just stepped, and measure what that leaves where it is time to."""
        shares = {id(p): decay_share(self.base, group) for group in self.param_groups for p in group["params"]}
        measured = self._measured()
        for linear in self.expert_linears:
            decay_shares = [shares[id(p)] for p in linear.parameters]
            before_EOI = before[linear.name]
            kept_before_EOI = before_EOI.clone() if measured else None
            if self.config.projects == "step":
                self._project(linear, before_EOI, decay_shares)
            if kept_before_EOI is not None:
                self._measure(linear, kept_before_EOI, decay_shares)

    def _measured(self) -> bool:
        """Whether this orthogonal step is the last in its `measure_every` steps."""
        if self.measure_every == 0:
            return False
        rest = range(self.num_steps + 1, (self.num_steps // self.measure_every + 1) * self.measure_every)
        return all(self.schedule.phase(step) == "accumulating" for step in rest)

    def _measure(self, linear: ExpertLinear, before_EOI: Tensor, decay_shares: Sequence[float]) -> None:
        state = self.linear_state[linear.name]
        if self.config.space == "input":
            kept_EOI = base_step_EOI(linear, before_EOI, decay_shares)
            left_E = left_in_inputs(kept_EOI, state, self.config, ranks=self.ranks)
        else:
            change_NK = self.ranks.gather(changes(before_EOI, state).flatten(1))
            kept_EK = base_step_EOI(linear, before_EOI, decay_shares).flatten(1)
            left_E = left_in_changes(kept_EK, change_NK, own=self.ranks.own(len(kept_EK)))
        state["leftover_E"] = left_E.float()

    @torch.no_grad()
    def _project(self, linear: ExpertLinear, before_EOI: Tensor, decay_shares: Sequence[float]) -> None:
        state = self.linear_state[linear.name]
        if self.config.space == "update" and self.config.control == "none" and self.ranks.group is None:
            state["removed_energy_E"] = project(_rows(linear, before_EOI, state, decay_shares)).float()
            return
        change_EOI = changes(before_EOI, state) if self.config.space == "update" else None
        step_EOI = base_step_EOI(linear, before_EOI, decay_shares)
        torch._foreach_sub_(expert_weights(linear), self._removed(linear, step_EOI, change_EOI).unbind(0))

    @torch.no_grad()
    def _project_gradients(self, before: dict[str, Tensor]) -> None:
        for linear in self.expert_linears:
            weight_EOI = before[linear.name]
            gradient_EOI = torch.zeros_like(weight_EOI)
            num_parts = len(linear.parameters)
            for part_EOI, parameter in zip(gradient_EOI.chunk(num_parts), linear.parameters, strict=True):
                if parameter.grad is not None:
                    part_EOI.copy_(parameter.grad.view_as(part_EOI))
            state = self.linear_state[linear.name]
            change_EOI = changes(weight_EOI, state) if self.config.space == "update" else None
            removed_EOI = self._removed(linear, gradient_EOI, change_EOI)
            for part_EOI, parameter in zip(removed_EOI.chunk(num_parts), linear.parameters, strict=True):
                if parameter.grad is not None:
                    parameter.grad.sub_(part_EOI.view_as(parameter.grad))

    def _removed(self, linear: ExpertLinear, step_EOI: Tensor, change_EOI: Tensor | None) -> Tensor:
        """What is taken out of a step, or of a gradient, whose share is noted."""
        state = self.linear_state[linear.name]
        if change_EOI is not None:
            removed_EOI = self._along_changes(linear, step_EOI.flatten(1), change_EOI.flatten(1)).view_as(step_EOI)
        else:
            removed_EOI = removed(step_EOI, state, self.config, ranks=self.ranks, seed=self._seed(linear))
        if self.config.control == "length":
            removed_EOI = shortened(step_EOI, removed_EOI)
        energy_E = _energy(step_EOI)
        state["removed_energy_E"] = torch.where(energy_E > 0, _energy(removed_EOI) / energy_E, 0).float()
        return removed_EOI

    def _along_changes(self, linear: ExpertLinear, step_EK: Tensor, change_EK: Tensor) -> Tensor:
        if self.config.control == "own":
            return along_own(step_EK, change_EK)
        change_NK = self.ranks.gather(change_EK)
        if self.config.control == "random":
            change_NK = random_like(change_NK, seed=self._seed(linear))
        return removed_by_span(step_EK, change_NK, own=self.ranks.own(len(step_EK)))

    def _seed(self, linear: ExpertLinear) -> int:
        return seed_of(self.num_steps, [other.name for other in self.expert_linears], linear.name)

    def _mean_rows(self) -> dict[str, MeanInput]:
        return {linear.name: mean_rows(linear, self.config) for linear in self.expert_linears}

    @torch.no_grad()
    def _refresh(self, gradients: dict[str, MeanInput]) -> None:
        inputs = self.inputs
        for linear in self.expert_linears:
            stepped = any(parameter.grad is not None for parameter in linear.parameters)
            if inputs is not None and stepped and not inputs.observed(linear):
                raise RuntimeError(
                    f"space='input': {linear.name!r} has gradients, but no forward of its modules in training mode was "
                    "observed. Call the experts' linears as modules, after model.train(); or use space='update'"
                )
        if self._orthogonal() and not self.config.refresh_in_orthogonal:
            if inputs is not None:
                inputs.discard()
            return
        taken = inputs.take() if inputs is not None else gradients or self._mean_rows()
        for name, mean in taken.items():
            refresh(self.linear_state[name], mean, self.config, ranks=self.ranks, num_steps=self.num_steps + 1)

    def _orthogonal(self) -> bool:
        return self.schedule.phase(self.num_steps) == "orthogonal"

    def removed_energy(self) -> dict[str, Tensor]:
        """Share of every expert's step that the latest orthogonal step took out, in squared norm.

        Returns:
            (E,) float32 by expert linear: zero before the first orthogonal step, and where the step was zero. Empty
            before the first step.

        Source: our definition, section 13: log the removed energy.
        """
        return {name: state["removed_energy_E"].clone() for name, state in self.linear_state.items()}

    def leftover(self) -> dict[str, Tensor]:
        """Share of every expert's finished step, in norm, that still lay in the others' subspace when last measured.

        It is what an averaged projector, a control or a projected gradient leaves; with space=update and no control it
        is zero but for rounding.

        Returns:
            (E,) float32 by expert linear: zero before the first measure. Empty before the first step, and where
            `measure_every` is 0.

        Source: our definition, section 4.2, hazard 1: log the leftover share; see leftover.py.
        """
        if self.measure_every == 0:
            return {}
        return {name: state["leftover_E"].clone() for name, state in self.linear_state.items()}

    def trace_share(self) -> dict[str, Tensor]:
        """trace(Q) / d of every expert's others' projector; 1 leaves every direction, 0 none.

        Returns:
            (E,) float64 by expert linear. Empty before the first step.

        Raises:
            ValueError: space=update has no such projector.

        Source: our definition, section 4.2.
        """
        if self.config.space != "input":
            raise ValueError(f"space={self.config.space!r} has no projector matrix: use removed_energy()")
        return {
            name: others_trace(state, self.config, ranks=self.ranks)[self.ranks.own(len(state["num_tokens_E"]))]
            for name, state in self.linear_state.items()
        }

    def rank_error(self) -> dict[str, Tensor]:
        """How far each expert's projector can be from the exact one, in operator norm, for what its rank dropped.

        Returns:
            (E,) float64 by expert linear. Empty before the first step, and for space=update.

        Source: our definition; see low_rank.error_bound.
        """
        states = self.linear_state.items() if self.config.space == "input" else ()
        return {name: rank_error(state, self.config) for name, state in states}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with OMoE's own state under "omoe"; tensors are not copied.

        Source: not in the paper.
        """
        linears = {name: dict(state) for name, state in self.linear_state.items()}
        return {**self.base.state_dict(), "omoe": {"num_steps": self.num_steps, "linears": linears}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly from what `state_dict` gave; OMoE's own tensors are copied to the parameters' devices.

        Raises:
            ValueError: Its "omoe" entry is missing, or is not of these expert linears and this config.

        Source: not in the paper.
        """
        num_steps, linear_state = loaded_state(state_dict.get("omoe"), self.expert_linears, self.config)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "omoe"})
        self._share_with_base()
        self.num_steps, self.linear_state = num_steps, linear_state

    def _share_with_base(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state


def _rows(linear: ExpertLinear, before_EOI: Tensor, state: LinearState, decay_shares: Sequence[float]) -> WeightRows:
    shape = (-1, before_EOI[0].numel())
    return WeightRows(
        start_EK=start_EOI(state).flatten(1),
        rounding_E=rounding_E(state),
        before_EK=before_EOI.flatten(1),
        after=[parameter.detach().view(shape) for parameter in linear.parameters],
        kept_shares=[
            None if parameter.grad is None else 1 - share
            for parameter, share in zip(linear.parameters, decay_shares, strict=True)
        ],
    )


def _energy(step_EOI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(step_EOI, dim=(1, 2)).double().square()


def _refuse(closure: Callable[[], float] | None, setting: str) -> None:
    if closure is not None:
        raise ValueError(f"closure: got one with {setting}, which needs the gradient first; give none")


def _check_linears(linears: Sequence[ExpertLinear], base: Optimizer, config: OMoEConfig, *, num_ranks: int) -> None:
    names = [linear.name for linear in linears]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expert_linears: got the names {names}; give at least one, each with a name of its own")
    groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
    observes = config.space == "input" and config.source == "inputs"
    for linear in linears:
        if linear.num_experts * num_ranks < 2:
            raise ValueError(
                f"expert_linears: {linear.name!r} has one expert, and no other to keep out of; leave it out"
            )
        if observes and linear.observed == "inside":
            raise ValueError(
                f"space='input': nobody can see the inputs of {linear.name!r}, which are made inside "
                f"{type(linear.modules[0]).__name__}; set linears='up', source='weights' or 'gradients', or "
                "space='update'"
            )
        if observes and config.side == "output" and linear.observed != "rows":
            raise ValueError(
                f"side='output': the outputs of {linear.name!r} stay inside {type(linear.modules[0]).__name__}; set "
                "side='input', source='weights' or 'gradients', or space='update'"
            )
        if observes and len(linear.modules) != len(linear.parameters):
            raise ValueError(
                f"expert_linears: {linear.name!r} has {len(linear.modules)} modules for {len(linear.parameters)} "
                "parameters; space='input' observes inputs there, so give one module per parameter"
            )
        for parameter in linear.parameters:
            if id(parameter) not in groups:
                raise ValueError(
                    f"base: {type(base).__name__} does not hold the parameters of expert linear {linear.name!r}; "
                    "add them to its param_groups, or leave this linear out of expert_linears"
                )
            decay_share(base, groups[id(parameter)])


def _check_process_group(process_group: dist.ProcessGroup | None) -> None:
    if process_group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"process_group=None with {dist.get_world_size()} ranks: space='input' averages mean inputs over the ranks "
            "that hold copies of these experts, or their projectors drift apart. Give that group: "
            "torch.distributed.group.WORLD for plain data parallelism, a group of this rank alone for none"
        )
