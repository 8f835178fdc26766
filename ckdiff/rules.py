"""Rules: when is an element "changed"? ``"atol=1e-5@bf16"`` <-> :class:`Rule`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ckdiff.dtypes import DTYPES, DType
from ckdiff.errors import RuleError, nearest

RuleKind = Literal["exact", "atol", "rtol", "ulp"]

#: ``rule@target``: which dtypes are rounded to the target first; all others are left as they are
ROUNDED: dict[str, tuple[str, ...]] = {
    "bf16": ("F64", "F32", "F16"),
    "f16": ("F64", "F32", "BF16"),
    "f32": ("F64",),
}
_TARGETS = {
    "bf16": "bf16", "bfloat16": "bf16",
    "f16": "f16", "fp16": "f16", "float16": "f16",
    "f32": "f32", "fp32": "f32", "float32": "f32",
}  # fmt: skip
_RULE = re.compile(r"(?P<kind>[a-z]+)(?:=(?P<value>[^@\s]*))?(?:@(?P<target>\w+))?", re.ASCII)
#: what someone may have meant as a rule
_ALMOST = re.compile(
    r"(?P<kind>[a-z]*)[\s_:=]*(?P<value>[-+.0-9e]*)\s*(?:@\s*(?P<target>\w*))?$", re.ASCII
)
_COMPARED = 64  #: characters
_HELP = "rules are exact, atol=T, rtol=R, ulp=K, each with an optional @bf16, @f16 or @f32"


@dataclass(frozen=True, slots=True)
class Rule:
    """When an element counts as changed; ``str(rule)`` is its canonical text."""

    kind: RuleKind
    value: float = 0.0  #: T of ``atol``, R of ``rtol``
    ulps: int = 0  #: K of ``ulp``, below 2**64
    target: str | None = None  #: ``bf16``, ``f16`` or ``f32``: round both sides to it first

    @classmethod
    def parse(cls, text: str | Rule) -> Rule:
        """Read a rule from any spelling; raises RuleError."""
        if isinstance(text, Rule):
            return text
        if not isinstance(text, str):
            raise RuleError(f"a rule must be a string, not {type(text).__name__}", hint=_HELP)
        match = _RULE.fullmatch(text.strip().lower())
        if match is None:
            raise RuleError(f"cannot read the rule {text!r}", hint=_meant(text))
        kind, value = match["kind"], match["value"]
        target = None
        if match["target"] is not None:
            target = _TARGETS.get(match["target"])
            if target is None:
                shown = f"cannot round to {match['target']!r} in {text!r}"
                raise RuleError(shown, hint=_meant(text))
        if kind == "exact":
            if value is not None:
                raise RuleError(f"exact takes no value: {text!r}", hint=_HELP)
            return cls("exact", target=target)
        if value is None or kind not in ("atol", "rtol", "ulp"):
            raise RuleError(f"cannot read the rule {text!r}", hint=_meant(text))
        if kind == "ulp":
            if not re.fullmatch(r"[0-9]{1,20}", value) or int(value) >= 2**64:
                raise RuleError(f"ulp takes a whole number from 0 to 2**64-1: {text!r}", hint=_HELP)
            return cls("ulp", ulps=int(value), target=target)
        try:
            number = float(value)
        except ValueError:
            raise RuleError(f"not a number: {value!r} in {text!r}", hint=_HELP) from None
        if not math.isfinite(number) or number < 0 or "_" in value:
            raise RuleError(f"{kind} takes a finite number >= 0: {text!r}", hint=_HELP)
        if number == 0 and re.search("[1-9]", value.partition("e")[0]):
            raise RuleError(f"{value} is too small for a float64: {text!r}", hint=_HELP)
        return cls("atol" if kind == "atol" else "rtol", value=number + 0.0, target=target)

    def __str__(self) -> str:
        text: str = self.kind
        if self.kind == "ulp":
            text += f"={self.ulps}"
        elif self.kind != "exact":
            text += f"={_shortest(self.value)}"
        return text if self.target is None else f"{text}@{self.target}"

    def rounds(self, dtype: DType) -> DType | None:
        """The dtype both sides are rounded to before comparing, or None."""
        if self.target is None or dtype.name not in ROUNDED[self.target]:
            return None
        return DTYPES[self.target.upper()]

    def falls_back(self, dtype: DType) -> bool:
        """Whether this rule means ``exact`` for ``dtype``, because the dtype has no numeric
        meaning.
        """
        return self.kind != "exact" and not dtype.numeric


def _meant(text: str) -> str:
    """A hint for what is no rule: the rule that it is like, and what rules there are."""
    parts = _ALMOST.match(text.strip().lower()[:_COMPARED])
    if parts is None:
        return _HELP
    kind = nearest(parts["kind"], get_args(RuleKind))
    target = nearest(parts["target"], _TARGETS) if parts["target"] else None
    likely = f"{kind}={parts['value']}" if parts["value"] else str(kind)
    likely += f"@{target}" if target is not None else ""
    if likely == text.strip().lower() or not _is_rule(likely):  # it is like none
        return _HELP
    return f"did you mean {likely}? {_HELP}"


def _is_rule(text: str) -> bool:
    match = _RULE.fullmatch(text)
    return (
        match is not None
        and match["kind"] in get_args(RuleKind)
        and ((match["kind"] == "exact") == (match["value"] is None))
    )


EXACT = Rule("exact")


def parse_rules(texts: Iterable[str | Rule]) -> list[Rule]:
    """Read several rules in order; a rule named twice, in whatever spelling, counts once."""
    if isinstance(texts, (str, Rule)):
        texts = [texts]
    return list(dict.fromkeys(Rule.parse(text) for text in texts))


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a run, in each of the orders in which they are needed."""

    masks: tuple[Rule, ...]  #: those whose masks are stored, as asked for; one at least

    @classmethod
    def of(cls, asked: Iterable[str | Rule]) -> RuleSet:
        """Those that are asked for, ``exact`` where there are none. Raises RuleError."""
        return cls(tuple(parse_rules(asked)) or (EXACT,))

    @property
    def reported(self) -> tuple[Rule, ...]:
        """Those that are counted, ``exact`` always among them, as they are reported."""
        return tuple(dict.fromkeys([*self.masks, EXACT]))

    @property
    def order(self) -> tuple[Rule, ...]:
        """Those that are counted as kernels want them: ``exact`` is the first."""
        return tuple(dict.fromkeys([EXACT, *self.masks]))

    @property
    def mask_columns(self) -> dict[str, int]:
        """For the text of each of ``masks``, its position in ``order``."""
        return {str(rule): self.order.index(rule) for rule in self.masks}

    def __len__(self) -> int:
        return len(self.order)


def _shortest(value: float) -> str:
    """The shortest text that reads back as ``value``: ``1e-5``, ``0.5``, ``100``."""
    if value == 0:
        return "0"
    plain = repr(value).removesuffix(".0")
    digits, _, power = f"{value:e}".partition("e")
    for precision in range(17):
        digits, _, power = f"{value:.{precision}e}".partition("e")
        if float(f"{digits}e{power}") == value:
            break
    scientific = f"{digits}e{int(power)}"
    return plain if "e" not in plain and len(plain) <= len(scientific) else scientific
