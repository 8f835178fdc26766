"""What ``ckdiff.training`` offers, and that each name imports only what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ckdiff.training


@pytest.mark.parametrize(
    ("package", "name", "expected"),
    [
        ("torch", "freeze_unmasked", "ckdiff.training needs torch (pip install 'ckdiff[torch]')"),
        (
            "transformers",
            "SubnetworkCallback",
            "ckdiff.training.SubnetworkCallback needs transformers (pip install 'ckdiff[train]')",
        ),
        (
            "transformers",
            "UpdateCallback",
            "ckdiff.training.UpdateCallback needs transformers (pip install 'ckdiff[train]')",
        ),
        ("torch", "UpdateMonitor", "ckdiff.training needs torch (pip install 'ckdiff[torch]')"),
        ("peft", "to_shira", "ckdiff.training.to_shira needs peft (pip install peft)"),
    ],
)
def test_what_is_not_installed_is_said(package: str, name: str, expected: str) -> None:
    code = f"""if 1:
        import sys
        import ckdiff, ckdiff.training
        assert not {{"torch", "transformers", "peft", "jax"}} & set(sys.modules)
        sys.modules["{package}"] = None
        try:
            from ckdiff.training import {name}
        except ckdiff.UsageError as error:
            print(error.one_line())
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout == expected + "\n"


def test_the_names_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text("utf-8")
    assert dir(ckdiff.training) == sorted(ckdiff.training.__all__)
    for name in ckdiff.training.__all__:
        assert (getattr(ckdiff.training, name).__doc__ or "").strip()
        assert f"`ckdiff.training.{name}" in text
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ckdiff.training.nonsense
