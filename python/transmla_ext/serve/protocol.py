"""What clients send: OpenAI's requests, each field checked, and its errors."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

__all__ = ["APIError", "ChatRequest", "CompletionRequest", "EngineFailedError", "GenerationRequest", "Message"]

# What the API has and this server has not, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# Says nothing about the answer.
_IGNORED = frozenset({
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
})  # fmt: skip


class APIError(HTTPException):
    """An error as OpenAI's clients know it.

    Args:
        status: of HTTP.
        message: what went wrong, for people.
        param: the parameter at fault.
        code: what went wrong, for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status_code == 429 else kind
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


class EngineFailedError(RuntimeError):
    """A step raised something, which has been logged; it ends every answer."""


class _Fields(BaseModel):
    """Fields of the right type and nothing else; null is as good as none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and name not in cls.ignored and value not in cls.neutral.get(name, ())
        }


class StreamOptions(_Fields):
    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False


def _encodable(text: str) -> str:
    text.encode()  # JSON can say half a surrogate pair, UTF-8 cannot
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Tokens = Annotated[list[int], Field(min_length=1)]
# A long one would make every token slow: text that might be its beginning is searched for after each.
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class GenerationRequest(_Fields):
    """What both kinds of requests have."""

    default_limit: ClassVar[int | None] = None  # of new tokens; None: as many as there is room for
    neutral = _NEUTRAL
    ignored = _IGNORED

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=0, lt=2**31, description="Not OpenAI's: draw from the likeliest so many; 0 is all.")
    top_p: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self

    @property
    def limit(self) -> int | None:
        """Of new tokens, if the client says so."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to list beside each token; None: no log probabilities at all."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    default_limit = 16

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(_Fields):
    type: Literal["text"]
    text: Text


class Message(_Fields):
    # What the clients' own objects carry when an answer is sent back as part of the next question.
    neutral = {name: ([], {}) for name in ("annotations", "audio", "function_call", "refusal", "tool_calls")}

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def template_fields(self) -> dict[str, str]:
        """What chat templates know."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        fields = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return fields if self.name is None else fields | {"name": self.name}


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs=true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
