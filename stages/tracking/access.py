"""Who may use the MLflow server: this machine, and with a password whoever has it.

The administrator's password comes from MLFLOW_TRACKING_PASSWORD, else from `.work/mlflow.password`, which
only its owner may read and which is made at the first start. It reaches the server through the environment,
never through a command line, and is never printed.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import os
import secrets
from importlib.util import find_spec
from pathlib import Path

PASSWORD_FILE = Path(".work/mlflow.password")
USERS = Path(".work/mlflow-users.db")
_SETTINGS = Path(".work/mlflow-auth.ini")
ADMIN = "admin"
SHORTEST = 12
"""Characters that MLflow asks of a password."""


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check(host: str, *, auth: bool) -> None:
    """RuntimeError for a server that anybody in the network could write to, or that lacks MLflow's `auth`."""
    if not auth and not is_loopback(host):
        raise RuntimeError(
            f"host {host}: other machines would reach the MLflow server without a password; "
            "add --auth, or leave the server on 127.0.0.1 and use an SSH tunnel"
        )
    if auth and find_spec("flask_wtf") is None:
        raise RuntimeError(
            "--auth needs MLflow's extra: .venv/bin/pip install -c constraints.txt 'mlflow[auth]'"
        )


def allowed_hosts(host: str, port: int) -> str | None:
    """MLFLOW_SERVER_ALLOWED_HOSTS of a server there: what the user gave, its own address and loopback.

    A server answers 403 to a request for another name. None where MLFLOW_SERVER_ALLOWED_HOSTS is not set and
    MLflow's own names, which setting it replaces, do.
    """
    given = os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS")
    if not given:
        if host in ("127.0.0.1", "localhost"):
            return None
        from mlflow.server.security_utils import get_default_allowed_hosts  # takes seconds

        given = ",".join(get_default_allowed_hosts())
    served = f"[{host}]" if ":" in host and not host.startswith("[") else host
    names = dict.fromkeys((served, "localhost", "127.0.0.1"))
    # A client leaves HTTP's own port away.
    return ",".join([given, *(name if port == 80 else f"{name}:{port}" for name in names)])


def credentials() -> tuple[str, str]:
    """Name and password of the administrator; makes the file of the password if there is none.

    Raises RuntimeError for a password that is too short, and for a file that others may read.
    """
    name = os.environ.get("MLFLOW_TRACKING_USERNAME") or ADMIN
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or _password_of_file()
    if len(password) < SHORTEST:
        source = "MLFLOW_TRACKING_PASSWORD" if os.environ.get("MLFLOW_TRACKING_PASSWORD") else PASSWORD_FILE
        raise RuntimeError(f"{source}: MLflow asks for at least {SHORTEST} characters")
    return name, password


def _password_of_file() -> str:
    PASSWORD_FILE.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(PASSWORD_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if PASSWORD_FILE.stat().st_mode & 0o077:
            raise RuntimeError(f"{PASSWORD_FILE} may be read by others: chmod 600 {PASSWORD_FILE}") from None
        return PASSWORD_FILE.read_text(encoding="utf-8").strip()
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(secrets.token_urlsafe(24) + "\n")
    return PASSWORD_FILE.read_text(encoding="utf-8").strip()


def server_environment() -> dict[str, str]:
    """What the server reads at its start: its administrator, its table of users, a key for its sessions."""
    name, password = credentials()
    _SETTINGS.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{USERS.resolve()}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
        encoding="utf-8",
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(_SETTINGS.resolve()),
        "MLFLOW_AUTH_ADMIN_USERNAME": name,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


def check_served(host: str, port: int) -> None:
    """RuntimeError unless the server that runs there refuses strangers and takes the administrator."""
    name, password = credentials()
    token = base64.b64encode(f"{name}:{password}".encode()).decode()
    if _status(host, port, {}) != 401:
        raise RuntimeError(f"the MLflow server at {host}:{port} answers without a password: stopped")
    if _status(host, port, {"Authorization": f"Basic {token}"}) != 200:
        raise RuntimeError(
            f"the MLflow server refuses the password of {name!r}: it keeps the one of its first start, in "
            f"{USERS}. Use that one, or delete {USERS} (its other users go too)"
        )


def _status(host: str, port: int, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
