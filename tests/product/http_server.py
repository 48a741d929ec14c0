"""Small HTTP servers on loopback, for what asks one."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(answer):
    """A server whose port is given. `answer(handler)` answers a request; `handler.asked` is its body."""

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            self.asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer(self)

        do_GET = do_POST = do

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *line):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
