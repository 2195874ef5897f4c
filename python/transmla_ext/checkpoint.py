"""Checkpoints on disk: a lazy reader (safetensors, GGUF) and a staging directory that becomes the output at once."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .architectures import base_model_type, family
from .errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "Staging",
    "check_out_path",
    "check_shape",
    "expected_shapes",
    "file_identity",
    "load_transformers",
    "open_checkpoint",
    "open_native",
    "read_config",
    "skeleton",
    "staging",
]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INDEX = "model.safetensors.index.json"
_RESUME = "resume.json"


class Checkpoint(ABC):
    """A model on disk, its tensors read one at a time under the names transformers gives them."""

    path: Path
    config: PretrainedConfig
    expected: dict[str, tuple[int, ...]]  # name and shape of every weight that transformers' model has
    shapes: dict[str, tuple[int, ...]]  # and of what the files hold
    dtype: torch.dtype  # of the weights; what a conversion writes unless told otherwise

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU; the file is closed again."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @abstractmethod
    def identity(self) -> list[tuple[str, int, int]]:
        """(name, bytes, modification time in ns) of the files behind it: a resumed run must see the same."""


def open_checkpoint(path: str | Path, *, num_layers: int | None = None) -> Checkpoint:
    """A local directory of config.json and safetensors, or a GGUF file, of a supported family; no code of it is run.

    Args:
        num_layers: take the first so many decoder layers for the whole model.
    """
    path = Path(path)
    if path.is_dir():
        return _SafetensorsCheckpoint(path, read_config(path), num_layers)
    if path.is_file() and path.suffix == ".gguf":
        return _GgufCheckpoint(path, num_layers)
    if path.is_file():
        raise CheckpointError(f"{path} is neither a directory of safetensors nor a .gguf file")
    raise CheckpointError(f"{path} does not exist; give a local directory of safetensors or a .gguf file")


def load_transformers(path: Path, dtype: torch.dtype | str | None) -> PreTrainedModel:
    """transformers' model of a directory with safetensors, or of a GGUF file; no code of it is run.

    Args:
        dtype: of the weights; None takes the checkpoint's.
    Raises:
        CheckpointError: it cannot be read, or lacks weights, which transformers would make up, or has strange ones.
    """
    from transformers import AutoModelForCausalLM

    is_gguf = path.suffix == ".gguf"
    source = {"gguf_file": path.name} if is_gguf else {"use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent if is_gguf else path,
            dtype=dtype or "auto",
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **source,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys"):
        # Old checkpoints carry RoPE's constants.
        if names := sorted(name for name in info[problem] if not name.endswith(".inv_freq")):
            raise CheckpointError(f"{path}: {problem.replace('_', ' ')}: {', '.join(names)}")
    return model  # type: ignore[no-any-return]


def open_native(path: str | Path) -> Checkpoint:
    """A converted model: a local directory in the native format; no code of it is run."""
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json: expected the directory of a finished conversion")
    model_type = _model_type(file)
    if model_type.startswith("deepseek_v"):
        raise UnsupportedModelError(
            f"{path} is in the stock format, {model_type}, which has lost what the native one knows; convert the "
            "original again without --format: transmla convert MODEL OUT"
        )
    if base_model_type(model_type) is None:
        raise UnsupportedModelError(
            f"{path}: model type '{model_type}' has no latent attention; convert it first: transmla convert {path} OUT"
        )
    return _SafetensorsCheckpoint(path, _auto_config(file), None)


def read_config(path: str | Path) -> PretrainedConfig:
    """The config of a supported family, from a directory with a config.json or from that file; no code of it is run."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a local directory with a config.json, or that file")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json, so it is no complete model")
    return _read_config(file, _model_type(file))


