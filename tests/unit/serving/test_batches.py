"""Files and batches through the official client: accepted once, answered once, found again."""

import asyncio
import io
import json
import time
from dataclasses import replace

import openai
import pytest

from granite_ray.serving.answerer import Answerer
from granite_ray.serving.batch_run import UnitAsker
from granite_ray.serving.calls import ReplicaDiedError
from tests.unit.serving.conftest import OTHER_KEY

MODEL = "quickstart"
CHAT = "/v1/chat/completions"


def line(number, url=CHAT, **body):
    turns = [{"role": "user", "content": f"Question {number}"}]
    body = {"model": MODEL, "messages": turns, "max_tokens": 8, "temperature": 0, **body}
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": body}


def jsonl(lines):
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


async def upload(server, data, name="in.jsonl", key=None):
    client = server.openai(*([key] if key else []))
    return await client.files.create(file=(name, data), purpose="batch")


async def create(server, lines, endpoint=CHAT, **values):
    file = await upload(server, jsonl(lines))
    return await server.openai().batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **values
    )


async def output(server, file_id):
    content = await server.openai().files.content(file_id)
    return [json.loads(one) for one in content.content.splitlines()]


def test_every_request_of_a_batch_is_answered_once_and_as_it_would_be_alone(serve):
    server = serve()
    lines = [line(number) for number in range(40)]

    async def run():
        async with server.running():
            batch = await create(server, lines, metadata={"night": "1"})
            ended = await server.ended(batch.id)
            rows = await output(server, ended.output_file_id)
            client = server.openai()
            alone = await client.chat.completions.create(**lines[7]["body"])
            listed = [one.id async for one in client.batches.list()]
            return ended, rows, alone, listed

    ended, rows, alone, listed = asyncio.run(run())
    assert (ended.status, ended.metadata) == ("completed", {"night": "1"})
    assert ended.request_counts.completed == ended.request_counts.total == 40
    assert ended.error_file_id is None
    assert [row["custom_id"] for row in rows] == [one["custom_id"] for one in lines]
    assert rows[7]["response"]["status_code"] == 200
    message = rows[7]["response"]["body"]["choices"][0]["message"]
    assert message["content"] == alone.choices[0].message.content
    assert listed == [ended.id]


def test_requests_that_are_wrong_go_to_the_error_file(serve):
    server = serve()
    lines = [line(0), line(1, temperature=99), line(2, model="other"), line(3, stream=True)]

    async def run():
        async with server.running():
            ended = await server.ended((await create(server, lines)).id)
            good = await output(server, ended.output_file_id)
            return ended, good, await output(server, ended.error_file_id)

    ended, good, bad = asyncio.run(run())
    assert [row["custom_id"] for row in good] == ["c0"]
    assert [row["response"]["status_code"] for row in bad] == [400, 404, 400]
    assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 3)


def test_a_bug_in_the_runner_delays_batches_and_ends_none(serve, monkeypatch):
    server = serve()
    unfinished, calls = server.gateway.batches.unfinished, []

    def fail_once(names):
        calls.append(names)
        if len(calls) == 1:
            raise KeyError("a bug")
        return unfinished(names)

    monkeypatch.setattr(server.gateway.batches, "unfinished", fail_once)

    async def run():
        async with server.running():
            return await server.ended((await create(server, [line(0)])).id)

    assert asyncio.run(run()).status == "completed"
    assert len(calls) > 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 entries"),
        (b"nonsense\n", "Line 1: it is not valid JSON"),
        (jsonl([line(0), line(0)]), "Line 2: its custom_id stands in an earlier line"),
        (jsonl([line(0, url="/v1/completions")]), "method and url must be POST"),
        (b'{"custom_id": "a"}\n', "must be an object with"),
        (b"[" * 5000 + b"\n", "Line 1"),
    ],
)
def test_a_file_that_is_no_batch_fails_whole_with_its_lines_named(serve, data, words):
    server = serve()

    async def run():
        async with server.running():
            file = await upload(server, data)
            batch = await server.openai().batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            return await server.ended(batch.id)

    ended = asyncio.run(run())
    assert ended.status == "failed"
    assert words in ended.errors.data[0].message


