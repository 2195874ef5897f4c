"""The loss of healing, computed a chunk of tokens at a time, and transformers' Trainer around it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..architectures import base_model_type, family
from ..checkpoint import Checkpoint, skeleton
from ..errors import TransMLAError
from .job import LossWeights, Schedule

__all__ = [
    "CHUNK_TOKENS",
    "HealingTrainer",
    "Teacher",
    "last_checkpoint",
    "load",
    "make_student",
]

CHUNK_TOKENS = 128  # whose logits are in memory at once: 25 MB of each kind for 49,152 tokens in fp32


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """transformers' model of an original or native checkpoint, whole and frozen; no code of the checkpoint is run.

    from_pretrained would load a part of it in each process that FSDP or DeepSpeed is set up in, of the teacher too.
    """
    model: Any = skeleton(checkpoint.config)
    state = {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.expected}
    model.load_state_dict(state, strict=False, assign=True)  # a tied head is not there
    model.tie_weights()
    return model.requires_grad_(False).eval()


class Teacher:
    """The original model, whole in every process."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._model = load(checkpoint, dtype).to(device)
        self._architecture = family(checkpoint.config.model_type)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """[batch_size, sequence_length, hidden_size], what the head gets."""
        device = self._model.lm_head.weight.device
        hidden: Tensor = self._model.model(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        return hidden

    def log_p(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, [tokens, vocab_size], fp32."""
        return self._architecture.logits(self._model.config, self._model.lm_head(hidden)).float().log_softmax(-1)


def make_student(
    checkpoint: Checkpoint,
    trained: Callable[[str], bool],
    weights: LossWeights,
    teacher_log_p: Callable[[Tensor], Tensor] | None,
) -> PreTrainedModel:
    """The native model in fp32, whose forward is the loss; weights that `trained` says no to are frozen.

    Args:
        trained: by name of the weight.
        teacher_log_p: Teacher.log_p, for teacher_hidden as a target; None where targets are top_ids and top_log_p.
    """
    model = load(checkpoint, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    architecture = family(base_model_type(model.config.model_type) or model.config.model_type)
    model.lm_head = _DistillationHead(
        model.lm_head, lambda raw: architecture.logits(model.config, raw), weights, teacher_log_p
    )
    # FSDP and DeepSpeed gather weights around a module's forward, so the loss is the model's own.
    model.forward = MethodType(_loss, model)
    student: PreTrainedModel = model
    return student


def _loss(
    model: Any,
    input_ids: Tensor,
    teacher_hidden: Tensor | None = None,
    top_ids: Tensor | None = None,
    top_log_p: Tensor | None = None,
) -> dict[str, Tensor]:
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    targets = [target.flatten(0, 1) for target in (teacher_hidden, top_ids, top_log_p) if target is not None]
    return {"loss": model.lm_head(hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), *targets)}


class _DistillationHead(nn.Module):
    """Takes the place of a head: the loss of hidden states, whose logits never exist all at once."""

    def __init__(
        self,
        head: nn.Linear,
        logits: Callable[[Tensor], Tensor],
        weights: LossWeights,
        teacher_log_p: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.weight = head.weight
        self._logits, self._weights, self._teacher_log_p = logits, weights, teacher_log_p

    def forward(self, hidden: Tensor, labels: Tensor, *targets: Tensor) -> Tensor:
        """Mean loss of a token.

        Args:
            hidden: [tokens, hidden_size].
            labels: [tokens], the token that follows.
            targets: teacher_hidden [tokens, hidden_size of the teacher]; or top_ids and top_log_p [tokens, top_k].
        """
        loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            self._chunk_loss, hidden, self.weight, labels, *targets
        )
        return loss / len(hidden)

    def _chunk_loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, *targets: Tensor) -> Tensor:
        """Sum over the tokens of a chunk."""
        log_q = self._logits(F.linear(hidden, weight)).float().log_softmax(-1)
        loss = self._weights.ce * F.nll_loss(log_q, labels, reduction="sum")
        if self._weights.kl:
            if self._teacher_log_p is not None:
                log_p = self._teacher_log_p(*targets)
            else:
                top_ids, top_log_p = targets
                log_q = _with_rest(log_q.gather(-1, top_ids.long()))
                log_p = _with_rest(top_log_p)
            loss = loss + self._weights.kl * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return loss


def _with_rest(top_log_p: Tensor) -> Tensor:
    """[tokens, top_k + 1]: all tokens but the likeliest together are one outcome more."""
    rest = torch.log1p(-top_log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([top_log_p, rest], dim=-1)


class _Chunked(torch.autograd.Function):
    """Sum of a loss over chunks of tokens; their gradients are taken at once, so nothing is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, loss_of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *targets: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:3]
        leaf = weight.detach().requires_grad_(needed[1])
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        d_weight = torch.zeros_like(weight) if needed[1] else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            with torch.set_grad_enabled(any(needed)):
                chunk = hidden[rows].detach().requires_grad_(needed[0])
                loss = loss_of(chunk, leaf, *(target[rows] for target in targets))
            total += loss.detach()
            if any(needed):
                grads = list(torch.autograd.grad(loss, [x for x, n in zip((chunk, leaf), needed, strict=True) if n]))
                if d_hidden is not None:
                    d_hidden[rows] = grads.pop(0)
                if d_weight is not None:
                    d_weight += grads.pop(0)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = (None if d is None else d * grads[0] for d in ctx.saved_tensors)
        return None, d_hidden, d_weight, *[None] * (len(ctx.needs_input_grad) - 3)


class HealingTrainer(Trainer):
    """Trainer of a student, which stops at a loss that is no number.

    Args:
        teacher: whose hidden states are the targets; None where the dataset has them, or none are wanted.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        arguments: TrainingArguments,
        text: Any,
        schedule: Schedule,
        teacher: Teacher | None,
        bar: Progress,
    ) -> None:
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=text,
            data_collator=torch.utils.data.default_collate,
            callbacks=[_ProgressCallback(bar)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # sequences are of equal length: a mean over steps is a mean over tokens
        self._schedule, self._teacher = schedule, teacher
        if arguments.fsdp and arguments.world_size > 1 and not self.is_fsdp_enabled:
            raise ValueError("training_arguments: fsdp is used on accelerators only, by accelerate; leave it out")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adam, at rates that are the schedule's."""
        trained: Any = model or self.model
        parameters = [p for p in trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=1.0, betas=(self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        # The rates are in the function, which no checkpoint holds: who resumes may give others.
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda step: self._schedule.rate(step, num_training_steps),
        )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        index = inputs.pop("index")
        if self._teacher is not None:
            with torch.no_grad():
                inputs["teacher_hidden"] = self._teacher.hidden(inputs["input_ids"])[:, :-1]
        loss: Tensor = model(**inputs)["loss"]
        if not loss.isfinite():
            sequences = ", ".join(map(str, index.tolist()))
            self._stop(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, sequence {sequences} of the text"
            )
        return loss

    def weights(self) -> dict[str, Tensor]:
        """Of the student, whole, in the first process at least."""
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        if not all(tensor.isfinite().all() for tensor in state.values()):
            self._stop(f"weights are NaN or infinite after the last step, {self.state.global_step}")
        return state

    def _stop(self, where: str) -> NoReturn:
        work = Path(str(self.args.output_dir))
        # Saved behind the step that led here, so it holds the weights that gave this loss.
        shutil.rmtree(work / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        good = last_checkpoint(work)
        if good is None:
            raise TransMLAError(f"{where}; there is no checkpoint yet: lower the learning rate (--learning-rate)")
        raise TransMLAError(
            f"{where}; {good} is kept: the same command with a lower learning rate (--learning-rate) goes on there"
        )


class _ProgressCallback(TrainerCallback):
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self._bar.add_task("Healing", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self._bar.update(self._task, description=f"Healing, loss {float(logs['loss']):.3f}")


def last_checkpoint(work: Path) -> Path | None:
    """The Trainer checkpoint of the latest step; one whose writing was cut short does not count."""
    steps = sorted((int(path.name.removeprefix("checkpoint-")) for path in work.glob("checkpoint-*")), reverse=True)
    return next((path for path in (work / f"checkpoint-{step}" for step in steps) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError):
        return False
    return True
