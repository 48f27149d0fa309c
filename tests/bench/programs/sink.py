"""Takes what is posted to the port of the loopback that it is given: ``sink.py PORT {answers,hangs}``."""

from __future__ import annotations

import http.server
import os
import sys
import threading
import time

HANGS_S = 900.0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if sys.argv[2] == "hangs":
            time.sleep(HANGS_S)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("up", flush=True)
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
