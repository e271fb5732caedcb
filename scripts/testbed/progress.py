"""What a person sees while a network trains, and what happens when they stop it."""

import logging
import signal
import sys
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """A progress bar with the loss and the speed on a terminal; log lines, and no bar, elsewhere."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: Any = None
        self._text = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar where there is a terminal to show it on."""
        if state.is_world_process_zero and sys.stderr.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, text="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, text=self._text)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the newest figures beside the bar, or into the log where there is no bar."""
        if not logs or not state.is_world_process_zero:
            return
        shown: dict[str, float] = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
        if logs.get("seconds"):
            shown["tokens/s"] = logs["num_tokens"] / logs["seconds"]
        if not shown:
            return
        self._text = "  ".join(f"{name} {value:,.4g}" for name, value in shown.items())
        if self._bar is None:
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, self._text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Interruption(TrainerCallback):
    """Turns Ctrl-C and a termination signal into a checkpoint and an orderly end; a second one ends at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether training was asked to stop before its last step."""
        return self._asked

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over."""
        for name in (signal.SIGINT, signal.SIGTERM):
            self._before[name] = signal.signal(name, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after the step that was under way."""
        if self._asked:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        logger.warning("stopping after this step and saving; continue with resume=auto")
        for name in self._before:
            signal.signal(name, signal.default_int_handler)
