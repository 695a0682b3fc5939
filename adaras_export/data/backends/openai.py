"""Complete attempts by a server with OpenAI's interface: many requests at a time, retried, not too many a minute.

Knows no model: prompts go out as text or messages, and the server's template and tokenizer are its own business. What
it answers is foreign; a key comes from the environment and is written nowhere.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from adaras_export.core.traces import Question, Settings
from adaras_export.data.sampling_plan import Attempt, Completion
from adaras_export.errors import EndpointError, first_line, require
from adaras_export.modeling.generation import Sampling, row_seed, sampled_by

_SEED_BITS = 31
"""What every server takes: llama.cpp reads 32 bits, and JavaScript rounds more than 53."""

_GREETING_SECONDS = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server is, and how hard it may be pressed.

    Attributes:
        url: what stands before ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        model: the name under which the server has the model.
        key: sent as a bearer token.
        concurrency: requests at a time.
        per_minute: requests in a minute, retries included; evenly spaced.
        retries: of one request, after a lost connection or a status of 408, 409, 429 or 5xx. Waits double from half a
            second to eight, or are what the server asks for.
        timeout: seconds that one answer may take.

    Raises:
        EndpointError: an address of another form, or a number outside its range.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    concurrency: int = 16
    per_minute: float | None = None
    retries: int = 6
    timeout: float = 600.0

    def __post_init__(self) -> None:
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise EndpointError(f"endpoint {self.url}: expected an address such as http://127.0.0.1:8000/v1")
        if "@" in address.netloc:
            raise EndpointError("endpoint: its address holds a name or password; expected a key in the environment")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise EndpointError("endpoint: its key has characters that no header can hold; expected ASCII, in one line")
        wrong = [
            f"{name} {value} (expected {expected})"
            for name, value, expected, holds in (
                ("concurrency", self.concurrency, "1 to 1000", 1 <= self.concurrency <= 1000),
                ("requests per minute", self.per_minute, "above 0", self.per_minute is None or self.per_minute > 0),
                ("retries", self.retries, "0 or more", self.retries >= 0),
                ("timeout", self.timeout, "above 0", self.timeout > 0),
            )
            if not holds
        ]
        if wrong:
            raise EndpointError(f"endpoint {self.url}: {'; '.join(wrong)}")


class EndpointBackend:
    """Attempts as requests: text to ``/completions``, messages to ``/chat/completions``.

    Raises:
        MissingExtraError: the official client is not installed.
    """

    streams = True

    def __init__(self, endpoint: Endpoint, sampling: Sampling) -> None:
        self._openai: Any = require("openai", "endpoint", "collect from an endpoint")
        self._endpoint, self._sampling = endpoint, sampling
        self._pace = _Pace(endpoint.per_minute)
        self._greeted = False

    @property
    def settings(self) -> Settings:
        """The sampling; a server does not tell its precision and its chat template."""
        return sampled_by("server", self._sampling)

    def arranged(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions as they are: the server makes its own batches."""
        return questions

    def complete(
        self, batch: Sequence[Attempt], missing: Collection[str]
    ) -> Generator[Mapping[str, Completion], None, None]:
        """Each completion when it arrives. Requests go on while the caller works on one.

        Raises:
            EndpointError: the server cannot be reached, refuses, or answers something else than a completion.
        """
        work = [attempt for attempt in batch if attempt.id in missing]
        arrived: SimpleQueue[Mapping[str, Completion] | None] = SimpleQueue()
        handles: SimpleQueue[Callable[[], object]] = SimpleQueue()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(asyncio.run, self._all(work, arrived.put, handles.put))
            future.add_done_callback(lambda _: arrived.put(None))
            try:
                while (piece := arrived.get()) is not None:
                    yield piece
            finally:
                if not future.done():  # the caller has failed, or somebody wants to leave
                    handles.get()()
        future.result()

    async def _all(
        self,
        work: Sequence[Attempt],
        put: Callable[[Mapping[str, Completion]], None],
        hand: Callable[[Callable[[], object]], None],
    ) -> None:
        """Complete everything; ``hand`` gets at once what another thread may call to end this."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        hand(lambda: loop.call_soon_threadsafe(task.cancel))
        left = iter(work)

        async def worker(client: Any) -> None:  # noqa: ANN401 - of an optional library
            for attempt in left:
                put({attempt.id: await self._answer(client, attempt)})

        async with self._client() as client:
            await self._greet(client)
            workers = [asyncio.create_task(worker(client)) for _ in range(min(self._endpoint.concurrency, len(work)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for one in workers:
                    one.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        """The official client; its own transport, so that retries keep the pace, too."""
        endpoint = self._endpoint
        transport = self._openai.DefaultAsyncHttpxClient(event_hooks={"request": [self._pace]})
        client = self._openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.key or "none",  # the client wants one; servers that need none do not look at it
            max_retries=endpoint.retries,
            timeout=endpoint.timeout,
            http_client=transport,
        )
        async with client:
            yield client

    async def _greet(self, client: Any) -> None:  # noqa: ANN401 - of an optional library
        """Find out at once, not after all retries, that there is no server or that it does not take the key."""
        if self._greeted:
            return
        impatient = client.with_options(max_retries=0, timeout=_GREETING_SECONDS)
        try:
            await impatient.models.with_raw_response.list()
        except (self._openai.AuthenticationError, self._openai.APIConnectionError) as error:
            raise self._told(error) from error
        except self._openai.APIStatusError:
            pass  # it is there; not every server has a list
        self._greeted = True

    async def _answer(self, client: Any, attempt: Attempt) -> Completion:  # noqa: ANN401 - of an optional library
        sampling, prompt = self._sampling, attempt.question.prompt
        settings: dict[str, Any] = {
            "model": self._endpoint.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": row_seed(sampling.seed, attempt.id, _SEED_BITS),
        }
        if sampling.stop is not None:
            settings["stop"] = [sampling.stop]
        try:
            if isinstance(prompt, str):
                answer = await client.completions.create(prompt=prompt, **settings)
            else:
                answer = await client.chat.completions.create(messages=[dict(one) for one in prompt], **settings)
        except self._openai.APIError as error:
            raise self._told(error, f", trace {attempt.id}") from error
        try:
            return completion_of(
                answer.to_dict(warnings=False) if isinstance(answer, self._openai.BaseModel) else answer
            )
        except ValueError as error:
            raise EndpointError(
                f"{self._endpoint.url}: answered trace {attempt.id} with {error}; "
                "expected a completion, of an address such as http://127.0.0.1:8000/v1"
            ) from error

    def _told(self, error: Any, about: str = "") -> EndpointError:  # noqa: ANN401 - of an optional library
        """An error of the client in one line: what was found, and what to do."""
        openai, endpoint = self._openai, self._endpoint
        status = error.status_code if isinstance(error, openai.APIStatusError) else 0
        if isinstance(error, openai.APITimeoutError):
            found, remedy = f"no answer in {endpoint.timeout:g} s", "give it more time, or fewer requests at once"
        elif isinstance(error, openai.APIConnectionError):
            reason = first_line(error.__cause__ or error)
            found, remedy = f"cannot be reached ({reason})", "expected a running server with OpenAI's interface"
        else:
            message = " ".join(str(error.message).removeprefix(f"Error code: {status} - ").split())
            found = f"answers {status} ({message})" if status else f"answers with an error ({message})"
            remedy = _REMEDIES.get(status, "see what the server says about it")
        if endpoint.key:
            found = found.replace(endpoint.key, "***")
        return EndpointError(f"{endpoint.url}, model {endpoint.model}{about}: {found}; {remedy}; run again to go on")


_REMEDIES = {
    401: "expected a valid key in the environment; --api-key-env names the variable",
    403: "expected a key that may use the model",
    404: "expected the name of a model that it serves, and an address that ends before /chat/completions",
    429: "expected fewer requests; lower --concurrency or --requests-per-minute",
}


class _Pace:
    """Called before every request: waits for its turn."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0

    async def __call__(self, request: object) -> None:  # noqa: ARG002 - the protocol
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._gap
        if turn > now:
            await asyncio.sleep(turn - now)


