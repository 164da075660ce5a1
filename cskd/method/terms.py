"""Which terms a loss has, and what they read of a teacher and train of a student: all that needs no tensor.

`cskd.method.losses` computes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cskd.config.bounds import written
from cskd.config.schema import Decay, LossConfig, LossTerm
from cskd.errors import ConfigError, shortened
from cskd.files.own_code import load_own
from cskd.near import did_you_mean

TERMS = ("label", "dist", "patch")  # of the methods, as logged
AGREEMENT = "agreement"  # logged next to them, see `agreement`
HEADS = ("class", "distillation", "patches")  # what can be trained of a student's outputs
TOKEN = "token:"  # before the name of a token of `student.tokens`: its head


@dataclass(frozen=True)
class OwnTerm:
    """A loaded term of a user's own: its name in logs, where and what it is."""

    name: str
    where: str
    sha256: str
    value: Callable[..., Any]  # a `cskd.method.losses.Term`
    heads: tuple[str, ...]


def expanded(config: LossConfig) -> list[LossTerm]:
    """The terms that a loss is the weighted sum of, in this order: those of its method, then `loss.terms`.

    Raises:  ConfigError where two have one name.
    """
    c = config
    label = LossTerm("class", "label", weight=1 - c.alpha, smoothing=c.smoothing, name="label")
    kind: Literal["kl", "ce"] = "kl" if c.method.endswith("soft") else "ce"
    divisor: Literal["rows", "paper"] = "paper" if c.soft_reduction == "paper" else "rows"
    taught = LossTerm(tau=c.tau, divisor=divisor) if kind == "kl" else LossTerm()
    dist = replace(taught, head="distillation", target="global", kind=kind, weight=c.alpha, name="dist")
    of_method: list[LossTerm] = []
    if c.method == "none":
        of_method = [replace(label, head=c.baseline_head, weight=1.0)]
    elif c.method != "terms":
        of_method = [label, dist]
    if c.method.startswith("cskd"):
        of_method.append(
            replace(taught, head="patches", target="cells", kind=kind, weight=c.patch_weight, name="patch")
        )
    terms = [*of_method, *c.terms]
    if any(term.title == AGREEMENT for term in c.terms):
        raise ConfigError(
            f"loss.terms: {AGREEMENT!r} is a column of the metrics; give the term another name by its key name"
        )
    names = [term.title for term in terms]
    if twice := [term for term in c.terms if names.count(term.title) > 1]:
        own = f", of {shortened(twice[0].own, 80)}" if twice[0].own else ""
        raise ConfigError(
            f"loss.terms: {twice[0].title!r}{own} is the name of another term too; give it one by its key name"
        )
    return terms


def needs_teacher(config: LossConfig) -> bool:
    """Whether a loss reads a teacher's targets, or may: what a term of one's own reads is not known."""
    return any(bool(term.own) or term.target != "label" for term in expanded(config))


def counts(term: LossTerm, epoch: int) -> bool:
    """Whether a term counts in an epoch, from 0."""
    first, end = term.epochs or (0, None)
    return (first or 0) <= epoch and (end is None or epoch < end)


@dataclass(frozen=True)
class Needs:
    """What a loss reads of a teacher. hard: classes of the image, or of cells too; soft: logits; decays: of terms that have their own;
    features: the last feature map; stages: the earlier ones whose maps are read, live: those of them that no cache has."""

    hard: Literal["none", "global", "cells"]
    soft: bool
    decays: tuple[Decay, ...]  # of cells' classes
    soft_decays: tuple[Decay, ...]
    features: bool = False
    stages: tuple[str, ...] = ()
    live: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        return self.hard == "none" and not self.soft and not self.features and not self.stages


def needs(config: LossConfig, cache: str = "") -> Needs:
    """What a loss reads of a teacher; cache: the name of its cache."""
    read = [term for term in expanded(config) if not term.own and term.cache == cache and term.target != "label"]
    terms = [term for term in read if not term.of_features]
    hard = {term.target for term in terms if term.kind == "ce"}
    of_cells = [term for term in terms if term.target == "cells" and term.decay is not None]
    return Needs(
        "cells" if "cells" in hard else "global" if "global" in hard else "none",
        any(term.kind != "ce" for term in terms),
        tuple(dict.fromkeys(t.decay for t in of_cells if t.decay and t.kind == "ce")),
        tuple(dict.fromkeys(t.decay for t in of_cells if t.decay and t.kind != "ce")),
        any(term.of_features and not term.stage for term in read),
        tuple(dict.fromkeys(term.stage for term in read if term.stage)),
        tuple(dict.fromkeys(term.stage for term in read if term.stage and term.live)),
    )


def own_terms(config: LossConfig) -> list[OwnTerm]:
    """The terms of a user's own, loaded, in order. Raises ConfigError where one can't be."""
    found: list[OwnTerm] = []
    for term in config.terms:
        if not term.own:
            continue
        code = load_own(term.own, "loss.terms", "cskd.losses", "function", ConfigError)
        if code is None or not callable(code.value):
            what = "no entry point of cskd.losses" if code is None else f"a {type(code.value).__name__}"
            raise ConfigError(
                f"loss.terms: {term.own!r} is {what}, expected path/to/file.py:function or package.module:function"
            )
        if not _takes(code.value, 3):
            raise ConfigError(
                f"loss.terms: {term.own!r} can't be called with (output, labels, targets); mend its arguments"
            )
        heads = tuple(getattr(code.value, "heads", ()))
        if wrong := [head for head in heads if head not in HEADS and not str(head).startswith(TOKEN)]:
            raise ConfigError(
                f"loss.terms: {term.own!r} trains {wrong[0]!r}, expected of {', '.join(HEADS)}, {TOKEN}NAME; mend its `heads`"
            )
        found.append(OwnTerm(term.title, code.where, code.sha256, code.value, heads))
    return found


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many values; one that states nothing of its arguments is believed."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def terms_of(config: LossConfig) -> tuple[str, ...]:
    """Names of all terms that a loss may have, as logged; the methods' first."""
    return tuple(dict.fromkeys((*TERMS, *(term.title for term in expanded(config)))))


