"""What the project says of itself agrees with itself, and works outside of the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from source import ROOT

import ckdiff
from ckdiff import errors

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: modules whose packages have other names
PACKAGES = {"vl_convert": "vl-convert-python"}
#: what a page imports that is there before ckdiff is, or instead of it
ELSEWHERE = {
    "api.md": {"vllm"},  # the engine that the snippet runs in
    "delta-format.md": {"safetensors"},  # a reader without ckdiff
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {ckdiff.__version__}\n" in citation
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert ckdiff.__version__ in changes[:2]
    assert changes[0] in (ckdiff.__version__, "Unreleased")


def snippets(page: Path) -> list[str]:
    """A page's Python, or a notebook's."""
    text = page.read_text("utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.findall(r"^ *```(?:python|py)\n(.*?)^ *```", text, re.S | re.M)


def imported(page: Path) -> set[str]:
    """Packages, by the names of their modules, that a page's Python imports."""
    found = set()
    for code in snippets(page):
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"ckdiff"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", need)[0].lower() for need in requirements}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_the_extra_for_what_its_python_imports(page: Path) -> None:
    text = page.read_text("utf-8")
    said = re.findall(r"pip install '(?:ckdiff|\.|ckdiff-core)\[([\w,]+)\]'", text)
    named = {name for extras in said for name in extras.split(",")}
    assert named - {"full"} <= EXTRAS.keys()
    brought = names(PROJECT["dependencies"]).union(*(names(EXTRAS[x]) for x in named - {"full"}))
    needed = {PACKAGES.get(name, name) for name in imported(page)}
    assert needed - brought <= ELSEWHERE.get(page.name, set())


def test_the_notebooks_run_with_their_extra() -> None:
    brought = names(PROJECT["dependencies"]) | names(EXTRAS["notebook"])
    notebooks = list((ROOT / "examples/notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        assert imported(notebook) - brought == set(), notebook


def test_every_extra_is_on_the_page_about_installing() -> None:
    text = (ROOT / "docs/install.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.M)) | {"pandas", "polars"}
    assert listed == EXTRAS.keys() - {"docs", "test"}


def test_hints_name_extras_that_exist() -> None:
    found = set()
    for path in (ROOT / "ckdiff").rglob("*.py"):
        found |= set(
            re.findall(r"ckdiff\[(\w+)\]|\binstall\(['\"](\w+)['\"]\)", path.read_text("utf-8"))
        )
    named = {name for pair in found for name in pair if name}
    assert {"report", "sign", "blake3"} <= named
    assert named - {"full"} <= EXTRAS.keys()


def test_hints_do_not_mix_the_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.install("report") == "pip install 'ckdiff[report]'"
    assert errors.whole() == "pip install ckdiff"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    assert errors.install("report") == "pip install 'ckdiff-core[report]'"
    assert errors.whole() == "pip install 'ckdiff-core[full]'"


def test_the_address_of_the_repository_is_in_one_place() -> None:
    source = PROJECT["urls"]["Source"]
    assert all(url.startswith(source) for url in PROJECT["urls"].values())
    folders = (ROOT / "ckdiff").rglob("*.py"), (ROOT / "docs").rglob("*.md"), ROOT.glob("[!.]*.*")
    address = source.partition("://")[2].encode()
    named = [path.name for found in folders for path in found if address in path.read_bytes()]
    assert named == ["pyproject.toml"]


def metadata_hook() -> Any:
    spec = importlib.util.spec_from_file_location("hook", ROOT / "package/metadata.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_lead_to_the_repository() -> None:
    text = "![A](docs/a.png) [b](docs/b.md#c) [d](https://e.org) [f](#g) [![h](i.svg)](j.md)"
    source = "https://github.com/x/y"
    raw = "https://raw.githubusercontent.com/x/y"
    assert metadata_hook().absolute(text, source, "v1") == (
        f"![A]({raw}/v1/docs/a.png) [b]({source}/blob/v1/docs/b.md#c) [d](https://e.org) [f](#g) "
        f"[![h]({raw}/v1/i.svg)]({source}/blob/v1/j.md)"
    )


def test_the_container_has_what_it_needs(tmp_path: Path) -> None:
    """Its steps in a bare folder: what it copies can be built, and the demo is there."""
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                path = ROOT / source
                place = tmp_path / target
                if path.is_dir():
                    shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    if target.endswith("/"):
                        place.mkdir(exist_ok=True)
                    shutil.copy(path, place)
        if line.startswith("RUN pip install"):
            build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o"]
            subprocess.run([*build, tmp_path / "dist", tmp_path], check=True, capture_output=True)
    (program,) = re.findall(r'CMD \["python", "/ckdiff/(.*)"\]', lines[-1])
    assert (tmp_path / program).is_file()
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        text = packed.read(f"ckdiff-{ckdiff.__version__}.dist-info/METADATA").decode()
    message = Parser().parsestr(text)
    assert message["Description-Content-Type"] == "text/markdown"
    readme = message.get_payload()
    assert "# ckdiff" in readme
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
    for picture in ("report.png", "terminal.svg"):
        place = f"/v{ckdiff.__version__}/docs/images/{picture}"
        assert any(target.endswith(place) for target in targets), "a picture at this version"
