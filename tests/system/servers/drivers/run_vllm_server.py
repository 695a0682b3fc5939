"""Driver of `vllm serve`: starts the server on loopback, asks it with the OpenAI client, stops it.

Reads a list with one job from standard input, {"folder", "rows", "steps", "vocabulary", "arguments", "models"}, and
prints [{model: rows}] on the last line; a row is {"ids", "logprobs"}, log-probabilities of every token.
"""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from openai import OpenAI

_PATIENCE = 240


def serve(job, port):
    # What `vllm serve` starts: in the CPU's wheel that command looks for a distribution named vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", job["folder"]]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "128",
        "--max-logprobs",
        "-1",
    ]
    return subprocess.Popen([*command, *job["arguments"]], stdout=sys.stderr)


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


def ask(client, job, model, row):
    done = client.completions.create(
        model=model,
        prompt=row,
        max_tokens=job["steps"],
        temperature=0,
        logprobs=job["vocabulary"],
        extra_body={"return_tokens_as_token_ids": True},
    )
    found = done.choices[0].logprobs
    tables = [
        {int(name.removeprefix("token_id:")): value for name, value in step.items()} for step in found.top_logprobs
    ]
    ids = [int(name.removeprefix("token_id:")) for name in found.tokens]
    return {"ids": ids, "logprobs": [[table[token] for token in range(job["vocabulary"])] for table in tables]}


def main():
    [job] = json.load(sys.stdin)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve(job, port)
    try:
        wait(server, port)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked = [(model, row) for row in job["rows"] for model in job["models"]]
        with ThreadPoolExecutor(len(asked)) as pool:  # all at once, so that the server mixes them in its batches
            found = list(pool.map(lambda one: ask(client, job, *one), asked))
    finally:
        server.terminate()
        server.wait(30)
    rows = {
        model: [one for (name, _), one in zip(asked, found, strict=True) if name == model] for model in job["models"]
    }
    print("\n" + json.dumps([rows]))


if __name__ == "__main__":
    main()
