"""Answers of a model that may reason and call tools, and what a parser makes of them."""

import dataclasses

from glm5_jax.inference.reply import (
    CallArguments,
    CallStart,
    Content,
    Reasoning,
    ReplyParser,
)


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool("weather_map", area={"type": "array"}),
    {"type": "function", "function": {"name": "now"}},
]


@dataclasses.dataclass
class Reply:
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def take(self, piece):
        match piece:
            case Reasoning(text):
                assert text and not self.content and not self.calls
                self.reasoning += text
            case Content(text):
                assert text
                self.content += text
            case CallStart(index, _, name):
                assert index == len(self.calls)
                self.calls.append((name, ""))
            case CallArguments(index, text):
                name, before = self.calls[index]
                self.calls[index] = (name, before + text)


def parsed(parts, thinking=False, tools=TOOLS):
    """The whole of an answer that comes in parts."""
    parser, reply = ReplyParser(thinking, tools), Reply()
    for part in parts:
        for piece in parser.push(part):
            reply.take(piece)
    for piece in parser.finish():
        reply.take(piece)
    return reply


def call(name, **arguments):
    pairs = [f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items()]
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


# A whole answer, as GLM-4.5 lays it out.
GLM_4_5 = """
Let me look.
<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Paris</arg_value>
<arg_key>days</arg_key>
<arg_value>2</arg_value>
</tool_call>
<tool_call>now
</tool_call>
"""
