"""Exact ranges of bytes from the hub, and every way in which an answer can be something else."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hub_server import Handler, Hub, Request, blob_of, etag_of, only_hub

from ckdiff.checkpoints.places.hub import retries
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.client import HubFile, HubRepository
from ckdiff.checkpoints.places.hub.etags import content_of, plain_etag
from ckdiff.checkpoints.places.hub.failures import redacted
from ckdiff.errors import CheckpointError, SourceChanged

DATA = np.random.default_rng(0).integers(0, 256, 3 << 20, np.uint8).tobytes()
NAME = "sub/model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("org/name", {NAME: DATA, "small.safetensors": b"tiny", "empty": b""})
        yield hub


@pytest.fixture
def repository(hub: Hub) -> HubRepository:
    return HubRepository.open(HubAddress.parse("hf://org/name"))


def ranges(hub: Hub) -> list[tuple[int, int] | None]:
    return [r.range for r in hub.requests if r.file == NAME and r.method == "GET"]


def whenever(hub: Hub, wanted: int, answer: str, *more: object) -> None:
    """A fault in the first ``wanted`` answers to range requests."""
    left = [wanted]

    def fault(request: Request, handler: Handler) -> bool | None:
        if request.file != NAME or request.method != "GET" or not left[0]:
            return None
        left[0] -= 1
        assert request.range is not None
        first, stop = request.range
        span = {"Content_Range": f"bytes {first}-{stop - 1}/{len(DATA)}"}
        etag = {"ETag": f'"{etag_of(DATA)}"'}
        if answer == "cut":
            length = {"Content_Length": str(stop - first)}
            handler.hang_up(
                206, DATA[first : first + (stop - first) // 2], **span, **etag, **length
            )
        elif answer == "status":
            handler.say(int(str(more[0])), {}, Retry_After="0")
        elif answer == "headers":
            handler.say(206, DATA[first:stop], **({**span, **etag} | dict(more[0])))  # type: ignore[call-overload]
        elif answer == "short":
            handler.say(206, DATA[first : stop - 1], **span, **etag)
        elif answer == "long":
            handler.say(206, DATA[first:stop] + b"x", **span, **etag)
        elif answer == "endless":
            handler.send_response(206)
            for name, value in {"Content-Range": span["Content_Range"], **etag}.items():
                handler.send_header(name, value)
            handler.end_headers()  # no length: the body ends with the connection
            handler.wfile.write(DATA[first:stop] + b"more")
            handler.close_connection = True
        elif answer == "whole":
            handler.say(200, DATA, **etag)
        elif answer == "slow":
            time.sleep(0.5)
            return None
        return True

    hub.fault = fault


@pytest.mark.parametrize("status", [500, 404, 302])
def test_long_bodies_of_what_is_no_answer_are_not_read(
    repository: HubRepository, hub: Hub, status: int
) -> None:
    most = 64 << 20
    sent: list[int] = []

    def fault(request: Request, handler: Handler) -> bool | None:
        if request.file != NAME:
            return None
        handler.send_response(status)
        handler.send_header("Content-Length", str(most))
        if status == 302:
            handler.send_header("Location", f"/stored/org/name/resolve/{repository.commit}/{NAME}")
        sent.append(0)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(most >> 20):
                handler.wfile.write(bytes(1 << 20))
                sent[-1] += 1 << 20
        handler.close_connection = True
        return True

    hub.fault = fault if status != 302 else once(fault)
    if status == 302:
        assert repository.read(NAME, 100, 50) == DATA[100:150]
    else:
        with pytest.raises(CheckpointError):
            repository.read(NAME, 100, 50)
    assert len(sent) == {500: retries.ATTEMPTS, 404: 1, 302: 1}[status]
    assert max(sent) < most // 2  # what sockets hold by themselves


def once(
    fault: Callable[[Request, Handler], bool | None],
) -> Callable[[Request, Handler], bool | None]:
    left = [1]

    def first(request: Request, handler: Handler) -> bool | None:
        if request.file != NAME or not left:
            return None
        left.clear()
        return fault(request, handler)

    return first


def test_what_a_repository_says(repository: HubRepository, hub: Hub) -> None:
    assert repository.commit == hub.repositories["org/name"]["main"].sha
    assert sorted(repository.names) == ["empty", "small.safetensors", NAME]
    assert NAME in repository
    assert "other" not in repository
    digest = hashlib.sha256(DATA).hexdigest()
    assert repository.file(NAME) == HubFile(NAME, len(DATA), f"sha256:{digest}")
    assert repository.file("small.safetensors").content == f"git:{blob_of(b'tiny')}"
    with pytest.raises(CheckpointError, match="has no file other"):
        repository.file("other")


def test_a_listing_without_sizes(hub: Hub) -> None:
    hub.bare = True
    repository = HubRepository.open(HubAddress.parse("hf://org/name"))
    assert repository.file(NAME) == HubFile(NAME, len(DATA), f"sha256:{etag_of(DATA)}")
    assert repository.file(NAME).size == len(DATA)
    assert hub.fetched("HEAD") == [NAME]  # once
    assert repository.read(NAME, 7, 9) == DATA[7:16]


@pytest.mark.parametrize(("start", "size"), [(0, 1), (0, 16), (5, 100_000), (len(DATA) - 3, 3)])
def test_exact_ranges(repository: HubRepository, hub: Hub, start: int, size: int) -> None:
    assert repository.read(NAME, start, size) == DATA[start : start + size]
    assert ranges(hub) == [(start, start + size)]


def test_nothing_and_everything(repository: HubRepository, hub: Hub) -> None:
    assert repository.read(NAME, 10, 0) == b""
    assert repository.read("empty", 0, 0) == b""
    assert ranges(hub) == []
    assert repository.read(NAME, 0, len(DATA)) == DATA


@pytest.mark.parametrize(("start", "size"), [(-1, 4), (len(DATA), 1), (0, len(DATA) + 1)])
def test_ranges_outside_the_file(repository: HubRepository, start: int, size: int) -> None:
    with pytest.raises(CheckpointError, match="more are needed"):
        repository.read(NAME, start, size)


def test_into_a_buffer_that_is_there(repository: HubRepository) -> None:
    buffer = np.zeros(100, np.uint8)
    repository.read_into(NAME, 1000, memoryview(buffer)[10:60])
    assert buffer[10:60].tobytes() == DATA[1000:1050]
    assert not buffer[:10].any()
    assert not buffer[60:].any()


def test_threads_share_a_repository(repository: HubRepository) -> None:
    starts = range(0, len(DATA) - 5000, 100_003)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: repository.read(NAME, start, 5000), starts))
    assert found == [DATA[start : start + 5000] for start in starts]


# -- what may pass ---------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["cut", "short", "long", "endless"])
def test_answers_that_break_off_or_do_not_end(
    repository: HubRepository, hub: Hub, answer: str
) -> None:
    whenever(hub, 3, answer)
    assert repository.read(NAME, 100, 1 << 20) == DATA[100 : 100 + (1 << 20)]


def test_a_broken_answer_is_taken_up_where_it_broke(repository: HubRepository, hub: Hub) -> None:
    whenever(hub, 1, "cut")
    repository.read(NAME, 0, 1 << 20)
    assert ranges(hub) == [(0, 1 << 20), (1 << 19, 1 << 20)]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520, 524])
def test_statuses_that_pass(repository: HubRepository, hub: Hub, status: int) -> None:
    whenever(hub, 3, "status", status)
    assert repository.read(NAME, 100, 50) == DATA[100:150]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": f"bytes 0-49/{len(DATA)}"},
        {"Content_Range": f"bytes 100-150/{len(DATA)}"},
        {"Content_Range": "bytes 100-149/*"},
        {"Content_Range": ""},
        {"Content_Encoding": "gzip"},
    ],
)
def test_other_ranges_than_asked_for(
    repository: HubRepository, hub: Hub, headers: dict[str, str]
) -> None:
    whenever(hub, 2, "headers", headers)
    assert repository.read(NAME, 100, 50) == DATA[100:150]
    whenever(hub, 99, "headers", headers)
    with pytest.raises(CheckpointError, match=r"sub/model.safetensors: (the server|it arrives)"):
        repository.read(NAME, 100, 50)


def test_whole_files_that_arrive_compressed(repository: HubRepository, hub: Hub) -> None:
    left = [2]

    def compressed(request: Request, handler: Handler) -> bool | None:
        if request.file != "small.safetensors" or not left[0]:
            return None
        left[0] -= 1
        etag = f'"{etag_of(b"tiny")}"'
        handler.say(200, b"\x1f\x8b", Content_Encoding="gzip", ETag=etag)
        return True

    hub.fault = compressed
    assert repository.read("small.safetensors", 0, 4) == b"tiny"
    assert left == [0]


def test_whoever_asked_may_give_up(repository: HubRepository, hub: Hub) -> None:
    whenever(hub, 99, "cut")
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise CheckpointError("nobody wants it")

    with pytest.raises(CheckpointError, match="nobody wants it"):
        repository.read(NAME, 0, 1 << 20, check)
    assert len(ranges(hub)) == 1  # while it arrived, and not after the last attempt


def test_a_slow_server(repository: HubRepository, hub: Hub) -> None:
    repository.timeout = 0.1
    whenever(hub, 1, "slow")
    assert repository.read(NAME, 100, 50) == DATA[100:150]
    whenever(hub, 99, "slow")
    with pytest.raises(CheckpointError, match=r"the connection to 127\.0\.0\.1:[0-9]+ failed"):
        repository.read(NAME, 100, 50)


@pytest.mark.parametrize("answer", ["cut", "short", "long"])
def test_it_ends_where_nothing_helps(repository: HubRepository, hub: Hub, answer: str) -> None:
    whenever(hub, 99, answer)
    with pytest.raises(CheckpointError):
        repository.read(NAME, 100, 1)
    assert len(ranges(hub)) == retries.ATTEMPTS


def test_waits_grow_and_obey_the_server() -> None:
    waited: list[float] = []
    backoff = retries.Backoff(wait=waited.append)
    assert [backoff.again() for _ in range(retries.ATTEMPTS)] == [True] * 4 + [False]
    assert waited == [0.5, 1.0, 2.0, 4.0]
    backoff.progress()
    assert backoff.again(30.0)
    assert backoff.again(1e9)
    assert waited[4:] == [30.0, 60.0]


# -- what does not ---------------------------------------------------------------------------------


def test_a_server_without_ranges(repository: HubRepository, hub: Hub) -> None:
    whenever(hub, 99, "whole")
    with pytest.raises(CheckpointError, match="does not serve parts of files"):
        repository.read(NAME, 100, 50)
    assert len(ranges(hub)) == 1
    assert repository.read(NAME, 0, len(DATA)) == DATA  # where all of it was asked for


@pytest.mark.parametrize("status", [400, 403, 404, 416])
def test_statuses_that_stay(repository: HubRepository, hub: Hub, status: int) -> None:
    whenever(hub, 99, "status", status)
    with pytest.raises(CheckpointError):
        repository.read(NAME, 100, 50)
    assert len(ranges(hub)) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": f'"{"0" * 64}"'},
        {"ETag": '"something-else"'},
        {"Content_Range": f"bytes 100-149/{len(DATA) + 1}"},
        {"X_Repo_Commit": "0" * 40},
    ],
)
def test_a_file_that_changes_between_two_requests(
    repository: HubRepository, hub: Hub, headers: dict[str, str]
) -> None:
    assert repository.read(NAME, 0, 10) == DATA[:10]
    whenever(hub, 99, "headers", headers)
    with pytest.raises(SourceChanged):
        repository.read(NAME, 100, 50)


def test_a_file_that_is_not_what_the_listing_says(repository: HubRepository, hub: Hub) -> None:
    whenever(hub, 99, "headers", {"ETag": f'"{etag_of(DATA[::-1])}"'})
    with pytest.raises(SourceChanged, match="was replaced at the hub"):
        repository.read(NAME, 0, 10)


def test_etags_that_are_no_hashes(hub: Hub) -> None:
    hub.bare = True

    def tag(request: Request, handler: Handler) -> bool | None:
        if request.file != NAME:
            return None
        first, stop = request.range or (0, len(DATA))
        span = {"Content_Range": f"bytes {first}-{stop - 1}/{len(DATA)}"} if request.range else {}
        commit = hub.repositories["org/name"]["main"].sha
        status = 206 if request.range else 200
        handler.say(status, DATA[first:stop], ETag='W/"v1"', X_Repo_Commit=commit, **span)
        return True

    hub.fault = tag
    repository = HubRepository.open(HubAddress.parse("hf://org/name"))
    assert repository.file(NAME) == HubFile(NAME, len(DATA), "")
    assert repository.read(NAME, 5, 5) == DATA[5:10]


# -- redirects -------------------------------------------------------------------------------------


def stored(hub: Hub) -> list[Request]:
    return [r for r in hub.requests if r.path.startswith("/stored/")]


def test_a_redirect_is_followed_once(repository: HubRepository, hub: Hub) -> None:
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")
    for start in (0, 1000, 2000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]
    assert len(hub.fetched()) == 1 + 3
    assert len(stored(hub)) == 3


def test_a_signed_url_that_ran_out_is_asked_for_again(repository: HubRepository, hub: Hub) -> None:
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")

    def expire(request: Request, handler: Handler) -> bool | None:
        if request.path.startswith("/stored/") and request.number == 1:
            handler.say(403, b"<Error>Request has expired</Error>")
            return True
        return None

    hub.fault = expire
    for start in (0, 1000, 2000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]


def test_the_storage_never_gets_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.private.add("org/name")
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")
    repository = HubRepository.open(HubAddress.parse("hf://org/name"))
    for start in (0, 1000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]
    assert len(stored(hub)) == 2
    assert all("Authorization" not in request.headers for request in stored(hub))
    assert any(request.headers.get("authorization") or request.headers.get("Authorization")
               for request in hub.requests)  # fmt: skip


def test_a_repository_that_was_renamed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub redirects to itself, where the token is still needed."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.private.add("org/name")
    hub.put("org/old", {NAME: DATA, "small.safetensors": b"tiny", "empty": b""})

    def moved(request: Request, handler: Handler) -> bool | None:
        if not request.path.startswith("/org/old/"):
            return None
        target = request.path.replace("/org/old/", "/org/name/")
        handler.say(307, b"", Location=target)
        return True

    hub.fault = moved
    repository = HubRepository.open(HubAddress.parse("hf://org/old"))
    for start in (0, 1000, 2000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]
    assert len(hub.fetched()) == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://host/x", "data:,x", "http://[::bad", "{self}"]
)
def test_redirects_that_lead_nowhere(repository: HubRepository, hub: Hub, target: str) -> None:
    def astray(request: Request, handler: Handler) -> bool | None:
        if request.file == NAME:
            handler.say(302, b"", Location=target.replace("{self}", handler.path))
        return request.file == NAME

    hub.fault = astray
    with pytest.raises(CheckpointError, match="redirects"):
        repository.read(NAME, 100, 50)
    assert len(hub.fetched()) == (11 if target == "{self}" else 1)  # and nothing is tried again


def tagged(hub: Hub, etags: list[str], *, linked: bool = True) -> None:
    """A storage whose answers have these etags, one after the other."""
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")

    def fault(request: Request, handler: Handler) -> bool | None:
        if request.file != NAME or request.range is None:
            return None
        first, stop = request.range
        if request.path.startswith("/stored/"):
            span = f"bytes {first}-{stop - 1}/{len(DATA)}"
            handler.say(206, DATA[first:stop], Content_Range=span, ETag=f'"{etags.pop(0)}"')
        else:
            target = f"{hub.storage}/stored{request.path}?signature={len(hub.requests)}"
            said = {"X_Linked_Etag": f'"{etag_of(DATA)}"'} if linked else {}
            handler.say(302, b"", Location=target, **said)
        return True

    hub.fault = fault


def test_storages_with_several_etags_for_one_file(repository: HubRepository, hub: Hub) -> None:
    tagged(hub, ["one", "two", "two", "two", "one", "one"])
    for start in (0, 1000, 2000, 3000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]
    # the hub says each time that it is the same file: at first, and where another etag came
    assert len(hub.fetched()) - len(stored(hub)) == 3


def test_a_storage_that_nobody_vouches_for(repository: HubRepository, hub: Hub) -> None:
    tagged(hub, ["one", "one", "two", "two"], linked=False)
    for start in (0, 1000):
        assert repository.read(NAME, start, 50) == DATA[start : start + 50]
    with pytest.raises(SourceChanged, match="was replaced at the hub"):
        repository.read(NAME, 2000, 50)


def test_a_file_whose_etag_at_the_hub_moves(repository: HubRepository, hub: Hub) -> None:
    tagged(hub, ["one", "two", "two"])
    assert repository.read(NAME, 0, 50) == DATA[:50]
    redirect = hub.fault

    def moved(request: Request, handler: Handler) -> bool | None:
        if request.path.startswith("/stored/"):
            return redirect(request, handler)
        target = f"{hub.storage}/stored{request.path}"
        handler.say(302, b"", Location=target, X_Linked_Etag=f'"{etag_of(DATA[::-1])}"')
        return True

    hub.fault = moved
    with pytest.raises(SourceChanged, match="was replaced at the hub"):
        repository.read(NAME, 1000, 50)


def test_a_private_repository_with_a_bare_listing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.private.add("org/name")
    hub.bare = True
    repository = HubRepository.open(HubAddress.parse("hf://org/name"))
    assert repository.file(NAME).size == len(DATA)
    assert repository.read(NAME, 7, 9) == DATA[7:16]


def listing(hub: Hub, said: dict[str, object]) -> None:
    sha = hub.repositories["org/name"]["main"].sha

    def answer(request: Request, handler: Handler) -> bool | None:
        if request.path != "/api/models/org/name":
            return None
        handler.say(200, {"id": "org/name", "sha": sha, "siblings": [{"rfilename": NAME, **said}]})
        return True

    hub.fault = answer


@pytest.mark.parametrize("said", [{"size": -1}, {"size": "9"}, {"size": 1.5}, {"blobId": 7}])
def test_listings_that_say_nothing_of_use(hub: Hub, said: dict[str, object]) -> None:
    listing(hub, said)
    repository = HubRepository.open(HubAddress.parse("hf://org/name"))
    assert repository.read(NAME, 7, 9) == DATA[7:16]


@pytest.mark.parametrize("name", [5, None, "\ud800.safetensors"])
def test_names_that_are_none(hub: Hub, name: object) -> None:
    listing(hub, {"rfilename": name})
    assert HubRepository.open(HubAddress.parse("hf://org/name")).names == []


def test_a_commit_that_leads_to_another(hub: Hub) -> None:
    asked = "1" * 40
    hub.repositories["org/name"][asked] = hub.repositories["org/name"]["main"]
    with pytest.raises(CheckpointError, match="has another commit there"):
        HubRepository.open(HubAddress.parse(f"hf://org/name@{asked}"))


@pytest.mark.parametrize("said", [{"lfs": {"x": 1}}, {"lfs": 3}])
def test_listings_that_make_no_sense(hub: Hub, said: dict[str, object]) -> None:
    listing(hub, said)
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        HubRepository.open(HubAddress.parse("hf://org/name"))


def test_a_stored_file_that_is_replaced(repository: HubRepository, hub: Hub) -> None:
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")
    repository.read(NAME, 0, 50)
    hub.repositories["org/name"][repository.commit].files[NAME] = DATA[::-1]
    with pytest.raises(SourceChanged, match="comes from another commit"):  # says the hub
        repository.read(NAME, 100, 50)


# -- small things ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("etag", "content"),
    [
        ('"' + "a" * 64 + '"', "sha256:" + "a" * 64),
        ('W/"' + "1" * 40 + '"', "git:" + "1" * 40),
        ("a" * 32, ""),
        ("A" * 64, ""),
        ('"v1"', ""),
        ("", ""),
    ],
)
def test_what_an_etag_says(etag: str, content: str) -> None:
    assert content_of(plain_etag(etag)) == content


def test_secrets_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "opensesame")
    text = redacted(
        "GET https://me:pa55@host/a?X-Amz-Signature=s3cret&b=1 (opensesame) Bearer abc.def hf_AbC12"
    )
    for secret in ("pa55", "s3cret", "opensesame", "abc.def", "AbC12"):
        assert secret not in text
    assert "host/a" in text
