"""What policies are judged on: tasks, initial states, limits, and the simulator behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omega_qvla.evaluation.rollout import EnvironmentFactory
from omega_qvla.evaluation.seeds import Partition, check_within


@dataclass(frozen=True)
class Benchmark:
    """A set of tasks with named initial states; how its episodes are made and what ends them."""

    name: str
    tasks: Mapping[str, str]
    """Task name to its instruction."""
    factory: EnvironmentFactory
    max_steps: int
    """Actions of a policy after which an episode has failed."""
    partition: Partition
    """Which initial states are for what."""
    states_are_few: bool = False
    """Whether calibration takes one initial state for a whole round of tasks instead of a new one every time."""
    execute_steps: int | None = None
    """Actions of a chunk that are executed; None: as many as the policy says."""
    record_actions: int = 1
    """For calibration and action error an inference is recorded after so many actions at least: neighbours look
    alike, and images fill the memory."""
    calibration_observations: int | None = None
    """Observations of the calibration trajectories that are kept, evenly spaced; None: all."""
    gripper: int | None = -1
    """Index of the gripper in an action, or None for a robot without one."""
    gripper_threshold: float = 0.0
    """A gripper's command turns at this value."""
    conditions: Mapping[str, str | int] = field(default_factory=dict)
    """What else its figures have to name, by what it is called in reports."""

    def record_every(self, execute_steps: int) -> int:
        """One in so many inferences is recorded of a policy that executes `execute_steps` actions of a chunk."""
        return max(1, self.record_actions // execute_steps)

    def choose(self, tasks: Sequence[str] | None) -> list[str]:
        """These tasks, or all. Raises `ValueError` for one that it does not have."""
        if unknown := [task for task in tasks or () if task not in self.tasks]:
            raise ValueError(f"unknown task {unknown[0]!r}; {self.name} has {', '.join(self.tasks)}")
        return list(tasks or self.tasks)

    def evaluation_seeds(self, count: int, first: int | None = None) -> range:
        """`count` initial states of every task for success rates.

        Raises `ValueError` for one that is kept for another use.
        """
        start = self.partition.evaluation.start if first is None else first
        seeds = range(start, start + count)
        check_within(seeds, self.partition.evaluation, "evaluation")
        return seeds

    def held_out_seeds(self, count: int) -> range:
        """`count` initial states of every task for action error. Raises `ValueError` if there are not so many."""
        seeds = range(self.partition.held_out.start, self.partition.held_out.start + count)
        check_within(seeds, self.partition.held_out, "action-error")
        return seeds

    def calibration_episodes(self, count: int, tasks: Sequence[str] | None = None) -> list[tuple[str, int]]:
        """(task, seed) of `count` calibration trajectories: trajectory i is of task i, round robin over `tasks`.

        Raises `ValueError` if there are not so many initial states, or for an unknown task.
        """
        names = self.choose(tasks)
        first = self.partition.calibration.start
        seeds = [first + (i // len(names) if self.states_are_few else i) for i in range(count)]
        check_within(seeds, self.partition.calibration, "calibration")
        return [(names[i % len(names)], seed) for i, seed in enumerate(seeds)]
