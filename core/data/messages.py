"""Messages, tools and tool calls of a row in the one form that chat templates take.

OpenAI (``role`` / ``content``) and ShareGPT (``from`` / ``value``) messages are told apart one by one. What chat
templates expect where the two disagree with them: roles ``system``, ``developer``, ``user``, ``assistant``, ``tool``;
content as text; arguments of a tool call as an object. A message with images has ``parts`` beside its content: texts,
and images with their ``source``, in order.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

from torchspec.core.models.images import ImageError, image_source

Message = dict[str, Any]


class RowError(ValueError):
    """Why one row cannot be used; becomes a `BadRow` where its place is known."""


_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_EXTRA_FIELDS = (*REASONING_FIELDS, "tool_call_id", "name")
_IMAGE_FIELDS = ("image_url", "image", "url", "path")


def parse_messages(value: Any, key: str, directory: Path) -> tuple[Message, ...]:
    """The messages of a row's field `key`; RowError names the message and what is wrong with it.

    Images are looked for from `directory` on, and not read.
    """
    if not isinstance(value, list):
        raise RowError(f"{key} must be a list of messages, it is {kind(value)}")
    if not value:
        raise RowError(f"{key} is empty")
    messages = []
    for number, message in enumerate(value, start=1):
        try:
            messages.append(_message(message, directory))
        except RowError as error:
            raise RowError(f"message {number}: {error}") from None
    return tuple(messages)


def _message(value: Any, directory: Path) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"must be an object, it is {kind(value)}")
    given = {key: item for key, item in value.items() if item is not None}
    role_key, content_key = ("role", "content") if "role" in given else ("from", "value")
    if role_key not in given:
        raise RowError("no role: needs role and content, or from and value")
    role = given[role_key]
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise RowError(f"unknown role {role!r}: one of {', '.join(_ROLES)}")
    message: Message = {"role": _ROLES[role.lower()]}
    if role.lower() == "function_call":
        message["tool_calls"] = [_tool_call(_parsed(given.get(content_key), "a function call"))]
        content: Any = ""
    else:
        if given.get("tool_calls"):
            message["tool_calls"] = _tool_calls(given["tool_calls"])
        content = given.get(content_key, "" if "tool_calls" in message else None)
    if content is None:
        raise RowError(f"the {role} message has no {content_key}")
    parts = _parts(content, content_key, directory)
    message["content"] = "".join(part.get("text", "") for part in parts)
    if any(part["type"] == "image" for part in parts):
        if message["role"] == "assistant":
            raise RowError(f"the {role} message has an image: what a target says is text")
        message["parts"] = parts
    for name in _EXTRA_FIELDS:
        if name in given:
            message[name] = check_text(given[name], name)
    return message


def _parts(value: Any, name: str, directory: Path) -> list[dict[str, str]]:
    """Text as one part, or a list of parts, as the OpenAI API defines it."""
    if not isinstance(value, list):
        return [{"type": "text", "text": check_text(value, name)}]
    parts = []
    for part in value:
        given = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else part
        kind_of_part = given.get("type", "text") if isinstance(given, dict) else "text"
        if kind_of_part in ("image", "image_url"):
            parts.append({"type": "image", "source": _image(given, name, directory)})
        elif kind_of_part == "text":
            text = given.get("text") if isinstance(given, dict) else given
            parts.append({"type": "text", "text": check_text(text, f"a part of {name}")})
        else:
            raise RowError(f"{name} has a part of type {kind_of_part!r}: only text and images can be trained on")
    return parts


def _image(part: dict[str, Any], name: str, directory: Path) -> str:
    """Where the image of a part is: the OpenAI API's `image_url` (`{"url"}`), or `image`, `url` or `path`."""
    given = next((part[key] for key in _IMAGE_FIELDS if key in part), None)
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str) or not url:
        raise RowError(f"an image in {name} needs a path or a data: URI as one of {', '.join(_IMAGE_FIELDS)}")
    try:
        return image_source(check_text(url, f"an image in {name}"), directory)
    except ImageError as error:
        raise RowError(str(error)) from error


def check_text(value: Any, name: str) -> str:
    """`value` if it is text that can be encoded; RowError otherwise."""
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, it is {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(
                f"{name} is not valid Unicode text (undecodable bytes, or half of a surrogate pair)"
            ) from None
    return value


def parse_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """`tools` as a list of JSON schemas; data sets also store it as JSON text."""
    tools = _parsed(value, "tools") if value is not None else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools must be a list of objects")
    return tuple(_without_nulls(tool) for tool in tools)


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    calls = _parsed(value, "tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"tool_calls must be a list, it is {kind(calls)}")
    return [_tool_call(call) for call in calls]


def _tool_call(value: Any) -> dict[str, Any]:
    """A call with its arguments as an object: OpenAI writes them as JSON text, chat templates expect an object."""
    if not isinstance(value, dict):
        raise RowError(f"a tool call must be an object, it is {kind(value)}")
    call: dict[str, Any] = _without_nulls(value)
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = function["arguments"]  # what the model really said, broken or not
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{name} is text that is not JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the fields of all others, as nulls."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_KINDS = {
    NoneType: "missing",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def kind(value: Any) -> str:
    """What a decoded value is, in words for a reader of data."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
