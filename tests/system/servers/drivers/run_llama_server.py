"""Driver of llama-server: starts it with a model and options, and asks over HTTP what it would say next.

Reads a list of jobs as JSON from standard input, each {"command", "prompts", "vocabulary"}; prints, as JSON on the last
line, for each job the log-probabilities of all tokens behind each prompt of token ids. Needs nothing but Python.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

_SECONDS = 120
_PRINTABLE = 65  # a token that ends a character; behind half a one, the server would wait for the rest, and say nothing


def serve(job, log):
    """The answers of one server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*job["command"], "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            return [ask(f"http://127.0.0.1:{port}/completion", prompt, job["vocabulary"]) for prompt in job["prompts"]]
        finally:
            server.terminate()


def wait_for(url, server):
    """Return when the server has loaded its model."""
    end = time.monotonic() + _SECONDS
    while not listens(url):
        if time.monotonic() > end or server.poll() is not None:
            sys.exit(f"the server did not start: {Path('server.log').read_text()[-2000:]}")
        time.sleep(0.05)


def listens(url):
    """Whether the server answers, and is not just loading."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS):
            return True
    except OSError:
        return False


def ask(url, prompt, vocabulary, **more):
    """Log-probabilities of all tokens behind a prompt. The cache of the prompt before is used, as in generating."""
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": True, "temperature": 0, **more}
    asked["logit_bias"] = [[_PRINTABLE, 1e6]]  # for what is chosen, not for what is said of the others
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_SECONDS) as response:
        [told] = json.load(response)["completion_probabilities"]
    found = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
    return [found[token] for token in range(vocabulary)]


if __name__ == "__main__":
    with Path("server.log").open("wb") as log:
        results = [serve(job, log) for job in json.load(sys.stdin)]
    print(json.dumps(results))
