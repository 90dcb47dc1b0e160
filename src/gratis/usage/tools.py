"""Which kinds of tool an answer used, in the words that requests declare them with.

Used is what was called. The offer leaves out "tool use", the provider counts calls, and requests that only carried
tools were measured as free. A hosted tool that was declared and not called is therefore not named here: to name it
would be no safer, for a request that is wrongly billed leaves `used` too low for all that follow.

Client-side tools are `function` and `custom`; which others a revision takes for client-side is its own data. A kind of
item that is not known is taken for a tool of that name, so that what may be tool use is never free by oversight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gratis.usage.fields import get, node, nodes, text

if TYPE_CHECKING:
    from collections.abc import Iterator

FUNCTION: Final = "function"
CUSTOM: Final = "custom"
WEB_SEARCH: Final = "web_search"
MCP: Final = "mcp"
# Items of a Responses output that are no call, and calls that are not named after their tool.
NO_TOOL: Final = frozenset({"message", "reasoning", "compaction", "additional_tools"})
TOOL_OF_ITEM: Final = {
    "custom_tool": CUSTOM,
    "mcp_list_tools": MCP,
    "mcp_approval_request": MCP,
    "mcp_approval_response": MCP,
    "program": "programmatic_tool_calling",
}


def of_items(field: str, items: object) -> Iterator[str]:
    """The kinds of tool that the items of a Responses output called."""
    for place, item in enumerate(nodes(field, items)):
        kind = text(f"{field}[{place}].type", get(item, "type"))
        if kind is not None and kind not in NO_TOOL:
            stem = kind.removesuffix("_output").removesuffix("_call")
            yield TOOL_OF_ITEM.get(stem, stem)


def of_choices(field: str, choices: object) -> Iterator[str]:
    """The kinds of tool that the choices of a chat called, whole or as deltas of a stream."""
    for place, choice in enumerate(nodes(field, choices)):
        for name in ("message", "delta"):
            where = f"{field}[{place}].{name}"
            said = node(where, get(choice, name))
            if said is not None:
                yield from _of_message(where, said)


def _of_message(where: str, said: Any) -> Iterator[str]:
    if get(said, "function_call") is not None:
        yield FUNCTION
    for place, call in enumerate(nodes(f"{where}.tool_calls", get(said, "tool_calls"))):
        kind = text(f"{where}.tool_calls[{place}].type", get(call, "type"))
        # Later deltas of a call leave its type out.
        if kind is None and get(call, CUSTOM) is not None:
            yield CUSTOM
        else:
            yield kind or FUNCTION
    # Search models answer without a call; what they found is cited.
    if nodes(f"{where}.annotations", get(said, "annotations")):
        yield WEB_SEARCH
