"""The command line: transmla models, plan, convert, compare, heal, eval, generate, serve, env."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .capacity import GPUS
from .errors import TransMLAError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Convert GQA/MHA language models to Multi-head Latent Attention, and run them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class FormatName(str, Enum):
    transmla = "transmla"
    deepseek_v3 = "deepseek_v3"
    deepseek_v2 = "deepseek_v2"


class MethodName(str, Enum):
    auto = "auto"
    transmla = "transmla"


class PresetName(str, Enum):
    small = "small"
    paper = "paper"


class ScheduleName(str, Enum):
    cosine = "cosine"
    constant = "constant"


class TrainableName(str, Enum):
    all = "all"
    attention = "attention"
    mla = "mla"


class ComputeDTypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class DTypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# What several commands take.
Source = Annotated[Path, typer.Argument(help="Directory of config.json and safetensors, or a GGUF file.")]
RopeDim = Annotated[int | None, typer.Option(help="Numbers of the shared RoPE key. \\[default: the most up to 64]")]
OutputFormat = Annotated[FormatName, typer.Option(help="Native, or what unmodified engines load.")]
Seed = Annotated[int, typer.Option(help="Of the refinement's batches.")]
Calibration = Annotated[
    str | None, typer.Option(help="Text file or `datasets` name. \\[default: text that comes with Python]")
]
CalibrationTokens = Annotated[int, typer.Option(help="Tokens to calibrate on.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per calibration sequence.")]
Device = Annotated[str, typer.Option(help="Where to compute.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Layers = Annotated[int | None, typer.Option(help="Take the first so many layers for the whole model: a trial.")]


def _int_or(text: str, words: tuple[str, ...], option: str) -> int | str:
    if text in words:
        return text
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"give a number, or one of: {', '.join(words)}; got '{text}'", param_hint=option)


@app.command()
def models() -> None:
    """List the model families that are converted, and what of each has no place in a stock checkpoint."""
    from rich.table import Table

    from .architectures import support_table

    headings, *rows = support_table()
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@app.command(
    epilog="Examples:\n\n"
    "  transmla convert Llama-2-7b-hf out/ --kv-lora-rank 512 --qk-rope-head-dim 64 --dry-run\n\n"
    "  transmla convert SmolLM2-135M-Instruct.Q4_1.gguf out/ --kv-lora-rank 88 --qk-rope-head-dim 32\n\n"
    "  transmla convert Llama-2-7b-hf out/ --format deepseek_v3   # for unmodified vLLM, SGLang, transformers\n\n"
    "  torchrun --nproc-per-node 8 -m transmla_ext convert Llama-2-7b-hf out/ --calibration-tokens 1000000"
)
def convert(
    model: Source,
    out: Annotated[Path, typer.Argument(help="Directory to write; appears when it is complete.")],
    kv_lora_rank: Annotated[
        str,
        typer.Option(help="Numbers of the latent per token; 'full': nothing lost; 'auto': each layer's own."),
    ] = "512",
    qk_rope_head_dim: RopeDim = None,
    q_lora_rank: Annotated[int | None, typer.Option(help="Factor the query projection too, to this rank.")] = None,
    cache_bytes: Annotated[
        int | None, typer.Option(help="For --kv-lora-rank auto: what a token may take, all layers together.")
    ] = None,
    format: OutputFormat = FormatName.transmla,
    method: Annotated[
        MethodName, typer.Option(help="Bases that know what reads them, or TransMLA's.")
    ] = MethodName.auto,
    freqfold: Annotated[str, typer.Option(help="RoPE frequencies folded into one, or 'auto'.")] = "auto",
    refine_steps: Annotated[
        int | None,
        typer.Option(help="Training steps of each layer and window. \\[default: 250; none with method transmla]"),
    ] = None,
    refine_window: Annotated[int, typer.Option(help="Layers refined together; fewer take less memory.")] = 6,
    seed: Seed = 0,
    calibration: Calibration = None,
    test: Annotated[
        str | None, typer.Option(help="Text to judge by, likewise. \\[default: calibration text held out]")
    ] = None,
    calibration_tokens: CalibrationTokens = 32768,
    sequence_length: SequenceLength = 512,
    layers: Layers = None,
    dtype: Annotated[DTypeName | None, typer.Option(help="Of the written weights. \\[default: the model's]")] = None,
    pad_to_engine: Annotated[
        bool | None,
        typer.Option(help="Stock formats: pad to the shapes that engines' kernels take. \\[default: if free]"),
    ] = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output directory.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: shapes, cache bytes, memory; stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a GQA/MHA model to MLA. A killed run resumes when the same command is given again."""
    from .convert import ConversionOptions, group
    from .convert import convert as run
    from .convert import dry_run as describe

    options = ConversionOptions(
        kv_lora_rank=_int_or(kv_lora_rank, ("full", "auto"), "--kv-lora-rank"),  # type: ignore[typeddict-item]
        qk_rope_head_dim=qk_rope_head_dim,
        q_lora_rank=q_lora_rank,
        cache_bytes=cache_bytes,
        format=format.value,
        method=method.value,
        freqfold=_int_or(freqfold, ("auto",), "--freqfold"),  # type: ignore[typeddict-item]
        refine_steps=refine_steps,
        refine_window=refine_window,
        seed=seed,
        calibration_tokens=calibration_tokens,
        sequence_length=sequence_length,
        layers=layers,
        dtype=dtype.value if dtype else None,
        pad_to_engine=pad_to_engine,
    )
    console = Console()
    if dry_run:
        console.print(describe(model, **options).table())
        return
    with group.joined():
        report = run(
            model,
            out,
            calibration=calibration,
            test=test,
            device=device,
            overwrite=overwrite,
            progress=not quiet,
            **options,
        )
        if not group.is_first():
            return
    console.print(report.table())
    console.print(f"written to {out}; try: transmla generate {out} 'Once upon a time'", highlight=False)


