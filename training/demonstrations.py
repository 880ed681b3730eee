"""Demonstrations of Meta-World's scripted experts on MT10, disturbed on purpose.

A clone that only ever saw the expert's path drifts off it and cannot return. So most episodes are broken by
kicks, a few steps of random motion, after which the expert shows the way back. Frames are kept only where
the coming chunk is undisturbed: the label is exactly what the expert does from there.

    python training/demonstrations.py --out runs/demonstrations --seconds 1200 --workers 2

Initial states use seeds of one million and more; calibration and evaluation use smaller ones.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import numpy as np

from omega_qvla.evaluation.metaworld.task import CAMERAS, TASKS, MetaWorldTask

CHUNK = 8
FRAME_STRIDE = 3
EXPERT_STEPS = 260
FIRST_SEED = 1_000_000
# Episodes per round: the tasks in which centimetres decide get more scenes.
EPISODES_PER_ROUND = {"reach-v3": 2, "push-v3": 4, "pick-place-v3": 4, "peg-insert-side-v3": 4}


def disturbances(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which steps are kicked, bool [steps], and the kick's motion, float [steps, 3]."""
    steps = EXPERT_STEPS + CHUNK
    kicked, motion = np.zeros(steps, bool), np.zeros((steps, 3), np.float32)
    if rng.random() < 0.25:
        return kicked, motion
    start = int(rng.integers(0, 30))
    while start < steps:
        length = int(rng.integers(3, 14))
        kicked[start : start + length] = True
        motion[start : start + length] = rng.uniform(-1, 1, 3)
        start += length + int(rng.integers(CHUNK + 4, 50))
    return kicked, motion


def record(task: MetaWorldTask, seed: int, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
    """One episode's frames, or None if the expert did not solve it in time."""
    task.reset(seed)
    expert = task.expert()
    kicked, motion = disturbances(rng)
    phase = int(rng.integers(FRAME_STRIDE))
    frames: dict[int, np.ndarray] = {}
    states, actions = [], []
    solved_at: int | None = None
    for step in range(EXPERT_STEPS + CHUNK):
        if solved_at is not None and step >= solved_at + CHUNK:
            break
        undisturbed = not kicked[step : step + CHUNK].any()
        if solved_at is None and undisturbed and step % FRAME_STRIDE == phase:
            frames[step] = np.stack(list(task.images().values()))
        action = np.clip(expert.get_action(task.privileged.astype(np.float64)), -1, 1).astype(np.float32)
        states.append(task.privileged)
        actions.append(action)
        executed = action.copy()
        if kicked[step]:
            executed[:3] = motion[step]
        if task.step(executed) and solved_at is None:
            solved_at = step
    kept = [step for step in frames if step + CHUNK <= len(actions)]
    if solved_at is None or not kept:
        return None
    return {
        "images": np.stack([frames[step] for step in kept]),
        "states": np.stack([states[step] for step in kept]),
        "chunks": np.stack([np.stack(actions[step : step + CHUNK]) for step in kept]),
    }


def work(worker: int, seconds: float, out: Path) -> None:
    """Record rounds of all tasks until the time is used; one file per ten rounds."""
    rng = np.random.default_rng(100 + worker)
    tasks = {name: MetaWorldTask(name) for name in TASKS}
    seed = FIRST_SEED * (worker + 1)
    end = time.monotonic() + seconds
    part = 0
    while time.monotonic() < end:
        episodes: list[tuple[int, int, dict[str, np.ndarray]]] = []
        for _ in range(4):
            for index, name in enumerate(TASKS):
                for _ in range(EPISODES_PER_ROUND.get(name, 1)):
                    seed += 1
                    if (episode := record(tasks[name], seed, rng)) is not None:
                        episodes.append((index, seed, episode))
        lengths = [len(episode["states"]) for _, _, episode in episodes]
        np.savez(
            out / f"worker{worker}-part{part:03d}.npz",
            task=np.repeat([index for index, _, _ in episodes], lengths),
            seed=np.repeat([seed for _, seed, _ in episodes], lengths),
            **{key: np.concatenate([e[key] for _, _, e in episodes]) for key in ("images", "states", "chunks")},
        )
        part += 1
        print(f"worker {worker}: part {part}, {len(episodes)} episodes, {sum(lengths)} frames", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200, help="time for each worker")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"cameras: {', '.join(CAMERAS)}; tasks: {len(TASKS)}", flush=True)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(w, options.seconds, options.out)) for w in range(options.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"a worker ended with exit code {worker.exitcode}")


if __name__ == "__main__":
    main()
