"""A real server on the loopback that does what servers do."""

import contextlib
import gzip
import http.server
import threading
import time
from urllib.parse import parse_qs, urlsplit


class Server:
    """Answers by path: a function that is given the handler, or what it should simply send.

    Attributes:
        url: where it listens.
        asked: path with query of every request, in order.
        headers: of every request.
    """

    def __init__(self, routes=None):
        self.routes = dict(routes or {})
        self.asked, self.headers = [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                outer.headers.append(dict(self.headers))
                parts = urlsplit(self.path)
                self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                route = outer.routes.get(parts.path)
                if callable(route):
                    # The client may have gone.
                    with contextlib.suppress(ConnectionError):
                        route(self)
                elif route is None:
                    self.reply(b"", 404)
                else:
                    self.reply(route)

            def reply(self, body, status=200, **headers):
                self.send_response(status)
                headers = {"Content_Length": str(len(body)), **headers}
                for name, value in headers.items():
                    if value is not None:
                        self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def drip(handler):
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silence(handler):
    time.sleep(1)


def slow_headers(handler):
    for _ in range(200):
        handler.wfile.write(b"H")
        time.sleep(0.02)


def truncated(handler):
    handler.reply(b"half of it", Content_Length="1000")


def cut_chunks(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"10\r\nhalf")


def bomb(handler):
    handler.reply(gzip.compress(b"\0" * (8 << 20)), Content_Encoding="gzip")


def cut_gzip(handler):
    handler.reply(gzip.compress(b"words " * 99)[:-9], Content_Encoding="gzip")


def no_http(handler):
    handler.wfile.write(b"\x16\x03\x01 what is this?\r\n\r\n")


def gone(handler):
    handler.connection.shutdown(2)
