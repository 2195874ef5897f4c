"""Healing: what it learns, what it leaves alone, that it resumes, and what it refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Text
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import transmla_ext
from transmla_ext.checkpoint import open_checkpoint, open_native
from transmla_ext.errors import CheckpointError, TransMLAError, UnsupportedModelError
from transmla_ext.heal import HealReport
from transmla_ext.heal.job import LossWeights, Schedule
from transmla_ext.heal.training import HealingTrainer, Teacher, make_student

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 64
CONVERT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "calibration_tokens": 512,
    "sequence_length": LENGTH,
    "refine_steps": 0,
    "progress": False,
}


@pytest.fixture
def paths(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A converted model and its original; the same ones in every test."""
    teacher = tiny_llama(tie_word_embeddings=True)
    student = teacher.with_name("converted")
    if not student.exists():
        transmla_ext.convert(teacher, student, **CONVERT)
    return student, teacher


@pytest.fixture
def options(topics_text: Text) -> dict[str, Any]:
    """32 steps of a sequence each, of 40 that the text has."""
    return {
        "text": [topics_text.calibration[:8000]],
        "test": [topics_text.held_out[:1000]],
        "tokens": 32 * LENGTH,
        "sequence_length": LENGTH,
        "training_arguments": {"save_steps": 8},
        "progress": False,
    }


def heal_with(losses: dict[int, Callable[[Tensor], Tensor]], *args: Any, **options: Any) -> HealReport:
    """transmla_ext.heal() with the losses of some steps replaced."""
    original = HealingTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        change = losses.get(self.state.global_step + 1, lambda loss: loss)
        return original(self, lambda **x: {"loss": change(model(**x)["loss"])}, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingTrainer, "compute_loss", compute_loss)
        return transmla_ext.heal(*args, **options)


def kill(loss: Tensor) -> Tensor:
    raise KeyboardInterrupt


def never(loss: Tensor) -> Tensor:
    raise AssertionError("a step that a resumed run has behind it")


def weights(model: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@torch.no_grad()
def divergence(teacher: Path, student: Path, tokens: Tensor) -> float:
    """Mean KL(teacher ‖ student), by transformers."""
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits.log_softmax(-1)
        for path in (teacher, student)
    )
    return float(F.kl_div(log_q, log_p, reduction="sum", log_target=True) / tokens.numel())