def completion_of(answer: object) -> Completion:
    """What a server wrote. Reasoning that it keeps apart stands before the answer, in the tags of Qwen and DeepSeek.

    Raises:
        ValueError: the answer is no completion; says what it is.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError("something without exactly one choice")
    choice = choices[0]
    cut = choice.get("finish_reason") == "length"
    if "message" not in choice:
        return Completion(_text(choice, "text"), cut)
    message = choice["message"]
    if not isinstance(message, dict):
        raise ValueError("a choice without a message")  # noqa: TRY004 - all that is wrong is a ValueError
    content = _text(message, "content")
    reasoning = _text(message, "reasoning_content") or _text(message, "reasoning")
    if not reasoning.strip():
        return Completion(content, cut)
    opened = f"<think>\n{reasoning.strip(_LINE_END)}"
    if cut and not content.strip():  # it was still thinking
        return Completion(opened, cut)
    return Completion(f"{opened}\n</think>\n\n{content.lstrip(_LINE_END)}", cut)


_LINE_END = "\n"


def _text(holder: Mapping[str, Any], key: str) -> str:
    """The text behind a key, or none; half characters, which no file of traces takes, become question marks."""
    value = holder.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"a {key} of type {type(value).__name__}")  # noqa: TRY004 - see above
    return value.encode(errors="replace").decode()
