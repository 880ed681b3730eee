"""What a GR00T N1.5 checkpoint knows of its robot, in whichever layout it says so."""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla.pack.manifest import CheckpointError
from omega_qvla.policies.groot_n15.architecture import ActionHeadSize
from omega_qvla.policies.groot_n15.normalization import Normalization


@dataclass(frozen=True)
class Robot:
    """Everything between an observation and the model, but for the prompt."""

    cameras: tuple[str, ...]
    """In the order in which the model sees them."""
    embodiment: int
    """Which of the model's encoders and decoders are its own."""
    crop: float | None
    """The share of height and width that is left around the centre before images are resized as in NVIDIA's
    pipelines; None: they are resized whole, as lerobot does it."""
    state: dict[str, Normalization]
    """Of neighbouring channels by their name, which are all of the state in their order."""
    actions: dict[str, Normalization]
    execute_steps: int
    """How many actions of a chunk are executed."""

    @property
    def state_width(self) -> int:
        """In physical units."""
        return sum(part.width for part in self.state.values())

    @property
    def action_width(self) -> int:
        return sum(part.width for part in self.actions.values())

    def check(self, size: ActionHeadSize, where: str) -> None:
        """Raises `CheckpointError` that names `where` if the model is too small for this robot."""
        state_width = sum(part.normalized_width for part in self.state.values())
        for what, needed, limit in (
            ("the embodiment's number", self.embodiment, size.max_num_embodiments - 1),
            ("the normalized state's width", state_width, size.max_state_dim),
            ("the action's width", self.action_width, size.action_dim),
            ("the number of executed steps", self.execute_steps, size.action_horizon),
        ):
            if not 0 <= needed <= limit:
                raise CheckpointError(f"{where}: {what} is {needed}, but the model has room for {limit}; correct it")
