"""Ten minutes of everything at once against one server, over loopback: `python benchmarks/soak.py --minutes 10`.

Streams, whole answers, clients that hang up, bad requests, strangers, uploads, rollbacks and removals, all at once. The
run fails on any answer that the client did not cause, on a text that differs from the same request's earlier text, and
on memory that keeps growing. Writes `docs/benchmarks/soak.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from common.machine import facts, table
from common.page import PAGES, head, publish

from overture.formats import native
from overture.models.load import load_base
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.serve.keys import FILE, KeyRing, Role
from overture.spec import ModelSpec
from overture.store import PromptStore

REPORT = PAGES / "soak.md"
TENANTS, PROMPTS = 12, 8
"""Tenants, and prompts of each."""
TEXTS = ["Any dinner ideas?", "Once upon a time", "What shall I do today?", "a b c"]
GROWTH = 0.10
"""Most that memory may grow from the second fifth of the run to the last. The first fifth fills caches."""


@dataclass
class Tally:
    """What happened."""

    done: Counter[tuple[str, int | str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    texts: dict[tuple[str, str, str], str] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    tokens: int = 0

    def expect(self, what: str, answer: httpx.Response, *statuses: int) -> bool:
        """Count an answer, and whether it is one that the client asked for; 429 always is."""
        self.done[what, answer.status_code] += 1
        if answer.status_code not in (*statuses, 429):
            self.wrong.append(f"{what}: {answer.status_code} {answer.text[:200]}")
        return answer.status_code == statuses[0]

    def same(self, key: tuple[str, str, str], text: str) -> None:
        """Compare a greedy answer with the first to the same request."""
        if self.texts.setdefault(key, text) != text:
            self.wrong.append(f"{key}: {text!r} after {self.texts[key]!r}")


def random_prompt(spec: ModelSpec, seed: int, length: int) -> SoftPrompt:
    """A prefix for even seeds, virtual tokens for odd ones."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 2:
        tokens = spec.embedding_scale * torch.randn(length, spec.hidden_size, generator=generator)
        return SoftPrompt(value=VirtualTokens(tokens), base=spec.base)
    keys, values = (
        tuple(0.2 * torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in spec.layers)
        for _ in range(2)
    )
    return SoftPrompt(value=KVPrefix(keys, values), base=spec.base)


