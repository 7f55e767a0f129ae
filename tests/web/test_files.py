"""How the page's files are served: a fixed table, strict headers, complete in the wheel."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from served_model import Served

from dist_infer.openai import web_pages
from dist_infer.openai.keys import ApiKey
from dist_infer.openai.web_pages import WEB_FILES

ROOT = Path(__file__).resolve().parents[2]
WEB = Path(web_pages.__file__).parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ALICE = ApiKey(name="alice", sha256=hashlib.sha256(b"sk-0123456789abcdef").hexdigest())


def test_headers_of_every_file(serve: Callable[..., Served]) -> None:
    """Guards each file against another type, a missing policy, a stale copy, and a key it does not need."""
    served = serve(keys=(ALICE,), ready=False)
    with httpx.Client(base_url=served.url) as http:
        for path, file in WEB_FILES.items():
            answer = http.get(path)
            assert (answer.status_code, answer.content) == (200, file.content)
            assert answer.headers["content-type"] == file.media_type
            assert answer.headers["content-security-policy"].startswith(POLICY)
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            head = http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(file.content))
            for known in (file.etag, f'"x", W/{file.etag}', "*"):
                again = http.get(path, headers={"if-none-match": known})
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", file.etag)
            assert http.get(path, headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/web/", "/web/nothing.js", "/web/index.html", "/web/..%2fapp.py", "/web/%2e%2e/app.py", "/web//app.js"]
)
def test_no_other_file(serve: Callable[..., Served], path: str) -> None:
    """Guards the disk: what is not in the table is not there; behind keys not even that is said."""
    for keys, status in (((), 404), ((ALICE,), 401)):
        with httpx.Client(base_url=serve(keys=keys, ready=False).url) as http:
            assert http.get(path).status_code == status
            assert http.post("/", json={}).status_code == 405


def test_the_table_is_complete() -> None:
    """Guards against a file of a kind that is not served, and one that the wheel leaves out."""
    assert {file.name for file in WEB.iterdir()} == {path.rpartition("/")[2] or "index.html" for path in WEB_FILES}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dist_infer"]
    packed = {path for pattern in data for path in (ROOT / "dist_infer").glob(pattern)}
    assert set(WEB.iterdir()) <= packed


def test_every_reference_is_there() -> None:
    """Guards imports, links and ids: a file or an element that a script names and nobody has."""
    page = (WEB / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="(web/[^"]+)"', page):
        assert f"/{name}" in WEB_FILES
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for script in WEB.glob("*.js"):
        text = script.read_text()
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert (WEB / name).is_file(), (script.name, name)
        assert set(re.findall(r'byId\("([^"]+)"\)', text)) <= set(ids), script.name


def test_nothing_from_elsewhere_and_no_markup_from_text() -> None:
    """Guards the two promises of the page by what its files do not have."""
    for file in WEB.iterdir():
        text = file.read_text()
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert forbidden not in text, (file.name, forbidden)
        addresses = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert addresses == set(), file.name
        assert " style=" not in text, file.name
