"""Who may use the Prefect server: this machine, and with a password whoever has it."""

from __future__ import annotations

import ipaddress
import os


class OpenToTheNetwork(RuntimeError):
    """A server that anybody in the network could command. The message says what to do."""


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def server_environment(host: str) -> dict[str, str]:
    """What a Prefect server on `host` reads beside the present environment: the password it asks for.

    PREFECT_SERVER_API_AUTH_STRING, else PREFECT_API_AUTH_STRING (what its clients send), as `name:password`;
    empty without one. Raises `OpenToTheNetwork` for another address than this machine's without a password.
    """
    password = os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or os.environ.get("PREFECT_API_AUTH_STRING")
    if password:
        return {"PREFECT_SERVER_API_AUTH_STRING": password}
    if not is_loopback(host):
        raise OpenToTheNetwork(
            f"host {host}: other machines could start work through the Prefect server without a password; "
            "set PREFECT_API_AUTH_STRING=name:password for server and workers, or leave it on 127.0.0.1"
        )
    return {}
