"""API keys: who may use the service, and which sessions belong to whom."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ttt_e2e.data.text import read_text
from ttt_e2e.errors import UserError

KEYS_VARIABLE = "TTT_E2E_API_KEYS"
_MIN_LENGTH, _MAX_LENGTH = 16, 512  # characters of a key


@dataclass(frozen=True)
class Caller:
    """The sender of a request. name: of the key, for logs. owner: whom the sessions belong to, a hash of the key."""

    name: str
    owner: str


LOCAL = Caller("local", "local")
OPERATOR = "operator"
"""The name of the key with which the metrics may be read, which show what all keys do together."""


class Keys:
    """The valid keys by name. Without any, every caller is `LOCAL`."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._callers = [Caller(name, hashlib.sha256(key.encode()).hexdigest()) for name, key in (keys or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, authorization: str) -> Caller | None:
        """The caller with the key in the header `Authorization: Bearer KEY`, or None if the key is not valid."""
        if not self._callers:
            return LOCAL
        scheme, _, key = authorization.partition(" ")
        owner = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # All hashes are compared, in constant time, so that the time reveals nothing about a key.
        found = [caller for caller in self._callers if hmac.compare_digest(caller.owner, owner)]
        return found[0] if found and scheme.lower() == "bearer" else None


def load_keys(file: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys in `file` or in `TTT_E2E_API_KEYS`, one per line (or comma, in the variable): a name and a key."""
    variable = environment.get(KEYS_VARIABLE, "")
    if file is None:
        return Keys(_parse(variable.replace(",", "\n"), KEYS_VARIABLE)) if variable.strip() else Keys()
    if variable.strip():
        raise UserError(f"There are keys both in {file} and in {KEYS_VARIABLE}; remove one of them.")
    return Keys(_parse(read_text(file), str(file)))


def check_host(host: str, keys: Keys) -> None:
    """Raise UserError if the service could be reached from other machines without a key."""
    if not keys and not is_loopback(host):
        raise UserError(f"Without keys only this machine may connect, not {host}; give --keys, or omit --host.")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine and cannot be reached from another one."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def _parse(text: str, source: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{source}, line {number}"  # never the line itself, which holds a secret
        if len(words) != 2:
            raise UserError(f"{where}: write a name and a key, separated by a space.")
        name, key = words
        if not (_MIN_LENGTH <= len(key) <= _MAX_LENGTH and key.isascii() and key.isprintable()):
            raise UserError(
                f"{where}: the key of {name} must have {_MIN_LENGTH} to {_MAX_LENGTH} ASCII characters; "
                "`openssl rand -hex 24` makes a good one."
            )
        if name in keys:
            raise UserError(f"{where}: the name {name} occurs twice; give every key its own name.")
        if key in keys.values():
            raise UserError(f"{where}: the key of {name} already has another name; make a new key.")
        keys[name] = key
    if not keys:
        raise UserError(f"{source} holds no key; write a line with a name and a key.")
    return keys