class Crowd:
    """Clients of one server.

    Args:
        url: the server.
        secrets: keys by tenant, and the administrator's as `admin`.
        files: prompt files to upload.
    """

    def __init__(self, url: str, secrets: dict[str, str], files: list[bytes]) -> None:
        self.tally, self._files, self._secrets = Tally(), files, secrets
        self._client = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=200))

    async def run(self, workers: int, seconds: float) -> None:
        """Work for so long."""
        end = time.monotonic() + seconds
        chores: list[tuple[int, Callable[[random.Random], Awaitable[None]]]] = [
            (6, self.stream),
            (4, self.whole),
            (3, self.hang_up),
            (4, self.bad),
            (2, self.publish),
            (1, self.look),
        ]
        weights, tasks = [weight for weight, _ in chores], [task for _, task in chores]

        async def work(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                (task,) = rng.choices(tasks, weights)
                try:
                    await task(rng)
                except Exception as error:  # a connection that broke is the server's error as well
                    self.tally.wrong.append(f"{task.__name__}: {type(error).__name__} {error}")

        await asyncio.gather(*(work(seed) for seed in range(workers)))
        await self._client.aclose()

    def _as(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._secrets[who]}"}

    def _request(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        tenant = f"tenant-{rng.randrange(TENANTS)}"
        model = rng.choice(["tiny", f"prompt-{rng.randrange(PROMPTS)}", f"shared+prompt-{rng.randrange(PROMPTS)}"])
        text = rng.choice(TEXTS)
        return tenant, {"model": model, "prompt": text, "max_tokens": 24, "temperature": 0}

    async def whole(self, rng: random.Random) -> None:
        tenant, body = self._request(rng)
        answer = await self._client.post("/v1/completions", json=body, headers=self._as(tenant))
        if self.tally.expect("answer", answer, 200):
            document = answer.json()
            self.tally.tokens += document["usage"]["completion_tokens"]
            self.tally.same((tenant, document["model"], body["prompt"]), document["choices"][0]["text"])

    async def stream(self, rng: random.Random) -> None:
        tenant, body = self._request(rng)
        started, text, model = time.perf_counter(), "", ""
        request = body | {"stream": True}
        async with self._client.stream("POST", "/v1/completions", json=request, headers=self._as(tenant)) as answer:
            if answer.status_code != 200:
                await answer.aread()
            if not self.tally.expect("stream", answer, 200):
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.tally.wrong.append(f"stream: {event['error']}")
                        return
                    if not text:
                        self.tally.first.append(time.perf_counter() - started)
                    model, text = event["model"], text + event["choices"][0]["text"]
        self.tally.same((tenant, model, body["prompt"]), text)

    async def hang_up(self, rng: random.Random) -> None:
        tenant, body = self._request(rng)
        request = body | {"stream": True, "max_tokens": 200, "n": rng.choice([1, 3])}
        async with self._client.stream("POST", "/v1/completions", json=request, headers=self._as(tenant)) as answer:
            self.tally.expect("hung up", answer, 200)
            async for _ in answer.aiter_lines():
                if rng.random() < 0.2:
                    return

    async def bad(self, rng: random.Random) -> None:
        tenant, body = self._request(rng)
        headers = self._as(tenant)
        kind, content, statuses = rng.choice(
            [
                ("no such model", body | {"model": "nobody"}, (404,)),
                ("another's prompt", body | {"model": "admin/secret"}, (404,)),
                ("too long", body | {"prompt": "word " * 2000}, (400,)),
                ("unknown field", body | {"beam_width": 3}, (400,)),
                ("out of range", body | {"temperature": 9}, (400,)),
                ("half a surrogate", b'{"model": "tiny", "prompt": "\\ud800"}', (400,)),
                ("no JSON", b"{" * 1000, (400,)),
                ("too large", b"x" * (3 << 20), (413,)),
                ("no key", body, (401,)),
            ]
        )
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = ({} if kind == "no key" else headers) | {"Content-Type": "application/json"}
        try:
            answer = await self._client.post("/v1/completions", content=data, headers=headers)
        except (httpx.WriteError, httpx.ReadError):
            if kind != "too large":  # refused before it was sent to its end: the connection is closed
                raise
            self.tally.done["too large", "cut off"] += 1
            return
        self.tally.expect(kind, answer, *statuses)

    async def publish(self, rng: random.Random) -> None:
        """A prompt comes, changes, is used, and goes."""
        admin, name = self._as("admin"), f"passing-{rng.randrange(10**9)}"
        place = f"/admin/tenants/tenant-0/prompts/{name}"
        for _ in range(2):
            answer = await self._client.post(place, content=rng.choice(self._files), headers=admin)
            self.tally.expect("upload", answer, 201)
        self.tally.expect("rollback", await self._client.post(f"{place}/rollback", json={}, headers=admin), 200)
        body = {"model": name, "prompt": "Hello", "max_tokens": 2}
        self.tally.expect(
            "answer", await self._client.post("/v1/completions", json=body, headers=self._as("tenant-0")), 200
        )
        self.tally.expect("removal", await self._client.delete(place, headers=admin), 200)
        broken = await self._client.post(place, content=self._files[0][:-1], headers=admin)
        self.tally.expect("broken upload", broken, 400)

    async def look(self, rng: random.Random) -> None:
        headers = self._as(f"tenant-{rng.randrange(TENANTS)}")
        for path in ("/v1/models", "/v1/models/prompt-0", "/v1/load"):
            self.tally.expect("look", await self._client.get(path, headers=headers), 200)
        self.tally.expect("metrics", await self._client.get("/metrics", headers=self._as("admin")), 200)


async def sampled(pid: int, into: list[tuple[float, int]]) -> None:
    """Resident memory of the server in bytes, every second."""
    started = time.monotonic()
    while True:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        if found:
            into.append((time.monotonic() - started, int(found[1]) * 1024))
        await asyncio.sleep(1)


async def soak(process: subprocess.Popen[str], crowd: Crowd, workers: int, seconds: float) -> list[tuple[float, int]]:
    memory: list[tuple[float, int]] = []
    watching = asyncio.create_task(sampled(process.pid, memory))
    await crowd.run(workers, seconds)
    watching.cancel()
    return memory


def prepared(place: Path) -> tuple[dict[str, str], list[bytes]]:
    """A store with tenants, prompts and keys."""
    spec = ModelSpec.of(load_base("tiny")[0])
    with PromptStore(place) as store:
        for tenant in range(TENANTS):
            for number in range(PROMPTS):
                prompt = random_prompt(spec, 100 * tenant + number, 4 + number)
                store.publish(f"tenant-{tenant}", f"prompt-{number}", prompt)
        store.publish("tasks", "shared", random_prompt(spec, 9999, 6))
        store.publish("admin", "secret", random_prompt(spec, 9998, 6))
    ring = KeyRing(place / FILE)
    secrets = {f"tenant-{t}": ring.add(Role.TENANT, f"tenant-{t}")[1] for t in range(TENANTS)}
    secrets["admin"] = ring.add(Role.ADMIN)[1]
    ring.close()
    return secrets, [native.dumps(random_prompt(spec, seed, 8)) for seed in range(4)]


def fifth(memory: list[tuple[float, int]], number: int) -> float:
    """Median resident memory in one fifth of the run, in MiB."""
    count = len(memory)
    return (
        median(
            size for _, size in memory[number * count // 5 : max((number + 1) * count // 5, number * count // 5 + 1)]
        )
        / 2**20
    )


def report(
    crowd: Crowd, memory: list[tuple[float, int]], arguments: argparse.Namespace, code: int | None
) -> tuple[list[str], bool]:
    """The page, and whether all was well."""
    tally, parts = crowd.tally, [fifth(memory, number) for number in range(5)]
    growth = parts[4] / parts[1] - 1
    first = sorted(tally.first) or [0.0]
    good = not tally.wrong and growth <= GROWTH and code == 0
    statuses = [(what, str(status), f"{n:,}") for (what, status), n in sorted(tally.done.items(), key=str)]
    lines = [
        *head(
            "Soak",
            measures="Everything at once against one server, over loopback: streams, whole answers, clients that hang"
            " up, bad requests, strangers, uploads, rollbacks and removals.",
            target="no answer that its client did not cause, no text that differs from the same request's earlier text,"
            f" memory that grows by {GROWTH:.0%} at most",
        ),
        f"{arguments.minutes:g} minutes, {arguments.workers} clients of {TENANTS} tenants with {TENANTS * PROMPTS}"
        " prompts, `tiny`, one server process.",
        "",
        f"**{'Passed' if good else 'Failed'}**: {sum(tally.done.values()):,} requests, {len(tally.wrong)} answered"
        f" otherwise than the client caused; {len(tally.texts):,} different greedy requests, each with the same text"
        f" every time; exit code {code} after SIGTERM.",
        "",
        f"Time to first token of a stream: median {1000 * median(first):.0f} ms, 95 % within"
        f" {1000 * first[int(0.95 * len(first))]:.0f} ms.",
        "",
        *table(
            ("fifth of the run", *"12345"),
            [("resident memory, MiB, median", *(f"{part:.0f}" for part in parts))],
        ),
        "",
        f"From the second fifth to the last: {growth:+.1%} (at most {GROWTH:+.0%}).",
        "",
        *table(("request", "status", "count"), statuses),
        "",
        *(f"- {line}" for line in tally.wrong[:20]),
        *([""] if tally.wrong else []),
        *facts(("torch", "transformers", "fastapi", "uvicorn")),
    ]
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overture-soak-") as folder:
        place = Path(folder) / "store"
        secrets, files = prepared(place)
        command = [sys.executable, "-m", "overture.cli", "serve", "--store", str(place), "--port", "0", "--quiet"]
        command += ["--shared", "tasks", "--requests-per-minute", "100000"]
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                url = re.search(r"http://[^\s:]+:\d+", line)
                if url is None:
                    log.seek(0)
                    raise SystemExit(log.read())
                crowd = Crowd(url[0], secrets, files)
                memory = asyncio.run(soak(process, crowd, arguments.workers, 60 * arguments.minutes))
                process.terminate()
                code = process.wait(60)
            finally:
                process.kill()
            log.seek(0)
            crowd.tally.wrong += [line.strip() for line in log if "failed:" in line]
    lines, good = report(crowd, memory, arguments, code)
    publish(lines, arguments.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
