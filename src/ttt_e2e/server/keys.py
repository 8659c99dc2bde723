"""API keys: who may use the service, and whose sessions are whose."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ttt_e2e.data.text import read_text
from ttt_e2e.errors import UserError

ENVIRONMENT = "TTT_E2E_API_KEYS"
_SHORTEST, _LONGEST = 16, 512  # characters of a key


@dataclass(frozen=True)
class Caller:
    """Who asks. name: for people and logs. owner: whom sessions belong to."""

    name: str
    owner: str


LOCAL = Caller("local", "local")


class Keys:
    """The keys that are let in, by name. Without any, everyone is `LOCAL`."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._callers = [Caller(name, hashlib.sha256(key.encode()).hexdigest()) for name, key in (keys or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, authorization: str) -> Caller | None:
        """Whose key the header `Authorization: Bearer KEY` holds; None if it is nobody's.

        Hashes are compared, all of them and in constant time, so that the time tells nothing about a key.
        """
        if not self._callers:
            return LOCAL
        scheme, _, key = authorization.partition(" ")
        owner = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for caller in self._callers:
            if hmac.compare_digest(caller.owner, owner) and scheme.lower() == "bearer":
                found = caller
        return found


def load_keys(file: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys in `file`, or in the variable `TTT_E2E_API_KEYS`, where commas may stand for line ends.

    A line is a name and a key; what follows a # at its beginning is a comment. Raises UserError for lines that are
    something else, a name or a key that comes twice, a key too short to be safe, no key at all, and if both are given.
    """
    variable = environment.get(ENVIRONMENT, "")
    if file is None:
        return Keys(_parsed(variable.replace(",", "\n"), ENVIRONMENT)) if variable.strip() else Keys()
    if variable.strip():
        raise UserError(f"There are keys in {file} and in {ENVIRONMENT}; leave one of them out.")
    return Keys(_parsed(read_text(file), str(file)))


def check_host(host: str, keys: Keys) -> None:
    """Raise UserError if anyone but this machine's users could come in without a key."""
    if not keys and not is_loopback(host):
        raise UserError(
            f"Without keys the service is for this machine only, not for {host}; give keys with --keys, or leave "
            "--host out."
        )


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine itself and cannot be reached from another."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _parsed(text: str, source: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        at = f"{source}, line {number}"  # the line itself holds a secret
        if len(words) != 2:
            raise UserError(f"{at}: there must be a name and a key, with a space between them.")
        name, key = words
        if not (_SHORTEST <= len(key) <= _LONGEST and key.isascii() and key.isprintable()):
            raise UserError(
                f"{at}: the key of {name} must have {_SHORTEST} to {_LONGEST} characters, all of them ASCII; "
                "`openssl rand -hex 24` makes a good one."
            )
        if name in keys:
            raise UserError(f"{at}: the name {name} comes twice; give each key a name of its own.")
        if key in keys.values():
            raise UserError(f"{at}: the key of {name} has another name already; make a new key.")
        keys[name] = key
    if not keys:
        raise UserError(f"{source} holds no key; write a line with a name and a key.")
    return keys
