"""Serving the page on this machine alone, until the labeler is done."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable

from activedpo_fast._files import reason_of
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.labels.page.session import Session

_LOOPBACK = "127.0.0.1"


def serve(session: Session, *, port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve the page until the labeler finishes or presses Ctrl-C; the labels file is then written.

    Args:
        session: the labeler's session.
        port: on 127.0.0.1; 0 for any free one.
        ready: called with the page's address, which has this start's token, once it can be opened.

    Raises:
        ActiveDPOError: the port is in use; Starlette, uvicorn or markdown-it-py is not installed.
    """
    try:
        import uvicorn

        from activedpo_fast.labels.page.app import make_app
    except ImportError as error:
        raise ActiveDPOError(
            f"the labeling page needs Starlette: pip install activedpo-fast[label] ({error})"
        ) from error
    listener = _listen(port)
    port = listener.getsockname()[1]
    token = secrets.token_urlsafe(24)

    def finish() -> None:
        server.should_exit = True

    app = make_app(session, hosts=hosts_of(port), token=token, finish=finish)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_level="error",
            access_log=False,  # no token in a log
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=3,
        )
    )
    # The part after # stays in the browser: it is in no request, and in no header of one.
    ready(f"http://{_LOOPBACK}:{port}/#{token}")
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt as error:
        # uvicorn raises it again after it has stopped. SIGTERM, a kind of it, ends more than that.
        if type(error) is not KeyboardInterrupt:
            raise
    finally:
        listener.close()
        session.labeling.write_labels()


def hosts_of(port: int) -> list[str]:
    """Return what a browser on this machine says in `Host`; it leaves out port 80."""
    names = (_LOOPBACK, "localhost")
    return [f"{name}:{port}" for name in names] + (list(names) if port == 80 else [])


def _listen(port: int) -> socket.socket:
    """Return a socket that already accepts connections, so that the address can be announced."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_LOOPBACK, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise ActiveDPOError(
            f"--port {port}: {reason}; choose another, or leave it out for any free one"
        ) from None
    return listener
