"""Walking the tokens of a PTX text: the part of the parser that knows no PTX beyond numbers and names."""

from __future__ import annotations

import struct

from ..errors import EmulatorError
from . import ir
from .lexer import Token, tokenize


class Reader:
    """A position among the tokens of a text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokenize(text)
        self._at = 0

    @property
    def _token(self) -> Token:
        return self._tokens[self._at]

    def _next(self) -> Token:
        token = self._tokens[self._at]
        self._at += 1
        return token

    def _error(self, message: str, token: Token | None = None) -> EmulatorError:
        return EmulatorError(message, None, (token or self._token).line)

    def _accept(self, text: str) -> bool:
        if self._tokens[self._at].text == text and self._tokens[self._at].kind != "string":
            self._at += 1
            return True
        return False

    def _expect(self, text: str) -> Token:
        token = self._next()
        if token.text != text:
            raise self._error(f"expected {text!r}, found {token.text!r}", token)
        return token

    def _word(self) -> str:
        token = self._next()
        if token.kind != "word":
            raise self._error(f"expected a name, found {token.text!r}", token)
        return token.text

    def _integer(self) -> int:
        negative = self._accept("-")
        value = self._number(self._next())
        if value.bits is not None:
            raise self._error("expected an integer")
        return -value.value if negative else value.value

    def _number(self, token: Token) -> ir.Immediate:
        text = token.text
        if token.kind != "number":
            raise self._error(f"expected a number, found {text!r}", token)
        prefix = text[:2].lower()
        if prefix == "0f":
            return ir.Immediate(int(text[2:], 16), 32)
        if prefix == "0d":
            return ir.Immediate(int(text[2:], 16), 64)
        if prefix in ("0x", "0b"):
            return ir.Immediate(int(text.rstrip("U"), 0))
        digits = text.rstrip("U")
        if not digits.isdigit():
            return ir.Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        return ir.Immediate(int(digits, 8 if len(digits) > 1 and digits[0] == "0" else 10))

    def _skip_line(self, token: Token) -> None:
        """Past a directive that means nothing here: to its semicolon, or the end of its line where it has
        none.
        """
        while self._token.kind != "end" and self._token.line == token.line:
            if self._next().text == ";":
                return

    def _skip_block(self) -> None:
        depth = 1
        while depth:
            token = self._next()
            if token.kind == "end":
                raise self._error("a block is not closed", token)
            depth += (token.text == "{") - (token.text == "}")
