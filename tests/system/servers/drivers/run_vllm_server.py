"""Driver of `vllm serve`: starts the server on loopback, sends it requests with the OpenAI client, stops it.

Reads a list with one job from standard input, {"folder", "vocabulary", "arguments", "requests"}, and prints
[{"answers", "metrics", "log"}] on the last line. A request is {"ids" or "messages", "steps", "model", "body"}, where
"body" has fields of vLLM's own; all are sent at once. An answer is {"ids", "logprobs", "verdict"}, log-probabilities of
every token, or {"status", "error"}.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai

_PATIENCE = 240


def serve(job, port, log):
    # What `vllm serve` starts: in the CPU's wheel that command looks for a distribution named vllm, and ends.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        job["folder"],
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    return subprocess.Popen([*command, "--max-logprobs", "-1", *job["arguments"]], stdout=log, stderr=log)


def wait(server, port):
    for _ in range(_PATIENCE):
        assert server.poll() is None, "the server ended"
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise TimeoutError


def ask(client, job, request):
    common = {"model": request.get("model", job["folder"]), "max_tokens": request["steps"], "temperature": 0}
    try:
        if "messages" in request:
            done = client.chat.completions.create(
                **common, messages=request["messages"], extra_body={"return_token_ids": True, **request.get("body", {})}
            )
            return {"ids": done.choices[0].token_ids, "verdict": verdict_of(done)}
        body = {"return_tokens_as_token_ids": True, **request.get("body", {})}
        done = client.completions.create(**common, prompt=request["ids"], logprobs=job["vocabulary"], extra_body=body)
    except openai.APIStatusError as error:
        return {"status": error.status_code, "error": error.message}
    found = done.choices[0].logprobs
    tables = [{number(name): value for name, value in step.items()} for step in found.top_logprobs]
    rows = [[table[token] for token in range(job["vocabulary"])] for table in tables]
    return {"ids": [number(name) for name in found.tokens], "logprobs": rows, "verdict": verdict_of(done)}


def number(name):
    return int(name.removeprefix("token_id:"))


def verdict_of(done):
    return (done.kv_transfer_params or {}).get("steering")


def main():
    [job] = json.load(sys.stdin)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            server = serve(job, port, file)
        try:
            wait(server, port)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            with ThreadPoolExecutor(len(job["requests"])) as pool:  # all at once, so that the server mixes them
                answers = list(pool.map(lambda request: ask(client, job, request), job["requests"]))
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        finally:
            server.terminate()
            server.wait(30)
            sys.stderr.write(log.read_text())
        print("\n" + json.dumps([{"answers": answers, "metrics": metrics, "log": log.read_text()}]))


if __name__ == "__main__":
    main()