@app.command(
    epilog="Examples:\n\n"
    "  transmla compare SmolLM2-135M-Instruct.Q4_1.gguf out/ --kv-lora-rank 88 --qk-rope-head-dim 32\n\n"
    "  transmla compare Llama-2-7b-hf out/ --layers 4 --calibration manual.txt --test essays.txt   # a trial\n\n"
    "  transmla generate out/auto 'Once upon a time'"
)
def compare(
    model: Source,
    out: Annotated[Path, typer.Argument(help="Directory to write: compare.{json,md,png} and the models.")],
    kv_lora_rank: Annotated[int, typer.Option(help="Numbers of the latent per token.")] = 512,
    qk_rope_head_dim: RopeDim = None,
    format: OutputFormat = FormatName.transmla,
    refine_steps: Annotated[
        int | None, typer.Option(help="Training steps of each layer and window, where refined. \\[default: convert's]")
    ] = None,
    seed: Seed = 0,
    calibration: Calibration = None,
    test: Annotated[
        str | None, typer.Option(help="Text to judge by, likewise. \\[default: the calibration text's last quarter]")
    ] = None,
    calibration_tokens: CalibrationTokens = 32768,
    sequence_length: SequenceLength = 512,
    layers: Layers = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Convert a model by TransMLA's method and by this package's, ingredient by ingredient, and compare what is lost.

    A killed run resumes when the same command is given again.
    """
    from .convert import compare as run

    comparison = run(
        model,
        out,
        calibration=calibration,
        test=test,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        format=format.value,
        refine_steps=refine_steps,
        seed=seed,
        calibration_tokens=calibration_tokens,
        sequence_length=sequence_length,
        layers=layers,
        device=device,
        progress=not quiet,
    )
    console = Console()
    console.print(comparison.table())
    console.print(f"written to {out}; try: transmla generate {out / 'auto'} 'Once upon a time'", highlight=False)


@app.command(
    "eval",
    epilog="Examples:\n\n"
    "  transmla eval Llama-2-7b-hf llama-mla   # perplexity, on text that comes with Python\n\n"
    "  transmla eval Llama-2-7b-hf llama-mla --out eval/ --tasks paper --text essays.txt\n\n"
    "  transmla eval llama-mla --tasks my_task --include-path my_tasks/ --limit 100",
)
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Converted models, and any that transformers runs: directories or GGUF files.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory to write: eval.{json,md,png}. Makes a killed run resumable.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text file or `datasets` name. \\[default: last quarter of Python's own text]")
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text at most; 0: no perplexity.")] = 32768,
    sequence_length: Annotated[int, typer.Option(help="Tokens of each piece of the text.")] = 512,
    tasks: Annotated[
        str, typer.Option(help="Of lm-evaluation-harness, with commas between; 'paper': those of TransMLA's paper.")
    ] = "",
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in front of each question. \\[default: the task's]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task. \\[default: all]")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of tasks of one's own, in YAML.")] = None,
    dtype: Annotated[DTypeName | None, typer.Option(help="To compute in. \\[default: each checkpoint's]")] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure perplexity and benchmark scores, models side by side.

    With --out, a killed run resumes when the same command is given again.
    """
    from .evaluate import evaluate as run

    evaluation = run(
        models,
        out,
        text=text,
        text_tokens=text_tokens,
        sequence_length=sequence_length,
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        num_fewshot=num_fewshot,
        limit=limit,
        include_path=include_path,
        dtype=dtype.value if dtype else None,
        device=device,
        progress=not quiet,
    )
    console = Console()
    console.print(evaluation.table())
    if out is not None:
        console.print(f"written to {out}", highlight=False)


@app.command(
    epilog="Examples:\n\n"
    "  transmla heal out/ SmolLM2-135M-Instruct.Q4_1.gguf healed/ --text manual.txt\n\n"
    "  transmla heal out/ Llama-2-7b-hf healed/ --text HuggingFaceFW/fineweb-edu --tokens 100000000 --device cuda\n\n"
    "  torchrun --nproc-per-node 8 -m transmla_ext heal out/ Llama-2-7b-hf healed/ --preset paper --device cuda \\\n\n"
    '      --training-arguments fsdp.json   # {"fsdp": true, "save_steps": 500}, or {"deepspeed": "zero2.json"}'
)
def heal(
    model: Annotated[Path, typer.Argument(help="A converted model in the native format.")],
    teacher: Annotated[Path, typer.Argument(help="What it was converted from, or another with its vocabulary.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; appears when it is complete.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text file or `datasets` name to train on. \\[default: text that comes with Python]"),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Text to judge by, likewise. \\[default: the beginning of the text]")
    ] = None,
    preset: Annotated[
        PresetName, typer.Option(help="Small, for a CPU or a first look, or the TransMLA paper's.")
    ] = PresetName.small,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. \\[default: the preset's]")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sequence. \\[default: the preset's]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences that a process computes at once. \\[default: the preset's]")
    ] = None,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches before each step.")] = 1,
    learning_rate: Annotated[
        list[float] | None,
        typer.Option(help="Peak of each stage, repeated for several. \\[default: the preset's]"),
    ] = None,
    schedule: Annotated[
        ScheduleName | None, typer.Option(help="Of the rate, after a warm-up. \\[default: the preset's]")
    ] = None,
    trainable: Annotated[
        TrainableName | None,
        typer.Option(help="All weights, the attention, or MLA's factors. \\[default: the preset's]"),
    ] = None,
    kl_weight: Annotated[float, typer.Option(help="Of the divergence from the teacher in the loss.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Of the text's cross-entropy in the loss.")] = 0.1,
    dtype: Annotated[
        ComputeDTypeName | None, typer.Option(help="To multiply matrices in. \\[default: bfloat16, float32 on a CPU]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False,
    teacher_top_k: Annotated[
        int | None, typer.Option(help="Compute the teacher's likeliest tokens once, and keep so many on disk.")
    ] = None,
    format: OutputFormat = FormatName.transmla,
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
    device: Device = "cpu",
    training_arguments: Annotated[
        Path | None, typer.Option(help="JSON file of others of transformers.TrainingArguments: fsdp, deepspeed, ...")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a non-empty output directory.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a converted model to predict what the original predicts. A killed run resumes by the same command."""
    from .convert import group
    from .heal import heal as run

    with group.joined():
        report = run(
            model,
            teacher,
            out,
            text=text,
            test=test,
            preset=preset.value,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            learning_rate=learning_rate,
            schedule=schedule.value if schedule else None,
            trainable=trainable.value if trainable else None,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            dtype=dtype.value if dtype else None,
            gradient_checkpointing=gradient_checkpointing,
            teacher_top_k=teacher_top_k,
            format=format.value,
            seed=seed,
            device=device,
            training_arguments=_json_object(training_arguments) if training_arguments else None,
            overwrite=overwrite,
            progress=not quiet,
        )
        if not group.is_first():
            return
    console = Console()
    console.print(report.table())
    console.print(f"written to {out}; try: transmla generate {out} 'Once upon a time'", highlight=False)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object, which is what TrainingArguments are read from")
    return value


@app.command(epilog="Example:\n\n  transmla generate out/ 'The capital of France is' --max-new-tokens 32")
def generate(
    model: Annotated[Path, typer.Argument(help="A converted model, of either format.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    dtype: Annotated[DTypeName | None, typer.Option(help="To compute in. \\[default: the checkpoint's]")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a prompt with a converted model, on this package's kernels."""
    import torch

    from .runtime import load

    text = sys.stdin.read() if prompt == "-" else prompt
    engine = load(model, dtype=getattr(torch, dtype.value) if dtype else None, device=device)
    if chat:
        messages = [{"role": "user", "content": text}]
        text = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for piece in engine.stream(
        text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(
    epilog="Examples:\n\n"
    "  transmla serve out/ --port 8000\n\n"
    "  transmla serve out/ --host 0.0.0.0 --api-key-file keys.txt --max-batch-size 64 --cache-tokens 200000\n\n"
    "  curl localhost:8000/v1/completions -H 'Content-Type: application/json'"
    """ -d '{"model": "out", "prompt": "Once upon a time", "max_tokens": 32, "stream": true}'"""
)
def serve(
    model: Annotated[Path, typer.Argument(help="A converted model, of either format.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model. \\[default: its directory's name]")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; requests must have one of them. \\[default: none needed]")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get status 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens that an answer may have.")] = 4096,
    max_body_bytes: Annotated[int, typer.Option(help="Bytes that a request may have.")] = 4 << 20,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens in the cache, all requests together. \\[default: half the memory]")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to the end of its answer.")] = 600.0,
    grace_period: Annotated[float, typer.Option(help="Seconds to finish running answers on SIGTERM.")] = 30.0,
    dtype: Annotated[DTypeName | None, typer.Option(help="To compute in. \\[default: the checkpoint's]")] = None,
    device: Device = "cpu",
) -> None:
    """Serve a converted model to OpenAI clients: completions, chat, streams, log probabilities; /health, /metrics."""
    try:
        from .serve import serve as run
    except ModuleNotFoundError as error:
        if error.name not in ("anyio", "fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn"):
            raise
        raise ValueError(f"serve needs {error.name}: pip install 'transmla_ext[serve]'") from None
    run(
        model,
        host=host,
        port=port,
        model_name=served_model_name,
        api_key_file=api_key_file,
        max_body_bytes=max_body_bytes,
        max_tokens=max_tokens,
        max_queue=max_queue,
        max_batch_size=max_batch_size,
        timeout=timeout,
        grace_period=grace_period,
        cache_tokens=cache_tokens,
        dtype=dtype.value if dtype else None,
        device=device,
    )


@app.command(
    epilog="Examples:\n\n"
    "  transmla plan Llama-2-7b-hf\n\n"
    "  transmla plan Llama-3.1-8B/config.json --gpu A100-80GB --context 32768 --candidate 512+64 --candidate 192+64\n\n"
    "  transmla plan Mixtral-8x7B-v0.1 --gpu 48,864,181 --tensor-parallel 4 --json"
)
def plan(
    model: Annotated[Path, typer.Argument(help="config.json, or a directory that has one; no weight is read.")],
    gpu: Annotated[str, typer.Option(help=f"{', '.join(GPUS)}, or 'GB,GB/s,TFLOP/s'.")] = "H100",
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 8192,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="kv_lora_rank+qk_rope_head_dim; may be repeated. \\[default: 512+64, cuts of 50 to 93 %]"),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Predict cache, batch, context and decode speed of a model before and after conversion."""
    from .capacity import plan as predict

    result = predict(model, gpu=gpu, context=context, candidates=candidate or (), tensor_parallel=tensor_parallel)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else result)


@app.command()
def env() -> None:
    """Report versions, build and CPU: paste it into a bug report."""
    from .env import report

    typer.echo(report())


def main() -> None:
    """Entry point: a bad argument or model is one line on standard error and exit status 2."""
    try:
        app()
    except (TransMLAError, ValueError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
