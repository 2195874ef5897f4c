"""transmla eval: scores are those of lm-evaluation-harness's own transformers model, perplexity is the conversion's."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import transmla_ext
from transmla_ext.cli import app
from transmla_ext.errors import CheckpointError, TransMLAError
from transmla_ext.evaluate import harness
from transmla_ext.evaluate.subject import Subject
from transmla_ext.runtime import MLAModel

CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LETTER = """
task: local_letter
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_target: "{{label % 2}}"
doc_to_choice: ["A", "B"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TEXT = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices | join(' ')}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
ANSWER = """
task: local_answer
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: local_group
task: [local_choice, local_letter]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: false}
"""
TEST = "Whether a name was bound is what the other class returns. " * 60
TASKS = ("local_choice", "local_letter", "local_text", "local_answer")
ASKED = ("--text-tokens", 512, "--sequence-length", 64, "--limit", 8)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks with their data: 24 questions of random words, contexts and choices of all lengths."""
    directory = tmp_path_factory.mktemp("tasks")
    words = ["while", "return", "the", "value", "of", "a", "class", "is", "raised", "when", "no", "other", "name"]
    draw = random.Random(0)
    for split, count in (("train", 4), ("validation", 24)):
        rows = [
            {
                "question": " ".join(draw.choices(words, k=draw.randint(2, 40))),
                "choices": [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(4)],
                "label": draw.randrange(4),
            }
            for _ in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(directory / f"{split}.jsonl") for split in ("train", "validation")},
            "cache_dir": str(directory / "cache"),
        },
        "validation_split": "validation",
        "fewshot_split": "train",
    }
    for name, task in zip(TASKS, (CHOICE, LETTER, TEXT, ANSWER), strict=True):
        (directory / f"{name}.yaml").write_text(task + "\n".join(f"{k}: {json.dumps(v)}" for k, v in data.items()))
    (directory / "local_group.yaml").write_text(GROUP)
    return directory


@pytest.fixture(scope="session")
def original(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture(scope="session")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """converted(format): the original at half the cache."""
    made: dict[str, Path] = {}

    def convert(format: str) -> Path:
        if format not in made:
            out = tmp_path_factory.mktemp("converted") / format
            options = {"calibration_tokens": 512, "sequence_length": 128, "refine_steps": 0, "format": format}
            transmla_ext.convert(
                original, out, kv_lora_rank=24, qk_rope_head_dim=8, test=[TEST], progress=False, **options
            )
            made[format] = out
        return made[format]

    return convert


def in_transformers(path: Path, **options: Any) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(path), backend="causal", batch_size=3, **options)


@pytest.mark.parametrize(
    ("num_fewshot", "max_length", "batch_tokens"), [(0, None, 4096), (2, 64, 100)], ids=["whole", "truncated"]
)
@pytest.mark.parametrize("format", ["transmla", "deepseek_v3"])
def test_scores_are_those_of_lm_eval_s_own_transformers_model(
    converted: Callable[[str], Path],
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    num_fewshot: int,
    max_length: int | None,
    batch_tokens: int,
) -> None:
    monkeypatch.setattr(harness, "_BATCH_TOKENS", batch_tokens)
    ours = get_model("transmla").create_from_arg_string(
        f"pretrained={converted(format)},dtype=float32", {"batch_size": 1, "device": "cpu", "max_length": max_length}
    )
    theirs = in_transformers(converted(format), max_length=max_length)
    num_free = ours.model.cache.num_free_tokens
    for task in harness.load_tasks(TASKS, tasks, num_fewshot):
        outcomes = []
        for lm in (ours, theirs):
            task.loaded["tasks"][task.name].set_fewshot_seed(7)
            outcomes.append(lm_evaluate(lm, task.loaded, log_samples=True, bootstrap_iters=0))
        actual, expected = (outcome["samples"][task.name] for outcome in outcomes)
        assert len(actual) == len(expected) == 24
        for a, b in zip(actual, expected, strict=True):
            assert a["arguments"] == b["arguments"]
            if task.name == "local_answer":
                # transformers decodes bytes that are not yet a character, too.
                assert [text.rstrip("\ufffd") for [text] in a["resps"]] == [t.rstrip("\ufffd") for [t] in b["resps"]]
            elif task.name == "local_text":
                assert a["resps"][0][0] == pytest.approx(b["resps"][0][0], rel=1e-5)
            else:
                for [(total, greedy)], [(their_total, theirs_greedy)] in zip(a["resps"], b["resps"], strict=True):
                    assert total == pytest.approx(their_total, rel=1e-5, abs=1e-4)
                    assert greedy == theirs_greedy
        assert metrics(outcomes[0], task.name) == pytest.approx(metrics(outcomes[1], task.name), rel=1e-5)
    assert ours.model.cache.num_free_tokens == num_free


def test_text_becomes_tokens_as_in_lm_eval_s_own_transformers_model(
    converted: Callable[[str], Path],
) -> None:
    ours, theirs = harness.TransMLALM(converted("transmla")), in_transformers(converted("transmla"))
    for lm in (ours, theirs):
        bos = ("<bos>", lm.tokenizer.bos_token_id)
        lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
        lm.tokenizer.chat_template = "{% for m in messages %}<bos>{{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "while"}]
    text = ours.apply_chat_template(chat)
    assert text == theirs.apply_chat_template(chat) == "<bos>while\n"
    for string, flag in ((text, None), ("while", None), (text, True), ("while", False)):
        tokens = ours.tok_encode(string, add_special_tokens=flag)
        assert tokens == theirs.tok_encode(string, add_special_tokens=flag)
    assert ours.tok_encode(text)[:2] != [ours.prefix_token_id] * 2
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_requests_of_one_context_are_no_more_at_once_than_others(
    converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    score = MLAModel.score

    def recording(self: MLAModel, contexts: Any, continuations: Any) -> Any:
        sizes.append(sum(map(len, contexts)) + sum(len(tokens) for its in continuations for tokens in its))
        return score(self, contexts, continuations)

    monkeypatch.setattr(MLAModel, "score", recording)
    monkeypatch.setattr(harness, "_BATCH_TOKENS", 60)
    lm = harness.TransMLALM(converted("transmla"))
    answers = lm._loglikelihood_tokens([(None, [5], [7] * 20) for _ in range(7)] + [(None, [6], [7])])
    assert answers[:7] == [pytest.approx(answers[0], abs=1e-4)] * 7
    assert sizes == [61, 61, 23]


def metrics(outcome: Any, task: str) -> dict[str, float]:
    return {key: value for key, value in outcome["results"][task].items() if isinstance(value, float)}


def test_eval_sets_models_side_by_side(
    original: Path, converted: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    out, models = tmp_path / "out", (original, converted("transmla"))
    options = ("--tasks", "local_group,local_text", "--include-path", tasks, "--num-fewshot", 1, "--out", out)
    done = CliRunner().invoke(app, list(map(str, ["eval", *models, *options, *ASKED, "--quiet"])))
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"eval.json", "eval.md", "eval.png"}
    results = json.loads((out / "eval.json").read_text())["results"]
    assert list(results) == [original.name, "transmla"]
    rows = [("text", "perplexity"), ("local_group", "acc"), ("local_text", "word_perplexity")]
    for of_model in results.values():
        assert [(result["task"], result["metric"]) for result in of_model] == rows
        assert [result["higher_is_better"] for result in of_model] == [False, True, False]
    [group, text] = harness.load_tasks(["local_group", "local_text"], tasks, 1)
    for path, name in zip(models, results, strict=True):
        theirs = in_transformers(path)
        expected = [harness.run_task(theirs, task, limit=8, progress=False)[0] for task in (group, text)]
        for actual, wanted in zip(results[name][1:], expected, strict=True):
            assert actual["value"] == pytest.approx(wanted.value, rel=1e-5)
            assert actual["stderr"] == (wanted.stderr and pytest.approx(wanted.stderr, rel=1e-4))
    for shown in (done.output, (out / "eval.md").read_text()):
        assert "local_group: acc ↑" in shown
        assert f"{results['transmla'][0]['value']:,.2f}" in shown


def test_every_model_sees_the_same_examples(original: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = in_transformers(original)
    seen: list[Any] = []
    ask = lm.loglikelihood
    monkeypatch.setattr(lm, "loglikelihood", lambda its: seen.append([request.args for request in its]) or ask(its))
    [task] = harness.load_tasks(["local_choice"], tasks, 2)
    first, second = (harness.run_task(lm, task, limit=8, progress=False) for _ in range(2))
    assert first == second
    assert seen[0] == seen[1]
    assert all(context.count("Question:") == 3 for context, _ in seen[0])
    assert [result.metric for result in first] == ["acc", "acc_norm"]


def test_perplexity_is_the_conversion_report_s(original: Path, converted: Callable[[str], Path]) -> None:
    report = json.loads((converted("transmla") / "conversion_report.json").read_text())
    models = [original, converted("transmla"), converted("deepseek_v3")]
    judged = transmla_ext.evaluate(models, text=[TEST], sequence_length=128, text_tokens=8192, progress=False)
    assert judged.settings["text_tokens"] == report["test_tokens"]
    before, after, stock = (results[0].value for results in judged.results.values())
    assert before == pytest.approx(report["perplexity_before"], rel=1e-5)
    assert after == pytest.approx(report["perplexity_after"], rel=1e-4)
    assert stock == pytest.approx(report["perplexity_after"], rel=1e-4)


def test_a_model_that_is_not_converted_may_be_of_any_kind(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(TransMLAError):
        transmla_ext.convert(tmp_path, tmp_path / "out")
    judged = transmla_ext.evaluate(tmp_path, text=[TEST], sequence_length=64, progress=False)
    assert 100 < judged.results[tmp_path.name][0].value < 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_evaluation_cut_short_goes_on_where_it_was(
    original: Path,
    converted: Callable[[str], Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    models, out = [original, converted("transmla")], tmp_path / "out"
    options: dict[str, Any] = {"tasks": ["local_choice", "local_letter"], "include_path": tasks, "limit": 4}
    options |= {"text": [TEST], "sequence_length": 64, "progress": False}
    whole = transmla_ext.evaluate(models, **options)
    asked: list[tuple[str, str]] = []
    run_task = harness.run_task

    def recording(lm: Any, task: Any, **kwargs: Any) -> Any:
        asked.append((type(lm).__name__, task.name))
        if len(asked) == 4:
            raise error
        return run_task(lm, task, **kwargs)

    monkeypatch.setattr(harness, "run_task", recording)
    with pytest.raises(error):
        transmla_ext.evaluate(models, out, **options)
    assert not out.exists()
    loaded: list[Path] = []
    load = Subject.load
    monkeypatch.setattr(Subject, "load", lambda self, **kwargs: loaded.append(self.path) or load(self, **kwargs))
    assert transmla_ext.evaluate(models, out, **options) == whole
    assert asked[3:] == [("TransMLALM", "local_letter")] * 2
    assert loaded == models[1:]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "absent"}, "absent is no directory with a config.json and no GGUF file"),
        ({"models": []}, "nothing to do"),
        ({"text_tokens": 0}, "nothing to do"),
        ({"sequence_length": 1}, "sequence_length >= 2"),
        ({"sequence_length": 1024}, "exceeds the 512 positions"),
        ({"text": ["short"]}, "text too short: give at least one sequence of 512 tokens"),
        ({"limit": 0}, "limit >= 1"),
        ({"num_fewshot": -1}, "num_fewshot must be >= 0"),
        ({"dtype": "float64"}, "dtype must be one of float32"),
        ({"include_path": "absent"}, "include_path absent is no directory"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    original: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments = {"models": original, "progress": False, **options}
    with pytest.raises((ValueError, CheckpointError), match=message):
        transmla_ext.evaluate(arguments.pop("models"), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_bad_models_are_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="named twice"):
        transmla_ext.evaluate([original, original])
    pickled = tmp_path / "pickled"
    shutil.copytree(original, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles are not read"):
        transmla_ext.evaluate(pickled)
    foreign = tmp_path / "foreign"
    shutil.copytree(original, foreign)
    config = json.loads((foreign / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": auto_map}))
    (foreign / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(CheckpointError, match="cannot be read"):
        transmla_ext.evaluate(foreign)


def test_data_that_cannot_be_had_are_an_error(original: Path, tasks: Path, tmp_path: Path) -> None:
    task = (tasks / "local_choice.yaml").read_text().replace("local_choice", "no_data").replace("validation.jsonl", "x")
    (tmp_path / "no_data.yaml").write_text(task)
    with pytest.raises(ValueError, match="the data of task 'no_data' cannot be loaded"):
        transmla_ext.evaluate(original, tasks=["no_data"], include_path=tmp_path, text_tokens=0)


def test_generation_that_this_model_does_not_do_is_refused(converted: Callable[[str], Path], tasks: Path) -> None:
    lm = harness.TransMLALM(converted("transmla"))
    for kwargs, message in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 512}, "leaves no room")):
        [task] = harness.load_tasks(["local_answer"], tasks, 0)
        task.loaded["tasks"]["local_answer"].set_config("generation_kwargs", kwargs, update=True)
        with pytest.raises(ValueError, match=message):
            harness.run_task(lm, task, limit=1, progress=False)


def test_without_lm_eval_perplexity_is_there_and_tasks_say_what_to_install(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "transmla_ext.evaluate.harness")
    monkeypatch.delattr(sys.modules["transmla_ext.evaluate"], "harness")
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    assert transmla_ext.evaluate(original, text=[TEST], sequence_length=64, progress=False).results
    with pytest.raises(ValueError, match=r"pip install 'transmla_ext\[eval\]'"):
        transmla_ext.evaluate(original, tasks=["paper"])


@pytest.mark.slow  # lm-evaluation-harness reads all its 14,000 tasks
def test_the_paper_s_tasks_are_lm_eval_s_and_other_names_get_the_nearest(original: Path) -> None:
    with pytest.raises(ValueError, match=r"has no task 'hellaswagg'; did you mean .*hellaswag"):
        transmla_ext.evaluate(original, tasks=["paper", "hellaswagg"])


def test_lm_eval_s_own_command_line_knows_the_model(
    converted: Callable[[str], Path], tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Neither its 14,000 tasks nor pip's list of packages, which take half a minute, are wanted here.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    model = f"--model transmla --model_args pretrained={converted('transmla')} --device cpu"
    command = f"lm-eval run {model} --tasks local_choice --include_path {tasks} --limit 2"
    monkeypatch.setattr(sys, "argv", command.split())
    runpy.run_module("transmla_ext.evaluate", run_name="__main__")
    assert "|acc_norm|" in capsys.readouterr().out
