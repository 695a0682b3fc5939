"""A server of completions on loopback, over real sockets: what it writes follows from the seed; faults can be set."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Completions:
    """``log`` has (time, path, body, Authorization) of every request for a completion; ``faults`` are used up first."""

    def __init__(self, *, delay=0.0, port=0, model="teacher"):
        self.delay, self.model, self.port = delay, model, port
        self.log, self.faults, self.extra, self.working, self.most = [], [], {}, 0, 0
        self.lock = threading.Lock()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self.server.state, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def asked(self):
        """How often each seed was asked for."""
        return Counter(body["seed"] for _, _, body, _ in self.log)


def text_of(seed):
    """A number that is 3 every third time."""
    return f"It is {3 if seed % 3 == 0 else 4}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing on standard error."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has left
            self.close_connection = True

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": self.server.state.model, "object": "model"}]})

    def do_POST(self):
        state = self.server.state
        length = int(self.headers["Content-Length"])
        if len(sent := self.rfile.read(length)) < length:
            raise ConnectionError("the client has left")
        body = json.loads(sent)
        with state.lock:
            state.log.append((time.monotonic(), self.path, body, self.headers["Authorization"]))
            state.working += 1
            state.most = max(state.most, state.working)
            fault = state.faults.pop(0) if state.faults else None
        try:
            if state.delay:
                time.sleep(state.delay)
            self.meet(fault, body)
        finally:
            with state.lock:
                state.working -= 1

    def meet(self, fault, body):
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "page":
            self.answer(200, "<html>", kind="text/html")
        elif isinstance(fault, dict):
            self.answer(200, fault)
        elif fault is not None:
            self.answer(fault, {"error": {"message": f"no luck,\nkey {self.headers['Authorization']}"}})
        elif body["model"] != self.server.state.model:
            self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        else:
            self.answer(200, self.completion(body))

    def completion(self, body):
        text = text_of(body["seed"])
        choice = {"index": 0, "finish_reason": "length" if body["max_tokens"] < 3 else "stop"}
        if self.path == "/v1/completions":
            return {"object": "text_completion", "choices": [{**choice, "text": text}]}
        message = {"role": "assistant", "content": text, **self.server.state.extra}
        return {"object": "chat.completion", "choices": [{**choice, "message": message}]}

    def answer(self, status, content, kind="application/json"):
        content = json.dumps(content).encode() if kind == "application/json" else content.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status >= 400:
            self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(content)
