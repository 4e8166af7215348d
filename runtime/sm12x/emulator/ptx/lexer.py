"""PTX text to tokens (PTX ISA, "Syntax")."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import EmulatorError

# A word takes its dotted modifiers with it ("ld.param.v2.b64", "%tid.x"), and "::" ("scale_vec::1X"), but not
# the single colon behind a label.
_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+|//[^\n]*)
  | (?P<newline>\n)
  | (?P<comment>/\*.*?\*/)
  | (?P<string>"(?:[^"\\]|\\.)*")
  | (?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
      |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)
  | (?P<word>[A-Za-z_$%][\w$]*(?:(?:::|\.)[\w$]+)*)
  | (?P<directive>\.[A-Za-z_]\w*)
  | (?P<mark>[][{}()<>,;:|+\-!@=~*/&^?])
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """`kind` is "word", "directive", "number", "string", "mark" or "end"; `start` an offset in the text."""

    kind: str
    text: str
    line: int
    start: int


def tokenize(text: str) -> list[Token]:
    """The tokens of a PTX text, an "end" token last; comments and white space are gone.

    Raises EmulatorError at a character that begins no token.
    """
    tokens: list[Token] = []
    append = tokens.append
    line, position, match = 1, 0, _TOKEN.match
    while position < len(text):
        found = match(text, position)
        if found is None:
            rest = text[position : position + 20].split("\n")[0]
            raise EmulatorError(f"not PTX: {rest!r}", None, line)
        kind = found.lastgroup
        if kind == "newline":
            line += 1
        elif kind == "comment":
            line += found.group().count("\n")
        elif kind != "space":
            append(Token(str(kind), found.group(), line, position))
        position = found.end()
    append(Token("end", "", line, position))
    return tokens
