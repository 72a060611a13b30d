"""A server of OpenAI's door that says a word again and again, or fails in a way of its own:
`python small_peer.py KIND PORT`, and any mark to know it by.

    good       says what it is asked for, and counts it
    plain      refuses fields that are not in every server, and counts nothing
    dies       ends before it listens
    silent     listens and never answers
    error      its streams end in an error
    cut        its streams break off
    parent     good, with a child in a session of its own that does not end when it is told to
"""

import json
import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KNOWN = {"model", "messages", "max_tokens", "temperature", "stream"}
CHILD = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); held = bytearray(1 << 26);"
    "print('ready', flush=True); sys.stdin.read(); signal.pause()"
)


class Peer(BaseHTTPRequestHandler):
    """One connection, closed after its answer."""

    kind = "good"

    def do_GET(self) -> None:
        """The list of models."""
        self._answer(200, {"data": [{"id": "small"}]})

    def do_POST(self) -> None:
        """A stream of `max_tokens` words."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.kind == "plain" and (unknown := sorted(set(body) - KNOWN)):
            self._answer(422, {"error": f"unknown fields: {unknown}"})
            return
        self.send_response(200)
        self.end_headers()
        for number in range(body["max_tokens"]):
            if number == 2 and self.kind == "error":
                self._event({"error": {"message": "the device is gone"}})
                return
            if number == 2 and self.kind == "cut":
                return
            self._event({"choices": [{"delta": {"content": "word "}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        if self.kind != "plain":
            usage = {
                "completion_tokens": body["max_tokens"],
                "prompt_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 8},
            }
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def main(kind: str, port: int) -> None:
    """Serve until SIGTERM."""
    if kind == "dies":
        print("first line\nthere is no such device", flush=True)
        sys.exit(3)
    if kind == "silent":
        with socket.create_server(("127.0.0.1", port)):
            signal.pause()
    if kind == "parent":
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert child.stdout is not None
        child.stdout.readline()
        print(f"child {child.pid}", flush=True)
        # Its end is our end's affair no more: it goes on when we are gone.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Peer.kind = kind
    with ThreadingHTTPServer(("127.0.0.1", port), Peer) as server:
        server.daemon_threads = True
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
