"""A client that loads a SGLang server with token ids, streams the answers, and finds what a steady decode looks like from outside.

All times are the client's (seconds of one clock, when a chunk of the stream arrived); so a step's time includes the scheduler, the
detokeniser and HTTP, as a user sees it.
"""

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from benchmarks.servers import ServerError

PROGRESS_S = 10.0
SLOW = 1.2


@dataclass
class Stream:
    """One request: when it was sent, when each chunk came, and how many tokens there were then."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0


@dataclass(frozen=True)
class Window:
    """The time in which the most requests decode at once.

    Attributes:
        in_flight: requests that decode through all of it.
        seconds: how long it is.
        tokens_per_s: tokens that arrived in it, of all requests, a second.
        step_ms: median time between two tokens of a request.
        mean_step_ms: the same as a mean: `in_flight / tokens_per_s`.
        slow_steps: of steps that took SLOW times the median: the number of the token, and milliseconds (median over requests).
    """

    in_flight: int
    seconds: float
    tokens_per_s: float
    step_ms: float
    mean_step_ms: float
    slow_steps: list[tuple[int, float]]


def random_prompts(count: int, tokens: int, vocabulary: int, seed: int, group: int = 1, shared: int = 0) -> list[list[int]]:
    """Random token ids. The first `shared` tokens are the same within each `group` of neighbours; all else is distinct."""
    generator = random.Random(seed)
    draw = lambda length: generator.choices(range(min(1000, vocabulary // 2), vocabulary), k=length)  # noqa: E731
    prompts: list[list[int]] = []
    for index in range(count):
        if index % group == 0:
            head = draw(shared if group > 1 else 0)
        prompts.append(head + draw(tokens - len(head)))
    return prompts


def steady_window(streams: Sequence[Stream], until: float = float("inf")) -> Window:
    """The longest time with the most requests between their first and last token, not later than `until`.

    Raises:
        ServerError: no request decodes for two steps there.
    """
    edges = []
    for stream in streams:
        if stream.times[0] < min(stream.times[-1], until):
            edges += [(stream.times[0], 1), (min(stream.times[-1], until), -1)]
    edges.sort()
    best, running = (0, 0.0, 0.0, 0.0), 0
    for (start, change), (end, _) in itertools.pairwise(edges):
        running += change
        best = max(best, (running, end - start, start, end))
    in_flight, seconds, start, end = best
    tokens, gaps = 0, []
    at_token: dict[int, list[float]] = {}
    for stream in streams:
        chunks = list(zip(stream.times, stream.tokens, strict=True))
        tokens += sum(max((n for when, n in chunks if when <= edge), default=0) * sign for edge, sign in ((end, 1), (start, -1)))
        inside = [(when, count) for when, count in chunks if start <= when <= end]
        for (before, count), (after, more) in itertools.pairwise(inside):
            step_ms = (after - before) / (more - count) * 1e3
            gaps += [step_ms] * (more - count)
            at_token.setdefault(more, []).append(step_ms)
    if not gaps:
        raise ServerError("no steady decode: no two tokens came while the most requests were in flight; ask for more new tokens")
    rate = tokens / seconds
    median = statistics.median(gaps)
    steps = {token: statistics.median(times) for token, times in sorted(at_token.items())}
    slow = [(token, round(step_ms, 2)) for token, step_ms in steps.items() if step_ms > SLOW * median]
    return Window(in_flight, seconds, rate, median, in_flight / rate * 1e3, slow)


def span(streams: Sequence[Stream]) -> float:
    """Seconds from the first request sent to the last token of all."""
    return max(stream.times[-1] for stream in streams) - min(stream.sent for stream in streams)


class Load:
    """Sends prompts and records the streams.

    Example:
        streams = Load(server.url, print).run(prompts, new_tokens=200)

    Args:
        url: the server's.
        say: takes progress lines.
        timeout_s: longest time one `run` may take.
    """

    def __init__(self, url: str, say: Callable[[str], None], timeout_s: float = 400.0) -> None:
        self.url = url
        self.say = say
        self.timeout_s = timeout_s

    def run(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        *,
        concurrency: int | None = None,
        at_tokens: int | None = None,
        then: Callable[[], None] | None = None,
    ) -> list[Stream]:
        """Streams of all prompts, greedy, `new_tokens` each, at most `concurrency` at a time.

        `then` is called once, in a thread of its own, as soon as every request has `at_tokens` tokens.

        Raises:
            ServerError: a request failed, or it took too long.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompts, new_tokens, concurrency, at_tokens, then), self.timeout_s))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ServerError(f"load on {self.url} failed: {type(error).__name__} {error}") from error

    async def _run(self, prompts, new_tokens, concurrency, at_tokens, then) -> list[Stream]:
        self.begun = time.monotonic()
        self.streams: list[Stream] = []
        self.finished = 0
        self.behind = len(prompts)
        self.reached = asyncio.Event()
        turn = asyncio.Semaphore(concurrency or len(prompts))
        # Encoded before the first is sent, so that all of them leave at once.
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        bodies = [json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True}).encode() for prompt in prompts]
        helpers = [asyncio.create_task(self._report(len(prompts)))]
        if then is not None:
            helpers.append(asyncio.create_task(self._call(then)))
        settings = {"timeout": aiohttp.ClientTimeout(total=None), "connector": aiohttp.TCPConnector(limit=0), "read_bufsize": 2**20}
        try:
            async with aiohttp.ClientSession(**settings) as session:
                tasks = [asyncio.create_task(self._one(session, turn, body, at_tokens)) for body in bodies]
                helpers += tasks
                streams = await asyncio.gather(*tasks)
            if self.reached.is_set():
                await asyncio.gather(*helpers[1 : -len(tasks)])
        finally:
            for helper in helpers:
                helper.cancel()
        return streams

    async def _one(self, session: aiohttp.ClientSession, turn: asyncio.Semaphore, body: bytes, at_tokens: int | None) -> Stream:
        async with turn:
            stream = Stream(time.monotonic())
            self.streams.append(stream)
            async with session.post(f"{self.url}/generate", data=body, headers={"Content-Type": "application/json"}) as response:
                if response.status != 200:
                    raise ServerError(f"/generate answered {response.status}: {(await response.text())[:500]}")
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.monotonic()
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ServerError(f"/generate failed: {chunk['error']}")
                    meta = chunk["meta_info"]
                    before = stream.tokens[-1] if stream.tokens else 0
                    if meta["completion_tokens"] == before:
                        continue  # the end of the stream repeats the last count
                    stream.times.append(now)
                    stream.tokens.append(meta["completion_tokens"])
                    stream.cached_tokens = meta["cached_tokens"]
                    if at_tokens is not None and before < at_tokens <= stream.tokens[-1]:
                        self.behind -= 1
                        if self.behind == 0:
                            self.reached.set()
        if not stream.times:
            raise ServerError("a stream ended without a token")
        self.finished += 1
        return stream

    async def _call(self, then: Callable[[], None]) -> None:
        await self.reached.wait()
        await asyncio.to_thread(then)

    async def _report(self, count: int) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            started = sum(bool(stream.times) for stream in self.streams)
            tokens = sum(stream.tokens[-1] for stream in self.streams if stream.tokens)
            seconds = time.monotonic() - self.begun
            self.say(f"    {seconds:.0f} s: {started} of {count} requests have a first token, {self.finished} ended, {tokens} tokens")