def _own_heads(own: list[OwnTerm]) -> set[str]:
    return {head for term in own for head in term.heads}


def all_heads(tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the heads that a student may have, whose tokens these are, in the order they are reported."""
    return (*HEADS[:2], *(TOKEN + name for name in tokens), *HEADS[2:])


def trained_heads(config: LossConfig, distilled: bool, tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """What a loss trains of a student's outputs, out of `all_heads`.

    Args:    distilled whether the student has a distillation token; without one its head is that of the class token; tokens its
             tokens by name.
    """
    return read_heads(config, distilled, tokens, weightless=False)


def read_heads(
    config: LossConfig, distilled: bool, tokens: Sequence[str] = (), weightless: bool = True
) -> tuple[str, ...]:
    """What a loss reads of a student's outputs, as `trained_heads`; with `weightless`, what has a weight of 0, too."""
    trains = _own_heads(own_terms(config))
    for term in expanded(config):
        if (term.weight > 0 or weightless) and not term.own:
            trains |= set(all_heads(tokens)) - {"patches"} if term.head == "mean" else {term.head}
    if not distilled and "distillation" in trains:
        trains = trains - {"distillation"} | {"class"}
    return tuple(name for name in all_heads(tokens) if name in trains)


def refuse_other_tokens(config: LossConfig, model: str, tokens: Sequence[str]) -> None:
    """ConfigError for a token that the loss names and the student has not, and for a student with tokens whose class head, which is
    what timm's model predicts with, no term trains."""
    named = [term.head for term in config.terms] + [head for one in own_terms(config) for head in one.heads]
    for head in named:
        if head.startswith(TOKEN) and head not in all_heads(tokens):
            has = f"of {', '.join(tokens)}" if tokens else "and student.tokens is empty"
            hint = did_you_mean(head.removeprefix(TOKEN), tokens)
            raise ConfigError(
                f"loss.terms has head {head}, expected one {has}; list it in student.tokens{hint and f', or: {hint}'}"
            )
    if tokens and "class" not in trained_heads(config, False, tokens):
        raise ConfigError(
            f"the loss does not train the class head of {model}, which is what timm's model predicts with; add a term to "
            "loss.terms with head: class, or head: mean"
        )


def idle_terms(config: LossConfig, epochs: int) -> list[str]:
    """Notes of terms that count in no epoch of a run: a short trial of a loss with stages ends before the last ones, or a slip."""
    return [
        f"loss.terms[{i}].epochs is {written(term.epochs)} and train.epochs {epochs}: the term counts in no epoch of 0 to {epochs - 1}"
        for i, term in enumerate(config.terms)
        if not any(counts(term, epoch) for epoch in range(epochs))
    ]


def refuse_gaps(config: LossConfig, epochs: int) -> None:
    """ConfigError for an epoch of a run, from 0, in which no term counts."""
    terms = expanded(config)
    borders = {
        0,
        *(-int(-edge // 1) for term in terms for edge in term.epochs or () if edge is not None),
    }  # where a term begins, or has ended
    taught = {b: any(counts(term, b) for term in terms) for b in sorted(borders) if b < epochs}
    for epoch in taught:
        if not taught[epoch]:
            until = next((b for b in taught if b > epoch and taught[b]), "null")
            raise ConfigError(
                f"loss.terms: no term counts in epoch {epoch} of 0 to {epochs - 1}; let one have it, as by epochs: [{epoch}, {until}]"
                + (f", or set train.epochs={epoch}" if epoch else "")
            )


def unread_keys(loss: LossConfig, given: Collection[str]) -> list[str]:
    """Which of the keys of the section `loss` that a config gives its method and terms do not read."""
    method = loss.method
    read = {"method", "terms"} | ({"smoothing"} if method != "terms" else set())
    read |= {"baseline_head"} if method == "none" else {"alpha"} if method != "terms" else set()
    fused = any(term.target == "cells" and term.decay is None for term in expanded(loss))
    read |= {"decay"} if fused else set()
    read |= {"patch_weight"} if method.startswith("cskd") else set()
    read |= {"tau", "soft_reduction"} if method.endswith("soft") else set()
    return sorted(key for key in given if key.startswith("loss.") and key.removeprefix("loss.") not in read)


def cells_term(loss: LossConfig) -> LossTerm | None:
    """The first term of a loss that teaches patch tokens the teacher's cells; None where none does: nothing to agree with."""
    return next((t for t in expanded(loss) if not t.own and (t.head, t.target) == ("patches", "cells")), None)


def blocks_of(config: LossConfig) -> tuple[int, ...]:
    """The student's blocks whose tokens a loss reads, each once; -1 the last one."""
    return tuple(dict.fromkeys(term.block for term in expanded(config) if term.block is not None))
