"""Prefect's server on a bound port, in a process that dies with its parent, even if that is killed by -9.

Called as `python -m flows.prefect.server_child PARENT_PID SOCKET_NUMBER` by `own_server`.
"""

import os
import signal
import socket
import sys

from flows.machine.child import ask_for


def main() -> None:
    """Serve until SIGTERM."""
    parent, number = int(sys.argv[1]), int(sys.argv[2])
    ask_for(signal.SIGKILL)  # its database bears that
    if os.getppid() != parent:  # it ended before the request stood
        return
    os.environ.update(PREFECT_UI_ENABLED="0", PREFECT__SERVER_EPHEMERAL="1", PREFECT__SERVER_FINAL="1")
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=number)])


if __name__ == "__main__":
    main()
