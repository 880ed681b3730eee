"""Behaviour cloning of the compact pi0.5 on recorded demonstrations, on a CPU.

    python training/train.py --demonstrations runs/demonstrations --out runs/policy --steps 6000

The flow-matching loss is pi0.5's own, but the prefix is computed once per observation and several
(noise, time) samples are drawn on it through the policy's `denoise_step`: the same function as its training
forward, with more gradient for the expert at little cost.

Seeing is what a small policy learns last, so two auxiliary losses say early what there is to see: each image
token tells whether the hand, the object or the goal is in its patch, and where; and the prompt's last token
knows, halfway through the language model, where object and goal are relative to the hand. These labels exist
in training only.

The learning rate is warmed up, held, and decayed over the last part. The state is saved regularly and before
the decay, so that `--resume` continues a stopped run or makes a longer one out of a short one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import compact_policy
from omega_qvla.evaluation.metaworld.task import CAMERAS, IMAGE_SIZE, TASKS

SEED = 0
SAMPLES_PER_OBSERVATION = 4
GRID = IMAGE_SIZE // 16
LANDMARKS = {"hand": slice(0, 3), "object": slice(4, 7), "goal": slice(36, 39)}
# Tasks in which centimetres decide are drawn more often.
TASK_WEIGHTS = {"reach-v3": 1.5, "push-v3": 2.0, "pick-place-v3": 2.0, "peg-insert-side-v3": 2.0}
LOSS_WEIGHTS = {"flow": 1.0, "landmark": 0.1, "relative": 1.0}
EMA_DECAY = 0.999


@dataclass
class Frames:
    """All recorded frames: images uint8 [N, cameras, H, W, 3], privileged states [N, 39], chunks [N, 8, 4]."""

    images: np.ndarray
    states: np.ndarray
    chunks: np.ndarray
    task: np.ndarray
    seed: np.ndarray

    @classmethod
    def load(cls, directory: Path) -> Frames:
        parts = [np.load(path) for path in sorted(directory.glob("*.npz"))]
        if not parts:
            raise SystemExit(f"{directory} holds no demonstrations; run training/demonstrations.py first")
        return cls(*(np.concatenate([part[key] for part in parts]) for key in cls.__annotations__))


@dataclass
class Batch:
    images: list[Tensor]
    tokens: Tensor
    token_mask: Tensor
    chunks: Tensor
    patch: Tensor
    """Index of the patch that shows each landmark, [B, cameras, landmarks]; -1 if outside the image."""
    offset: Tensor
    """Its place inside the patch, [B, cameras, landmarks, 2], 0..1."""
    relative: Tensor
    """Object and goal relative to the hand in decimetres, [B, 6]."""


class Data:
    """Batches of frames with labels and tokens prepared."""

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        proprioception = torch.from_numpy(frames.states[:, :4])
        self.state_quantiles = torch.quantile(proprioception[:100_000], torch.tensor([0.005, 0.995]), dim=0)
        self.tokens, self.token_mask = self._tokenize(proprioception)
        points = np.stack([frames.states[:, part] for part in LANDMARKS.values()], 1).astype(np.float64)
        cells = np.stack([camera.project(points) for camera in CAMERAS.values()], 1) * GRID
        inside = ((cells >= 0) & (cells < GRID)).all(-1)
        corner = np.floor(cells)
        index = np.where(inside, corner[..., 1] * GRID + corner[..., 0], -1)
        self.patch = torch.from_numpy(index.astype(np.int64))
        self.offset = torch.from_numpy((cells - corner).astype(np.float32))
        relative = (points[:, 1:] - points[:, :1]) * 10
        self.relative = torch.from_numpy(relative.reshape(len(points), -1).astype(np.float32))
        validation = frames.seed % 50 == 0
        self.training, self.validation = np.flatnonzero(~validation), np.flatnonzero(validation)
        weights = np.array([TASK_WEIGHTS.get(name, 1.0) for name in TASKS])
        task = frames.task[self.training]
        probability = (weights / np.bincount(task, minlength=len(TASKS)).clip(1))[task]
        self.cumulative = np.cumsum(probability / probability.sum())

    def _tokenize(self, proprioception: Tensor) -> tuple[Tensor, Tensor]:
        statistics = {
            "observation.state": {"q01": self.state_quantiles[0], "q99": self.state_quantiles[1]},
            "action": {"q01": -torch.ones(4), "q99": torch.ones(4)},
        }
        preprocessor, _ = compact_policy.processors(compact_policy.config(), statistics)
        sentences = list(TASKS.values())
        tokens, masks = [], []
        for start in range(0, len(proprioception), 4096):
            state = proprioception[start : start + 4096]
            task = [sentences[i] for i in self.frames.task[start : start + 4096]]
            batch = preprocessor({"observation.state": state, "task": task, "action": torch.zeros(len(state), 4)})
            tokens.append(batch["observation.language.tokens"])
            masks.append(batch["observation.language.attention_mask"].bool())
        return torch.cat(tokens), torch.cat(masks)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        return self.batch(
            self.training[np.searchsorted(self.cumulative, rng.random(size)).clip(max=len(self.training) - 1)]
        )

    def batch(self, index: np.ndarray) -> Batch:
        images = torch.from_numpy(self.frames.images[index]).permute(1, 0, 4, 2, 3).float().div_(127.5).sub_(1)
        return Batch(
            images=list(images),
            tokens=self.tokens[index],
            token_mask=self.token_mask[index],
            chunks=torch.from_numpy(self.frames.chunks[index]),
            patch=self.patch[index],
            offset=self.offset[index],
            relative=self.relative[index],
        )


class Student(nn.Module):
    """The policy and the two auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = compact_policy.initialize(SEED)
        width = compact_policy.architecture().language.width
        self.landmark_head = nn.Linear(width, 3 * len(LANDMARKS))
        self.relative_head = nn.Linear(width, 6)
        stacks = self.policy.model.paligemma_with_expert
        self._middle: list[Tensor] = []
        self._image_tokens: list[Tensor] = []
        stacks.paligemma.model.language_model.layers[2].register_forward_pre_hook(
            lambda module, inputs: self._middle.append(inputs[0])
        )
        stacks.paligemma.model.multi_modal_projector.register_forward_hook(
            lambda module, inputs, output: self._image_tokens.append(output)
        )

    def vision_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The landmark loss alone, a third of the cost of all of them."""
        self._image_tokens.clear()
        for image in batch.images:
            self.policy.model.paligemma_with_expert.embed_image(image)
        landmark = [self._landmark(tokens, batch, i) for i, tokens in enumerate(self._image_tokens)]
        return {"landmark": torch.stack(landmark).mean()}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Flow-matching, landmark and relative-position losses of a batch."""
        self._middle.clear()
        self._image_tokens.clear()
        flow = self._flow(batch)
        landmark = torch.stack([self._landmark(tokens, batch, i) for i, tokens in enumerate(self._image_tokens)])
        images = sum(tokens.shape[1] for tokens in self._image_tokens)
        last = images + batch.token_mask.sum(1) - 1
        summary = self._middle[0][torch.arange(len(last)), last]
        relative = F.smooth_l1_loss(self.relative_head(summary), batch.relative, beta=0.1)
        return {"flow": flow, "landmark": landmark.mean(), "relative": relative}

    def _flow(self, batch: Batch) -> Tensor:
        model, k = self.policy.model, SAMPLES_PER_OBSERVATION
        mask = [torch.ones(len(batch.chunks), dtype=torch.bool)] * len(batch.images)
        embedded, pad, attend = model.embed_prefix(batch.images, mask, batch.tokens, batch.token_mask)
        model.paligemma_with_expert.paligemma.model.language_model.config._attn_implementation = "eager"
        _, past = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad, attend)),
            position_ids=torch.cumsum(pad, 1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=True,
        )
        past = DynamicCache(
            tuple((key.repeat_interleave(k, 0), value.repeat_interleave(k, 0), rest) for key, value, rest in past)
        )
        chunks = batch.chunks.repeat_interleave(k, 0)
        noise, at = torch.randn_like(chunks), model.sample_time(len(chunks), chunks.device)
        mixed = at[:, None, None] * noise + (1 - at[:, None, None]) * chunks
        return F.mse_loss(model.denoise_step(pad.repeat_interleave(k, 0), past, mixed, at), noise - chunks)

    def _landmark(self, tokens: Tensor, batch: Batch, camera: int) -> Tensor:
        """Which patch (cross entropy) and where in it, over the landmarks that the camera shows."""
        output = self.landmark_head(tokens).unflatten(-1, (len(LANDMARKS), 3)).transpose(1, 2)
        patch, visible = batch.patch[:, camera], batch.patch[:, camera] >= 0
        which = F.cross_entropy(output[..., 0].flatten(0, 1), patch.flatten(), ignore_index=-1)
        index = patch.clamp(min=0)[..., None, None].expand(-1, -1, 1, 2)
        where = output[..., 1:].gather(2, index).squeeze(2)
        return which + 2 * F.smooth_l1_loss(where[visible], batch.offset[:, camera][visible], beta=0.1)


