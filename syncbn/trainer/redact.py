"""What must not be written anywhere: passwords in addresses, and the environment's keys and tokens."""

import logging
import os
import re
from typing import Any

BLANK = "***"
SHORTEST = 8  # characters; a shorter value of a variable is too likely a word of its own

# Of a query's parameter; X-Amz-Signature, X-Goog-Credential and their like end with one of them
PARAMETER = r"token|key|api[-_]?key|apikey|secret|password|passwd|pwd|sig|signature|credentials?|auth|authorization"
VARIABLE = re.compile(r"API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.I)

_in_address = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/?#:@'\"]*:)[^\s/?#'\"]*(?=@)", re.I)
_in_query = re.compile(rf"([?&;](?:[\w.-]*[_.-])?(?:{PARAMETER})=)[^\s&;#'\"]+", re.I)


def redacted(value: Any) -> Any:
    """The value with every secret in its strings, in dicts and lists too, as ***; other values as they are.

    Secrets are the password in scheme://user:password@host, a parameter of a query such as ?token=, and the value of
    an environment variable whose name says so (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY), wherever it stands.
    """
    return _redacted(value, of_environment())


def of_environment() -> list[str]:
    """The values of the environment's variables that are secrets by their names, the longest first."""
    secrets = {value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(secrets, key=len, reverse=True)


class RedactingFormatter(logging.Formatter):
    """A formatter whose finished text, tracebacks included, holds no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, BLANK)
        return _in_query.sub(rf"\1{BLANK}", _in_address.sub(rf"\1{BLANK}", value))
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_redacted(each, secrets) for each in value)
    return value
