"""What the commands that serve over HTTP have in common: a token, flags, and a look at who can reach them."""

from __future__ import annotations

import ipaddress
import os
import secrets
from pathlib import Path

from agentrl.errors import UserError

TOKEN_CHARS = 16
"""Shortest token that is accepted."""


def find_token(variable: str, token_file: str | None) -> str:
    """The token in ``token_file``, else in the environment's ``variable``, which is removed, else a new one, printed.

    Raises:
        UserError: the file cannot be read, or a token is too short or not visible ASCII.
    """
    given = os.environ.pop(variable, "")
    if token_file:
        try:
            given = Path(token_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {token_file} cannot be read: {error}.") from error
    if not given and not token_file:
        given = secrets.token_urlsafe(24)
        print(f"token, made for this run; on the client, set {variable}={given}", flush=True)
    return check_token(given)


def check_token(token: str) -> str:
    """``token``, if it is one.

    Raises:
        UserError: it is too short, or not visible ASCII.
    """
    visible = token.isascii() and token.isprintable() and " " not in token
    if len(token) < TOKEN_CHARS or not visible:
        raise UserError(
            f"a token must have at least {TOKEN_CHARS} visible ASCII characters, got {len(token)}: whoever guesses it "
            'runs code here. Make one: python -c "import secrets; print(secrets.token_urlsafe(24))"'
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flag(name: str) -> str:
    """An option as it is written on the command line, without the dashes."""
    return name.replace("_", "-")