class Run:
    """Student, optimizer and averaged weights, with a state that can be saved and resumed."""

    def __init__(self, learning_rate: float) -> None:
        self.student = Student()
        decayed = [p for p in self.student.parameters() if p.ndim > 1]
        plain = [p for p in self.student.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
        self.averaged = {name: value.clone() for name, value in self.student.policy.state_dict().items()}
        self.step = 0

    def update(self, losses: dict[str, Tensor], learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.values()), list(self.student.policy.state_dict().values()), 1 - decay
            )

    def save(self, path: Path) -> None:
        tensors = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        tensors |= {f"averaged.{k}": v for k, v in self.averaged.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        partial = path.with_suffix(".partial")
        save_file(
            {k: v.detach().clone().contiguous() for k, v in tensors.items()},
            partial,
            {"step": str(self.step)},
        )
        partial.rename(path)

    def resume(self, path: Path) -> None:
        tensors = load_file(path)
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.student.load_state_dict(part("student."))
        averaged = part("averaged.")
        self.averaged = {name: averaged[name] for name in self.averaged}
        state = self.optimizer.state_dict()
        for name, value in part("optimizer.").items():
            index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])

    def policy(self) -> compact_policy.PI05Policy:
        """The policy with averaged weights."""
        policy = compact_policy.initialize(SEED)
        policy.load_state_dict(self.averaged)
        return policy