class _SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path, config: PretrainedConfig, num_layers: int | None) -> None:
        self.path = path
        self.config = config
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError(f"{path} is quantised; convert the original bf16, fp16 or fp32 checkpoint")
        _truncate(self.config, num_layers)
        self.expected = expected_shapes(self.config)
        self._files = self._weight_map()
        stored, dtypes = {}, {}
        for file in sorted(set(self._files.values())):
            with _open_shard(file) as shard:
                for name in shard.keys():  # noqa: SIM118  (not a mapping)
                    view = shard.get_slice(name)
                    stored[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        if missing := [name for name in self._files if name not in stored]:
            raise CheckpointError(f"{path}: {_INDEX} names tensors that no shard holds: {_some(missing)}")
        if strange := [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _DTYPES]:
            raise CheckpointError(f"{path}: weights must be one of {', '.join(_DTYPES)}; {_some(strange)}")
        # Old checkpoints of 16 bits carry RoPE's constants, which are no weights, in 32.
        of_weights = sorted({dtype for name, dtype in dtypes.items() if not name.endswith(".inv_freq")})
        self.dtype = max(
            (_DTYPES[dtype] for dtype in of_weights), key=lambda dtype: dtype.itemsize, default=torch.float32
        )
        self._sources, self.shapes = self._assembled(stored)

    def _assembled(
        self, stored: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, str | list[list[str]]], dict[str, tuple[int, ...]]]:
        """Where every tensor is, under the names of transformers, which stacks the experts of a layer; their shapes."""
        model_type = self.config.model_type
        architecture, rest = family(base_model_type(model_type) or model_type), dict(stored)
        sources: dict[str, str | list[list[str]]] = {}
        shapes = {}
        for name, expected in self.expected.items():
            source = name if name in stored else architecture.stored(name, self.config)
            if not isinstance(source, str):
                for part in (part for parts in source for part in parts):
                    check_shape(self.path, part, rest.pop(part, None), (expected[1] // len(source[0]), *expected[2:]))
                sources[name], shapes[name] = source, expected
            elif source in stored:
                sources[name], shapes[name] = source, rest.pop(source)
        dropped = re.compile(r"model\.layers\.(\d+)\.")
        for name, shape in rest.items():
            layer = dropped.match(name)
            if layer is None or int(layer[1]) < self.config.num_hidden_layers:
                sources[name], shapes[name] = name, shape
        return sources, shapes

    def _weight_map(self) -> dict[str, Path]:
        path = self.path
        if (path / _INDEX).is_file():
            try:
                weight_map = json.loads((path / _INDEX).read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{path / _INDEX} is not a shard index: {error}") from error
            files = {name: path / file for name, file in weight_map.items()}
            if absent := sorted({file.name for file in files.values() if not file.is_file()}):
                raise CheckpointError(f"{path} lacks {_some(absent)}, named by {_INDEX}; download the model again")
            return files
        single = path / "model.safetensors"
        if not single.is_file():
            if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)):
                raise CheckpointError(
                    f"{path} holds pickles ({_some(pickles)}), which can run code and are not read; "
                    "save the model as safetensors first"
                )
            raise CheckpointError(f"{path} has neither model.safetensors nor {_INDEX}")
        with _open_shard(single) as shard:
            return dict.fromkeys(shard.keys(), single)

    def tensor(self, name: str) -> Tensor:
        source = self._sources[name]
        if isinstance(source, str):
            return self._stored(source)
        stacked = torch.empty(self.shapes[name], dtype=self.dtype)
        for expert, parts in zip(stacked, source, strict=True):
            torch.cat([self._stored(part).to(self.dtype) for part in parts], out=expert)
        return stacked

    def _stored(self, name: str) -> Tensor:
        with _open_shard(self._files[name]) as shard:
            # The clone leaves the memory map, so that its pages do not stay resident.
            tensor: Tensor = shard.get_tensor(name).clone()
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _read_tokenizer(self.path)

    def identity(self) -> list[tuple[str, int, int]]:
        return [file_identity(file) for file in (self.path / "config.json", *sorted(set(self._files.values())))]


class _GgufCheckpoint(Checkpoint):
    def __init__(self, path: Path, num_layers: int | None) -> None:
        import gguf

        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or no GGUF file: {error}") from error
        architecture = reader.fields["general.architecture"].contents()
        if architecture != "llama":
            raise CheckpointError(
                f"{path} is of architecture '{architecture}'; GGUF files are read of 'llama', others from safetensors"
            )
        self.config = _read_config(path.parent, architecture, gguf_file=path.name)
        _truncate(self.config, num_layers)
        self.expected = expected_shapes(self.config)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        if "rope_freqs.weight" in stored:
            raise CheckpointError(
                f"{path} has scaled RoPE frequencies, which are read from safetensors checkpoints only"
            )
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config.num_hidden_layers)
        self._tensors: dict[str, Any] = {}
        for name in self.expected:
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            if gguf_name in stored:
                self._tensors[name] = stored[gguf_name]
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.dtype = torch.float32  # dequantised values are not representable in 16 bits

    def tensor(self, name: str) -> Tensor:
        import gguf

        stored = self._tensors[name]
        weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()).float()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF interleaves RoPE pairs; transformers keeps real and imaginary halves.
            rows = weight.view(-1, self.config.head_dim // 2, 2, weight.shape[-1])
            weight = rows.transpose(1, 2).reshape(weight.shape)
        return weight

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _read_tokenizer(self.path.parent, gguf_file=self.path.name)

    def identity(self) -> list[tuple[str, int, int]]:
        return [file_identity(self.path)]


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model transformers builds from a config, without memory behind its weights; its buffers are real."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever an unknown activation, RoPE type or size of nothing leads to
        raise CheckpointError(
            f"transformers cannot build the {config.model_type} of this config.json: {error!r}"
        ) from error
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)  # as from_pretrained does: RoPE frequencies, scales
    return model


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that transformers' model has."""
    return {name: tuple(parameter.shape) for name, parameter in skeleton(config).named_parameters()}