class Slow:
    """Replicas that hold calls until told otherwise, around real ones."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer
        self.may_answer = asyncio.Event()
        self.num_calls = 0

    async def complete(self, call, *, is_interactive=True):
        self.num_calls += 1
        if self.num_calls > 20:
            await self.may_answer.wait()
        return await self.answerer.complete(call, is_interactive=is_interactive)


@pytest.fixture
def slow(serve, answerers):
    server = serve()
    server.gateway.replicas = Slow(answerers(server.gateway.config))
    return server


def test_a_restart_goes_on_and_asks_only_what_is_missing(serve, slow):
    lines = [line(number) for number in range(64)]

    async def begin():
        async with slow.running():
            batch = await create(slow, lines)
            async with asyncio.timeout(60):
                while not slow.gateway.batches.pieces(found(slow, batch.id)):
                    await asyncio.sleep(0.05)
        return batch.id

    def found(server, batch_id):
        return server.gateway.batches.get("alice", batch_id)

    batch_id = asyncio.run(begin())
    server = serve()
    num_stored = len(server.gateway.batches.pieces(found(server, batch_id)))
    assert 0 < num_stored < 4
    again = Slow(server.gateway.replicas)
    server.gateway.replicas = again

    async def resume():
        again.may_answer.set()
        async with server.running():
            ended = await server.ended(batch_id)
            async with asyncio.timeout(60):
                while server.gateway.batches.pieces(found(server, batch_id)):
                    await asyncio.sleep(0.05)  # they go once the output is there
            return ended, await output(server, ended.output_file_id)

    ended, rows = asyncio.run(resume())
    assert ended.status == "completed"
    assert [row["custom_id"] for row in rows] == [one["custom_id"] for one in lines]
    assert again.num_calls == 64 - 16 * num_stored


def test_a_cancelled_batch_keeps_what_is_answered_and_names_what_is_not(slow):
    async def run():
        async with slow.running():
            batch = await create(slow, [line(number) for number in range(48)])
            while not slow.gateway.batches.pieces(slow.gateway.batches.get("alice", batch.id)):
                await asyncio.sleep(0.05)
            cancelling = await slow.openai().batches.cancel(batch.id)
            ended = await slow.ended(batch.id)
            good = await output(slow, ended.output_file_id)
            return cancelling, ended, good, await output(slow, ended.error_file_id)

    cancelling, ended, good, bad = asyncio.run(run())
    assert (cancelling.status, ended.status) == ("cancelling", "cancelled")
    assert len(good) % 16 == 0
    assert len(good) + len(bad) == 48
    assert {row["error"]["code"] for row in bad} == {"batch_cancelled"}


def test_a_batch_expires_with_what_it_has(slow):
    slow.gateway.config = slow.gateway.config.model_copy(
        update={"serve": slow.gateway.config.serve.model_copy(update={"batch_hours": 1.5 / 3600})}
    )

    async def run():
        async with slow.running():
            batch = await create(slow, [line(number) for number in range(48)])
            ended = await slow.ended(batch.id)
            return ended, await output(slow, ended.error_file_id)

    ended, bad = asyncio.run(run())
    assert ended.status == "expired"
    assert {row["error"]["code"] for row in bad} == {"batch_expired"}


def test_the_same_idempotency_key_gives_the_same_batch_and_another_body_a_conflict(serve):
    server = serve()

    async def run():
        file = await upload(server, jsonl([line(0)]))
        client = server.openai()

        async def create(**values):
            body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
            headers = {"Idempotency-Key": "night-1"}
            return await client.batches.create(**{**body, **values}, extra_headers=headers)

        first, second = await create(), await create()
        with pytest.raises(openai.ConflictError):
            await create(metadata={"other": "body"})
        async with server.http() as http:
            listed = (await http.get("/v1/batches")).json()["data"]
        return first, second, listed

    first, second, listed = asyncio.run(run())
    assert first.id == second.id
    assert len(listed) == 1


def test_files_and_batches_of_another_key_are_not_there(serve):
    server = serve()

    async def run():
        file = await upload(server, jsonl([line(0)]))
        batch = await create(server, [line(0)])
        bob = server.openai(OTHER_KEY)
        calls = [
            lambda: bob.files.retrieve(file.id),
            lambda: bob.files.content(file.id),
            lambda: bob.files.delete(file.id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            ),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                await call()
        mine = [one.id async for one in server.openai().files.list()]
        return (
            mine,
            [one async for one in bob.files.list()],
            [one async for one in bob.batches.list()],
        )

    mine, files, batches = asyncio.run(run())
    assert len(mine) == 2
    assert files == batches == []


def test_a_deleted_file_is_gone_and_a_list_has_pages(serve):
    server = serve()

    async def run():
        client = server.openai()
        files = [await upload(server, b"{}\n", f"{n}.jsonl") for n in range(3)]
        assert (await client.files.delete(files[1].id)).deleted
        first = await client.files.list(limit=1)
        return files, [one.id async for one in client.files.list()], first

    files, ids, first = asyncio.run(run())
    assert set(ids) == {files[0].id, files[2].id}
    assert first.has_more
    assert len(first.data) == 1


def test_documents_in_lines_of_a_batch_become_rows(serve):
    server = serve()
    body = {"documents": ["a text", ""], "task": {"length": "sentence"}}
    request = {"custom_id": "x", "method": "POST", "url": "/v1/summarize", "body": body}

    async def run():
        async with server.running():
            ended = await server.ended((await create(server, [request], "/v1/summarize")).id)
            return await output(server, ended.output_file_id)

    [row] = asyncio.run(run())
    assert [one["status"] for one in row["response"]["body"]["data"]] == ["ok", "failed"]


def test_a_unit_that_kills_every_replica_fails_alone_and_the_others_are_answered():
    asker = UnitAsker(16, first_wait_s=0.01)
    deaths = []

    async def deadly(is_deadly):
        if is_deadly:
            return "failed"
        deaths.append(time.monotonic())
        raise ReplicaDiedError("killed")

    tries = iter([ReplicaDiedError("beside it"), None])

    async def innocent(_):
        if (error := next(tries)) is not None:
            raise error
        return "answered"

    async def run():
        return await asyncio.gather(asker.ask(deadly), asker.ask(innocent))

    assert asyncio.run(run()) == ["failed", "answered"]
    assert len(deaths) == 4


def test_a_runner_that_died_after_its_files_makes_them_once(serve):
    server = serve()

    async def run():
        async with server.running():
            batch = await create(server, [line(0)])
            first = await server.ended(batch.id)
            store = server.gateway.batches
            kept = store.get("alice", batch.id)
            while store.unfinished_ids("alice") or store.pieces(kept):
                await asyncio.sleep(0.05)  # its last steps follow that of its state
        state = replace(store.state(kept), status="finalizing", output_file_id=None)
        store.storage.delete(kept.folder + "ended.json")
        store.write_state(kept, state)
        async with server.running():
            second = await server.ended(batch.id)
        outputs = await server.openai().files.list(purpose="batch_output")
        return first, second, [one.id for one in outputs.data]

    first, second, ids = asyncio.run(run())
    assert second.output_file_id == first.output_file_id
    assert ids == [first.output_file_id]


def test_an_upload_is_read_back_byte_for_byte(serve):
    server = serve()
    data = bytes(range(256)) * 9000

    async def run():
        file = await upload(server, io.BytesIO(data), "all.parquet")
        return file, (await server.openai().files.content(file.id)).content

    file, content = asyncio.run(run())
    assert (content, file.bytes) == (data, len(data))