def test_healing_comes_nearer_to_the_original_on_other_text(
    paths: tuple[Path, Path], options: dict[str, Any], topics_text: Text, tmp_path: Path
) -> None:
    student, teacher = paths
    report = transmla_ext.heal(
        student, teacher, tmp_path / "out", **options, trainable="all", ce_weight=0, learning_rate=0.005
    )
    unseen = torch.tensor([open_native(student).tokenizer()(topics_text.held_out[1000:3000]).input_ids[:512]])
    assert divergence(teacher, tmp_path / "out", unseen) < 0.9 * divergence(teacher, student, unseen)
    assert report.tokens == 32 * LENGTH
    assert json.loads((tmp_path / "out" / "heal_report.json").read_text())["steps"] == 32
    assert transmla_ext.load(tmp_path / "out").generate(["while True:"], max_new_tokens=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("trainable", "trained", "dtype"),
    [("attention", ".self_attn.", torch.float32), ("mla", ".kv_", torch.bfloat16), ("all", "", torch.float32)],
)
def test_only_what_is_trained_changes(
    tiny_llama: Callable[..., Path],
    options: dict[str, Any],
    tmp_path: Path,
    trainable: Any,
    trained: str,
    dtype: torch.dtype,
) -> None:
    teacher = tiny_llama(dtype=dtype)
    transmla_ext.convert(teacher, tmp_path / "mla", **CONVERT)
    short = {**options, "tokens": 2 * LENGTH, "learning_rate": 0.05}
    transmla_ext.heal(tmp_path / "mla", teacher, tmp_path / "out", **short, trainable=trainable)
    before, after = weights(tmp_path / "mla"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == dtype
        assert torch.equal(after[name], tensor) == (trained not in name), name


@pytest.mark.parametrize(("model_type", "top_k"), [("gemma2", None), ("granite", 299), ("qwen3", None)])
def test_the_chunked_loss_and_its_gradients_are_those_of_all_logits(
    tiny_model: Callable[..., Path], tmp_path: Path, model_type: str, top_k: int | None
) -> None:
    """With soft-capped, scaled and plain logits, a tied head that is trained, and more tokens than a chunk."""
    teacher_path = tiny_model(model_type, tie_word_embeddings=True)
    transmla_ext.convert(teacher_path, tmp_path / "mla", **CONVERT)
    checkpoint = open_native(tmp_path / "mla")
    teacher = Teacher(open_checkpoint(teacher_path), torch.float32, torch.device("cpu"))
    tokens = torch.randint(300, (3, 70))
    hidden = teacher.hidden(tokens)[:, :-1]
    log_p = teacher.log_p(hidden)
    targets: dict[str, Tensor] = {"teacher_hidden": hidden}
    if top_k is not None:
        top_log_p, top_ids = log_p.topk(top_k)
        targets = {"top_ids": top_ids.int(), "top_log_p": top_log_p}
    student = make_student(
        checkpoint, lambda name: True, LossWeights(0.7, 0.2), teacher.log_p if top_k is None else None
    )
    loss = student(input_ids=tokens, **targets)["loss"]
    loss.backward()

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "mla", dtype=torch.float32)
    log_q = plain(tokens).logits[:, :-1].log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_q[..., 0].numel()
    expected = 0.7 * kl + 0.2 * F.cross_entropy(log_q.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_few_of_the_teacher_s_tokens_bound_the_divergence(paths: tuple[Path, Path]) -> None:
    """All others count as one outcome: the divergence is smaller, grows with their number, and is zero of equals."""
    student, path = paths
    teacher = Teacher(open_checkpoint(path), torch.float32, torch.device("cpu"))
    tokens = torch.randint(300, (1, LENGTH))
    log_p = teacher.log_p(teacher.hidden(tokens)[:, :-1])
    healing = make_student(open_native(student), lambda name: False, LossWeights(1, 0), None)

    def loss(log_p: Tensor, top_k: int) -> float:
        top_log_p, top_ids = log_p.topk(top_k)
        return float(healing(input_ids=tokens, top_ids=top_ids.int(), top_log_p=top_log_p)["loss"].detach())

    losses = [loss(log_p, top_k) for top_k in (1, 8, 64, 299)]
    assert losses == sorted(losses)
    assert 0 < losses[0] < losses[-1]
    own = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)(tokens).logits[:, :-1].log_softmax(-1)
    assert loss(own, 8) == pytest.approx(0, abs=1e-6)


def test_both_formats_say_the_same(paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path) -> None:
    for format in ("transmla", "deepseek_v3"):
        transmla_ext.heal(*paths, tmp_path / format, **options, format=format, teacher_top_k=32)
    tokens = torch.randint(300, (2, LENGTH))
    assert divergence(tmp_path / "transmla", tmp_path / "deepseek_v3", tokens) < 1e-6
    assert divergence(paths[0], tmp_path / "deepseek_v3", tokens) > 1e-3


