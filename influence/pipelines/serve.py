"""Serve one page to this machine alone."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from influence.pipelines.frame.outcome import Say

LOOPBACK = "127.0.0.1"
OURS = (LOOPBACK, "localhost")


def server(page: str, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a page, bound to the loopback address and not yet serving.

    Args:
        page: the HTML.
        port: the port; 0 takes a free one.

    Returns:
        The server: `serve_forever()`, and its address.

    Raises:
        ValueError: if the port cannot be had.
    """
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # another name for this address is a web page elsewhere that wants to read this one
            mine = (self.headers.get("Host") or "").rpartition(":")[0] in OURS
            found = mine and self.path.partition("?")[0] == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8" if found else "text/plain")
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if found:
                self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Keep requests out of the terminal."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port {port} cannot be served at ({error}): pass another --port, or 0 for a free one"
        ) from error


def serve(page: str, port: int, say: Say) -> None:
    """Serve a page until interrupted.

    Args:
        page: the HTML.
        port: the port; 0 takes a free one.
        say: where the address goes.
    """
    with server(page, port) as serving:
        say(f"serving at http://{LOOPBACK}:{serving.server_address[1]}/ until Ctrl-C")
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            say("")
