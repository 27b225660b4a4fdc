"""What clients may ask: the bodies of OpenAI's API, and some fields more.

Ranges that `Sampling` checks are not checked here.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from glm5_jax.inference.request import MOST_ALTERNATIVES

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Count = Annotated[int, Field(ge=1)]
_Alternatives = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)]


class Strict(BaseModel):
    """Takes no field that it does not name, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(Strict):
    """How an answer is streamed."""

    include_usage: bool = False


class Body(Strict):
    """What both kinds of completions take."""

    model: str
    n: _Count = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], float] = Field(
        default_factory=dict
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts), Field(max_length=4)
    ] = Field(default_factory=list)
    max_tokens: _Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_are_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are given, which only a stream takes")
        return self


def _prompts(value: object) -> object:
    """Texts and lists of tokens, of which one may stand alone."""
    single = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(part) is int for part in value)
    )
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)) or not prompts:
        raise ValueError("expected a text, a list of token ids, or a list of either")
    return prompts


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return all(type(token) is int for token in value)
    return isinstance(value, str)


class CompletionBody(Body):
    """The body of `/v1/completions`."""

    # pydantic would name every member of a union in its errors.
    prompt: Annotated[list[Any], BeforeValidator(_prompts)]
    echo: bool = False
    logprobs: _Alternatives | None = None


class FunctionCall(Strict):
    """A call that the assistant made."""

    name: str
    arguments: str  # JSON


class ToolCall(Strict):
    """The same, with what the tool's answer refers to."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A message of a conversation; fields of answers may be sent back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None  # a text or its parts, which the tokenizer checks
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        of_assistant = self.reasoning_content is not None or self.tool_calls is not None
        if of_assistant and self.role != "assistant":
            raise ValueError("only an assistant has reasoning_content and tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("expected tool_call_id in messages of the role tool, and only there")
        return self


class Function(Strict):
    """A function that the assistant may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None

    @model_validator(mode="after")
    def _parameters_are_a_schema(self) -> Self:
        if self.parameters.get("type", "object") != "object":
            raise ValueError('parameters: expected a JSON schema of the type "object"')
        return self


class Tool(Strict):
    """A tool, of which functions are the only kind."""

    type: Literal["function"]
    function: Function


class ResponseFormat(Strict):
    """What the answer is."""

    type: Literal["text"]


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: _Alternatives | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    metadata: dict[str, str] | None = None
    store: Literal[False] = False  # nothing is stored

    @model_validator(mode="after")
    def _fields_go_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given, which needs logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are given, expected one of them")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools: two functions have the same name")
        return self