def test_a_killed_run_resumes_to_the_same_weights(
    paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    """From the last checkpoint, and from the one before if the last was being written."""
    uninterrupted = transmla_ext.heal(*paths, tmp_path / "once", **options)
    with pytest.raises(KeyboardInterrupt):
        heal_with({20: kill}, *paths, tmp_path / "twice", **options)
    work = tmp_path / "twice.partial" / "training"
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-8"]
    (work / "checkpoint-16" / "trainer_state.json").unlink()
    (work / "checkpoint-16" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        heal_with({8: never, 27: kill}, *paths, tmp_path / "twice", **options)
    resumed = heal_with({24: never}, *paths, tmp_path / "twice", **options)
    assert resumed == uninterrupted
    once = weights(tmp_path / "once")
    assert all(torch.equal(tensor, once[name]) for name, tensor in weights(tmp_path / "twice").items())
    assert not (tmp_path / "twice.partial").exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TransMLAError) as raised:  # right behind checkpoint-16, whose weights then are no better
        heal_with({17: lambda loss: loss * math.inf}, *paths, tmp_path / "out", **options)
    for word in ("loss is inf", "step 17", "sequence ", "checkpoint-8 is kept", "--learning-rate"):
        assert word in str(raised.value)
    kept = tmp_path / "out.partial" / "training"
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-8"]
    heal_with({8: never}, *paths, tmp_path / "out", **options, learning_rate=0.001)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_loss_that_is_no_number_at_once_leaves_nothing(
    paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TransMLAError, match=r"step 1, .*no checkpoint yet"):
        heal_with({1: lambda loss: loss * math.nan}, *paths, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_the_tokens_is_repeated(
    paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    report = transmla_ext.heal(*paths, tmp_path / "out", **{**options, "text": [options["text"][0][:1000]]})
    assert report.text_tokens < report.tokens == 32 * LENGTH


def test_a_dataset_is_streamed(paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": options["text"][0][start : start + 500]} for start in range(0, 8000, 500)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = transmla_ext.heal(*paths, tmp_path / "out", **{**options, "text": str(tmp_path / "in"), "tokens": 256})
    assert report.text_tokens == report.tokens == 256


def test_without_a_test_text_the_beginning_is_held_out(
    paths: tuple[Path, Path], options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        heal_with({1: kill}, *paths, tmp_path / "out", **{**options, "test": None})
    trained_on = torch.from_file(
        str(tmp_path / "out.partial" / "training" / "tokens.bin"), size=32 * LENGTH, dtype=torch.int32
    )
    ids = open_native(paths[0]).tokenizer()(options["text"][0]).input_ids
    held_out = len(ids) // LENGTH // 8
    assert trained_on.tolist() == ids[held_out * LENGTH :][: 32 * LENGTH]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"text": ["too short"]}, ValueError, ["text too short", "1 are needed", "lower sequence_length"]),
        ({"text": ["too short"], "test": None}, ValueError, ["2 are needed", "one to judge by"]),
        ({"test": ["too short"]}, ValueError, ["test text too short"]),
        ({"text": "no-such-file.txt"}, ValueError, ["no-such-file.txt"]),
        ({"preset": "large"}, ValueError, ["preset", "small, paper", "'large'"]),
        ({"trainable": "some"}, ValueError, ["trainable", "all, attention, mla", "'some'"]),
        ({"schedule": "linear"}, ValueError, ["schedule", "cosine, constant"]),
        ({"format": "gguf"}, ValueError, ["format", "'gguf'"]),
        ({"device": "tpu"}, ValueError, ["device", "cpu, cuda", "'tpu'"]),
        ({"dtype": "float16"}, ValueError, ["dtype", "float32, bfloat16"]),
        ({"tokens": 0}, ValueError, ["tokens", "got 0"]),
        ({"sequence_length": 4096}, ValueError, ["sequence_length=4096", "512 positions"]),
        ({"learning_rate": -1.0}, ValueError, ["learning_rate", "-1.0"]),
        ({"learning_rate": math.inf}, ValueError, ["learning_rate", "inf"]),
        ({"kl_weight": 0, "ce_weight": 0}, ValueError, ["kl_weight", "got 0 and 0"]),
        ({"teacher_top_k": 300}, ValueError, ["teacher_top_k", "from 1 to 299", "got 300"]),
        ({"training_arguments": {"max_steps": 3}}, ValueError, ["training_arguments", "sets max_steps"]),
        ({"training_arguments": {"no_such": 3}}, ValueError, ["training_arguments", "no_such"]),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(
    paths: tuple[Path, Path],
    options: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: list[str],
) -> None:
    with pytest.raises(error) as raised:
        transmla_ext.heal(*paths, tmp_path / "out", **{**options, **changes})
    for word in words:
        assert word in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_bad_models_are_refused_and_leave_nothing(
    paths: tuple[Path, Path], options: dict[str, Any], tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    student, teacher = paths
    (tmp_path / "in").mkdir()
    stock, uneven, relabelled = (tmp_path / "in" / name for name in ("stock", "uneven", "relabelled"))
    transmla_ext.convert(teacher, stock, **CONVERT, format="deepseek_v3")
    shutil.copytree(student, uneven)
    config = json.loads((uneven / "config.json").read_text())
    config["mla"][1]["rope_slots"] = [7, 6, 5, 3]
    (uneven / "config.json").write_text(json.dumps(config))
    shutil.copytree(teacher, relabelled)
    tokenizer = json.loads((relabelled / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = (
        tokenizer["model"]["vocab"][token] for token in "ba"
    )
    (relabelled / "tokenizer.json").write_text(json.dumps(tokenizer))

    cases: list[tuple[Path, Path, dict[str, Any], type[Exception], str]] = [
        (student, tiny_llama(vocab_size=320), {}, TransMLAError, "another vocabulary, 320 tokens and not 300"),
        (student, relabelled, {}, TransMLAError, "another vocabulary: 'a' is token"),
        (stock, teacher, {}, UnsupportedModelError, "transmla convert MODEL OUT"),
        (teacher, teacher, {}, UnsupportedModelError, "convert it first"),
        (student, student, {}, UnsupportedModelError, "has multi-head latent attention already"),
        (tmp_path / "absent", teacher, {}, CheckpointError, "no config.json"),
        (student, tmp_path / "absent", {}, CheckpointError, "does not exist"),
        (uneven, teacher, {"format": "deepseek_v3"}, UnsupportedModelError, "RoPE frequencies"),
    ]
    for model, its_teacher, changes, error, words in cases:
        with pytest.raises(error, match=words):
            transmla_ext.heal(model, its_teacher, tmp_path / "out", **{**options, **changes})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        transmla_ext.heal(*paths, tmp_path / "full", **options)
    with pytest.raises(ValueError, match="would be lost"):
        transmla_ext.heal(*paths, student.parent, **options, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]


def test_stages_follow_one_another() -> None:
    paper = Schedule((1e-4, 2e-5), "cosine")
    rates = [paper.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-4 / 50)
    assert max(rates) == pytest.approx(1e-4, rel=0.02)
    assert rates[500] == pytest.approx(2e-5)
    assert rates[500:] == sorted(rates[500:], reverse=True)
    assert rates[-1] < 1e-9
    flat = Schedule((1e-4, 2e-5), "constant")
    assert {flat.rate(step, 1000) for step in range(50, 1000)} == {1e-4, 2e-5}


@pytest.mark.slow
def test_two_processes_with_fsdp_match_one(
    paths: tuple[Path, Path], options: dict[str, Any], topics_text: Text, tmp_path: Path
) -> None:
    steps = {**options, "tokens": 16 * LENGTH, "training_arguments": {"logging_steps": 1, "save_steps": 3}}
    one = transmla_ext.heal(*paths, tmp_path / "one", **steps, trainable="all", gradient_accumulation_steps=2)

    for name in ("text", "test"):
        (tmp_path / f"{name}.txt").write_text(options[name][0])
    (tmp_path / "fsdp.json").write_text(json.dumps({**steps["training_arguments"], "fsdp": True}))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [Path(__file__).with_name("fsdp_on_cpu.py"), "heal", *paths, tmp_path / "two", "--quiet"]
    command += ["--text", tmp_path / "text.txt", "--test", tmp_path / "test.txt", "--tokens", 16 * LENGTH]
    command += ["--sequence-length", LENGTH, "--trainable", "all", "--training-arguments", tmp_path / "fsdp.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr

    two = json.loads((tmp_path / "two" / "heal_report.json").read_text())
    assert two["steps"] == one.steps == 8
    assert {int(step): loss for step, loss in two["loss"].items()} == pytest.approx(one.loss, rel=1e-5)
    converted, sharded = weights(paths[0]), weights(tmp_path / "two")
    for name, expected in weights(tmp_path / "one").items():
        change = (expected - converted[name]).norm()
        assert change > 0, name
        assert (sharded[name] - expected).norm() < 1e-2 * change, name
