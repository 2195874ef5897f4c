"""lm-evaluation-harness: the model "transmla", and tasks by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lm_eval.models  # noqa: F401  (its own models)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..runtime import Engine, MLAModel, load
from .report import Result

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HarnessTask", "TransMLALM", "harness_model", "load_tasks", "run_task"]

_Item = TypeVar("_Item")

_BATCH_TOKENS = 4096
_TRANSFORMERS_BATCH_SIZE = 8
_SAMPLING = {"temperature", "top_k", "top_p"}


@register_model("transmla")
class TransMLALM(TemplateLM):  # type: ignore[misc]
    """lm-evaluation-harness's model "transmla": a converted checkpoint on this package's kernels.

    Requests have no batch size: they are packed without padding, contexts that several have in common once.

    Args:
        pretrained: a model with a tokenizer, or the directory of a converted one.
        dtype, device: as of ``load``, for a directory.
        max_length: tokens of a request and its answer; None: the model's positions.
        max_gen_toks: to generate at most, where the task does not say.
        batch_size, max_batch_size: what lm-evaluation-harness gives every model; they do nothing.
    """

    def __init__(
        self,
        pretrained: MLAModel | str | Path,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = pretrained if isinstance(pretrained, MLAModel) else load(pretrained, dtype=dtype, device=device)
        if self.model.tokenizer is None:
            raise ValueError("lm-evaluation-harness asks in text, and the checkpoint has no tokenizer")
        self.tokenizer = self.model.tokenizer
        self.max_length = max_length or self.model.max_position_embeddings
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template has written them already
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is what greedy decoding gives) of each request."""
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)  # a context: the requests that have it
        for i, (_, context, continuation) in enumerate(requests):
            # The last token is predicted and needs no position.
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(f"a continuation of {len(continuation)} tokens, but max_length is {self.max_length}")
            sharing[tuple(context[-room:])].append(i)

        def num_tokens(group: tuple[tuple[int, ...], list[int]]) -> int:
            return len(group[0]) + sum(len(requests[i][2]) for i in group[1])

        groups = [
            (context, part) for context, its in sharing.items() for part in _packed(its, lambda i: len(requests[i][2]))
        ]
        # Longest first: what does not fit shows at once, and the time left is not underestimated.
        groups.sort(key=num_tokens, reverse=True)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for batch in _packed(groups, num_tokens):
                scores = self.model.score(
                    [context for context, _ in batch], [[requests[i][2] for i in part] for _, part in batch]
                )
                for (_, part), its in zip(batch, scores, strict=True):
                    for i, score in zip(part, its, strict=True):
                        text, _, continuation = requests[i]
                        total = float(score.logprobs.sum(dtype=torch.float64))
                        answers[i] = (total, score.likeliest.tolist() == continuation)
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, answers[i])
                        bar.update()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        owners, windows = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(i)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        engine = Engine(self.model, max_queue_length=len(requests))
        indices = {}
        for i, request in enumerate(requests):
            context, gen_kwargs = request.args
            options = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
            num_new, until = options.pop("max_gen_toks"), options.pop("until")
            if num_new >= self.max_length:
                raise ValueError(f"max_gen_toks={num_new} leaves no room for a prompt: max_length is {self.max_length}")
            if not options.pop("do_sample"):
                options = {key: value for key, value in options.items() if key not in _SAMPLING}
            if unknown := options.keys() - _SAMPLING:
                raise ValueError(f"generation_kwargs that this model does not have: {', '.join(sorted(unknown))}")
            prompt = self.tok_encode(context)[num_new - self.max_length :]
            request_id = engine.add_request(prompt, max_new_tokens=num_new, stop=list(filter(None, until)), **options)
            indices[request_id] = i
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            while engine.num_unfinished:
                for output in engine.step():
                    i = indices[output.request_id]
                    texts[i] += output.text
                    if output.finish_reason is not None:
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                        bar.update()
        return texts


def _packed(items: Iterable[_Item], num_tokens: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Items in order, as many together as have _BATCH_TOKENS, or one that has more."""
    pack: list[_Item] = []
    room = _BATCH_TOKENS
    for item in items:
        if pack and num_tokens(item) > room:
            yield pack
            pack, room = [], _BATCH_TOKENS
        pack.append(item)
        room -= num_tokens(item)
    if pack:
        yield pack


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag of lm-evaluation-harness by its name, its data loaded."""

    name: str
    loaded: Any  # TaskManager.load's TaskDict


def load_tasks(names: Sequence[str], include_path: Path | None, num_fewshot: int | None) -> list[HarnessTask]:
    """Tasks by name, of a directory of one's own or of lm-evaluation-harness, whose data come from the hub.

    Args:
        include_path: directory of task YAMLs; those that name Python functions have them run.
        num_fewshot: examples in front of each question; None: the task's own number, or none.
    Raises:
        ValueError: a name that no task has, or data that cannot be had.
    """
    manager = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # takes seconds: there are 14,000
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks)
            advice = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(f"lm-evaluation-harness has no task '{name}'; {advice}")
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # datasets and its file formats raise nearly anything here
            raise ValueError(f"the data of task '{name}' cannot be loaded: {error}") from error
        for task in loaded["tasks"].values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # a task that says 0 has no examples
                task.set_config("num_fewshot", num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
        tasks.append(HarnessTask(name, loaded))
    return tasks


def harness_model(model: MLAModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What lm-evaluation-harness calls an LM."""
    if isinstance(model, MLAModel):
        return TransMLALM(model)
    from lm_eval.models.huggingface import HFLM

    with redirect_stderr(StringIO()):  # it warns that it has not loaded the model itself
        return HFLM(
            model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=_TRANSFORMERS_BATCH_SIZE,
            softmax_dtype=torch.float32,  # as here: bf16 would round log-likelihoods to 8 bits
        )


def run_task(lm: Any, task: HarnessTask, *, limit: int | None, progress: bool) -> list[Result]:
    """The model's results: a group's own if it has any, else those of its tasks.

    Args:
        limit: of documents of each task.
    """
    for loaded in task.loaded["tasks"].values():
        loaded.set_fewshot_seed(DEFAULT_OTHER_SEED)  # every model sees the same examples
    # lm-evaluation-harness cannot be told to show no progress.
    with nullcontext() if progress else redirect_stderr(StringIO()):
        outcome = evaluate(lm, task.loaded, limit=limit)
    of_groups = outcome.get("groups", {})
    names = [task.name] if task.name in of_groups else list(task.loaded["tasks"])
    results = []
    for name in names:
        values = of_groups.get(name) or outcome["results"][name]
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            results.append(
                Result(
                    task=name,
                    metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                    value=float(value),
                    stderr=stderr if isinstance(stderr, float) else None,  # "N/A" where there is none
                    higher_is_better=outcome["higher_is_better"].get(name, {}).get(metric),
                )
            )
    return results
