"""Driver of the web page: Chromium without a window, and a server on loopback that sends files and nothing else.

Reads a list of jobs as JSON, each {"chromium", "folder", "asks"}; an ask is {"prompt", "tokens"} and, where wanted,
"times" (of the rule's strength), "always" (whatever the gate says) and "stop" (at the first token). Prints for each job
{"loaded", "prompt", "answers", "requests", "complaints"}, the first two of which are what the page says and proposes
when it has loaded the model.
"""

import json
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from playwright.sync_api import sync_playwright

sys.modules["adaras_export"] = None  # importing it fails from here on

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = "#go:enabled, #status.failed"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def answer(page, ask):
    page.fill("#prompt", ask["prompt"])
    page.fill("#tokens", str(ask["tokens"]))
    page.fill("#strength", str(ask.get("times", 1)))
    if page.is_visible("#always"):
        page.set_checked("#always", ask.get("always", False))
    page.click("#go")
    if ask.get("stop"):
        page.wait_for_selector("#base:not(:empty)")
        page.click("#stop")
    page.wait_for_selector(READY, timeout=300_000)
    found = {"status": page.inner_text("#status"), "parting": page.inner_text("#parting")}
    for column in ("base", "steered"):
        tokens = page.get_attribute(f"#{column}", "data-tokens").split()
        found[column] = {"ids": [int(token) for token in tokens], "text": page.text_content(f"#{column}")}
    if page.is_visible("#gate"):
        probability, steered = (page.get_attribute("#gate", f"data-{name}") for name in ("probability", "steered"))
        found["decision"] = [float(probability), steered == "true"]
    return found


def run(browser, job):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=job["folder"]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    requests, complaints = [], []
    context.on("request", lambda request: requests.append(request.url))
    context.on("console", lambda message: complaints.append(message.text))
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    try:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_selector(READY, timeout=300_000)
        loaded, prompt = page.inner_text("#status"), page.input_value("#prompt")
        answers = [answer(page, ask) for ask in job["asks"]]
    finally:
        context.close()
        server.shutdown()
    return {"loaded": loaded, "prompt": prompt, "answers": answers, "requests": requests, "complaints": complaints}


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=jobs[0]["chromium"], args=FLAGS)
        results = [run(browser, job) for job in jobs]
        browser.close()
    print("\n" + json.dumps(results))