@torch.no_grad()
def validate(run: Run, data: Data) -> dict[str, float]:
    """Losses on held-out episodes, always with the same noise."""
    index = np.random.default_rng(1).choice(data.validation, min(512, len(data.validation)), replace=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = [run.student.losses(data.batch(part)) for part in np.array_split(index, 4)]
    return {name: float(np.mean([part[name].item() for part in parts])) for name in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--decay-steps", type=int, default=1500)
    parser.add_argument("--vision-steps", type=int, default=1000, help="first steps, on the landmark loss alone")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--resume", type=Path, help="a state.safetensors or stable.safetensors of an earlier run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    data = Data(Frames.load(options.demonstrations))
    print(f"{len(data.training)} training frames, {len(data.validation)} validation frames", flush=True)
    run = Run(options.learning_rate)
    if options.resume:
        run.resume(options.resume)
    torch.manual_seed(SEED + run.step)
    rng = np.random.default_rng(SEED + run.step)
    run.student.train()
    started, first = time.monotonic(), run.step
    recent: list[dict[str, float]] = []
    decay_from = options.steps - options.decay_steps
    while run.step < options.steps:
        if run.step == decay_from:
            run.save(options.out / "stable.safetensors")
        warmup = min(1.0, (run.step + 1) / 300)
        decay = min(1.0, (options.steps - run.step) / options.decay_steps)
        batch = data.draw(rng, options.batch)
        seeing = run.step < options.vision_steps
        losses = run.student.vision_losses(batch) if seeing else run.student.losses(batch)
        run.update(losses, options.learning_rate * warmup * decay)
        recent.append({name: value.item() for name, value in losses.items()})
        if run.step % 250 == 0 or run.step - first == 20:
            rate = (run.step - first) / (time.monotonic() - started)
            train = {name: np.mean([r[name] for r in recent if name in r] or [np.nan]) for name in LOSS_WEIGHTS}
            shown = " ".join(f"{k} {train[k]:.4f}/{v:.4f}" for k, v in validate(run, data).items())
            recent.clear()
            print(f"step {run.step} ({rate:.2f}/s) train/validation: {shown}", flush=True)
        if run.step % 500 == 0:
            run.save(options.out / "state.safetensors")
            compact_policy.save(run.policy(), data.state_quantiles, options.out / "checkpoint")
    run.save(options.out / "state.safetensors")
    compact_policy.save(run.policy(), data.state_quantiles, options.out / "checkpoint")


if __name__ == "__main__":
    main()