def check_shape(path: Path, name: str, shape: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    """CheckpointError if a tensor of that name is missing, which is None, or not of the shape expected."""
    if shape is None:
        raise CheckpointError(f"{path} has no tensor {name}, which its config.json asks for")
    if shape != expected:
        raise CheckpointError(f"{path}: {name} is {list(shape)}, but config.json asks for {list(expected)}")


def _truncate(config: PretrainedConfig, num_layers: int | None) -> None:
    if num_layers is None:
        return
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"layers must be from 1 to the model's {config.num_hidden_layers}, got {num_layers}")
    config.num_hidden_layers = num_layers
    if layer_types := getattr(config, "layer_types", None):
        config.layer_types = layer_types[:num_layers]


class Staging:
    """A directory beside the output in which files appear whole, renamed to the output when all are there."""

    keep = False  # an error leaves it as a kill does: it holds work that an error does not make worthless

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, out_path: Path) -> Staging:
        """The one of that output, made by `staging` in the first process."""
        return cls(out_path.with_name(out_path.name + ".partial"))

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        with self.whole(name) as file:
            save_file(contiguous, file, metadata={"format": "pt"})

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        with _open_shard(self.path / name) as shard:
            return {key: shard.get_tensor(key).clone() for key in shard.keys()}  # noqa: SIM118

    def write_json(self, name: str, value: Any) -> None:
        with self.whole(name) as file:
            file.write_text(json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def remove(self, pattern: str) -> None:
        for file in self.path.glob(pattern):
            file.unlink()

    @contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Yields the path to write a file to, which gets its name once it is written."""
        temporary = self.path / f".{name}"
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


@contextmanager
def staging(out_path: Path, fingerprint: Mapping[str, Any], *, overwrite: bool) -> Iterator[Staging]:
    """Yields the staging directory of `out_path`; leaving it without an error renames it into place.

    A directory left by a killed run is taken up again if it was made from the same `fingerprint`, and emptied if not.
    An error removes it, unless `Staging.keep` is set; a kill leaves it under the name `<out_path>.partial`, without
    config.json until the last moment, so that it is never mistaken for a model.
    """
    stage = Staging.of(out_path)
    expected = json.loads(json.dumps(fingerprint))
    if not (stage.has(_RESUME) and stage.read_json(_RESUME) == expected):
        shutil.rmtree(stage.path, ignore_errors=True)
    try:
        stage.path.mkdir(parents=True, exist_ok=True)
        stage.write_json(_RESUME, expected)
        yield stage
        stage.remove(_RESUME)
        stage.remove(".*")
        _replace_directory(stage.path, out_path, overwrite=overwrite)
    except Exception as error:  # not KeyboardInterrupt: an interrupted run resumes like a killed one
        if not stage.keep:
            shutil.rmtree(stage.path, ignore_errors=True)
        if _is_disk_full(error):
            raise CheckpointError(f"the disk that holds {out_path.parent} is full; free some space") from error
        raise


def check_out_path(out_path: Path, *, overwrite: bool) -> None:
    """ValueError unless `out_path` can be made, is empty, or may be overwritten."""
    if out_path.exists() and not out_path.is_dir():
        raise ValueError(f"output path {out_path} is a file; give a directory")
    if out_path.is_dir() and any(out_path.iterdir()) and not overwrite:
        raise ValueError(f"output directory {out_path} is not empty; choose another or overwrite it (--overwrite)")


def _replace_directory(source: Path, target: Path, *, overwrite: bool) -> None:
    check_out_path(target, overwrite=overwrite)
    if not target.exists():
        source.rename(target)
        return
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    source.rename(target)
    shutil.rmtree(old)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, SafetensorError) and any(text in str(error) for text in ("No space", "too large"))


@contextmanager
def _open_shard(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}") from error
    with handle as shard:
        yield shard


def _model_type(config_json: Path) -> str:
    try:
        return str(json.loads(config_json.read_text())["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config_json} is not a model's configuration: {error!r}") from error


def _read_config(path: Path, model_type: str, **kwargs: Any) -> PretrainedConfig:
    family(model_type)
    return _auto_config(path, **kwargs)


def _auto_config(path: Path, **kwargs: Any) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **kwargs
        )
    except Exception as error:  # transformers raises nearly anything here
        raise CheckpointError(f"{path}: the model's configuration cannot be read: {error}") from error
    return config


def _read_tokenizer(path: Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, **kwargs
        )
    except Exception as error:  # transformers raises nearly anything here
        raise CheckpointError(f"{path} has no readable tokenizer: {error}") from error
    return tokenizer


def file_identity(file: Path) -> tuple[str, int, int]:
    """Name, bytes and modification time in ns: a resumed run must see the same."""
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _some(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
