"""Native model classes: transformers' own, each attention replaced by MLAAttention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from ..architectures import ARCHITECTURES, NATIVE_PREFIX, base_model_type, family
from ..config import MLAConfig
from .attention import MLAAttention

__all__ = ["native_classes", "native_config", "original_config"]


def native_config(base_config: PreTrainedConfig, layers: Sequence[MLAConfig]) -> PreTrainedConfig:
    """The config of base_config's model with MLA attention: every field of it, and the shape of each layer."""
    config_class, model_class = native_classes(base_config.model_type)
    fields = base_config.to_dict()
    # Where it came from, and whose code might run it, is not true of the native model.
    for field in ("model_type", "transformers_version", "_name_or_path", "auto_map"):
        fields.pop(field, None)
    fields |= {"mla": [layer.to_dict() for layer in layers], "architectures": [model_class.__name__]}
    return config_class(**fields)


def original_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the model that a native one was converted from."""
    fields = config.to_dict()
    for field in ("model_type", "transformers_version", "mla", "architectures"):
        fields.pop(field, None)
    base: Any = CONFIG_MAPPING[base_model_type(config.model_type) or config.model_type]
    original: PreTrainedConfig = base(**fields)
    return original


@cache
def native_classes(base: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Config and causal language model of a base family's native form, registered with transformers' auto classes."""
    family(base)
    base_config: Any = CONFIG_MAPPING[base]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]

    class NativeConfig(base_config):  # type: ignore[misc]
        model_type = NATIVE_PREFIX + base
        # Tensor parallelism would split heads that share one latent.
        base_model_tp_plan: ClassVar = {
            k: v for k, v in (base_config.base_model_tp_plan or {}).items() if ".self_attn." not in k
        }
        mla: list[dict[str, Any]] | None = None  # MLAConfig.to_dict() of each layer

    class NativeModel(base_model):  # type: ignore[misc]
        config_class = NativeConfig

        def __init__(self, config: Any) -> None:
            if len(config.mla or ()) != config.num_hidden_layers:
                raise ValueError(
                    f"{type(config).__name__}: mla must hold one entry for each of {config.num_hidden_layers} layers, "
                    f"got {len(config.mla or ())}"
                )
            super().__init__(config)
            for layer_idx, (layer, fields) in enumerate(zip(self.model.layers, config.mla, strict=True)):
                layer.self_attn = MLAAttention(config, MLAConfig(**fields), layer_idx)
            self.post_init()

    # Transformers finds the modules whose weights output_attentions returns by their class.
    backbone: Any = MODEL_MAPPING[base_config]
    records = backbone._can_record_outputs
    records["attentions"] = [records["attentions"], MLAAttention]

    for native_class, base_class in ((NativeConfig, base_config), (NativeModel, base_model)):
        native_class.__name__ = native_class.__qualname__ = f"TransMLA{base_class.__name__}"
        native_class.__module__ = __package__  # which pickle can import it from
    AutoModelForCausalLM.register(NativeConfig, NativeModel)
    return NativeConfig, NativeModel


def __getattr__(name: str) -> Any:
    for base in ARCHITECTURES:
        for native_class in native_classes(base):
            if native_class.__name__ == name:
                return native_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
