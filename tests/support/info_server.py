"""An HTTP server that answers as a test says, for what reads /server_info."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def body(states: list) -> bytes:
    """What /server_info sends for these `macs` states."""
    return json.dumps({"internal_states": [{"macs": state} for state in states]}).encode()


@contextmanager
def answering(
    answer: bytes | Callable[[], bytes | int],
    *,
    api_key: str | None = None,
    location: str | None = None,
    certificate: Path | None = None,
) -> Iterator[str]:
    """The address of a server that sends `answer`, a body, a status code, or a function of either.

    api_key: 401 without it. location: redirects there. certificate: PEM of key and certificate, for https.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = answer() if callable(answer) else answer
            if api_key is not None and self.headers.get("Authorization") != f"Bearer {api_key}":
                found = 401
            status, content = (found, b"") if isinstance(found, int) else (302 if location else 200, found)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # a client that does not trust it hangs up
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
