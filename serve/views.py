"""What the page shows, as HTML: answers, a gallery and a table of several, where a model looked, what a model is."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.artifact import Metadata
from serve.engine import Answer
from serve.explain import Attention


@dataclass(frozen=True)
class Opinion:
    """What the artifact ``name`` says of a picture."""

    name: str
    answer: Answer

    @property
    def label(self) -> str:
        return self.answer.best(1)[0][0]

    @property
    def confidence(self) -> float:
        return self.answer.best(1)[0][1]


@dataclass(frozen=True)
class Row:
    """One of several pictures: its file's name, a small copy and the opinions, or why it has no answer."""

    file: str
    small: NDArray[np.uint8] | None = None
    opinions: tuple[Opinion, ...] = ()
    problem: str = ""


def problem(message: str) -> str:
    return f'<p class="problem" role="alert">{escape(_sentence(message))}</p>'


def hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


# --- one picture -------------------------------------------------------------------------------------------


def answers(opinions: Sequence[Opinion], threshold: float) -> str:
    """The opinions side by side, and whether they agree; below the confidence ``threshold`` (0..1) none is sure."""
    agreement = _agreement(*opinions) if len(opinions) == 2 else ""
    cards = "".join(_answer(opinion, threshold, named=len(opinions) > 1) for opinion in opinions)
    return f'{agreement}<div class="answers">{cards}</div>'


def _answer(opinion: Opinion, threshold: float, *, named: bool) -> str:
    heading = f'<h2 class="name">{escape(opinion.name)}</h2>' if named else ""
    label, answer = escape(opinion.label), opinion.answer
    rows = "".join(
        f'<tr><th scope="row"><div>{escape(name)}</div></th>'
        f'<td class="bar" aria-hidden="true"><span style="width:{share:.2%}"></span></td>'
        f"<td>{_percent(share)}</td></tr>"
        for name, share in answer.best()
    )
    return (
        f"<article {_sureness(opinion, threshold)}>{heading}"
        f'<p class="verdict if-sure">{label}</p>'
        f'<p class="verdict if-unsure">I am not sure</p><p class="hint if-unsure">The best guess is {label}.</p>'
        f'<table class="bars"><caption class="sr">The most probable classes of {escape(opinion.name)}</caption>'
        f'<tbody>{rows}</tbody></table><p class="speed"><b>{answer.milliseconds:.1f} ms</b> on '
        f"{escape(answer.provider)}, confidence {'' if answer.calibrated else 'not '}calibrated</p></article>"
    )


def _agreement(one: Opinion, other: Opinion) -> str:
    first, second = (
        dict(zip(o.answer.metadata.labels, o.answer.probabilities.tolist(), strict=True)) for o in (one, other)
    )
    overlap = sum(min(share, second.get(label, 0.0)) for label, share in first.items())
    if one.label == other.label:
        kind, said = "agree", f"Both put <b>{escape(one.label)}</b> first"
    else:
        kind = "differ"
        said = " and ".join(f"{escape(o.name)} puts <b>{escape(o.label)}</b> first" for o in (one, other))
        said = f"They differ: {said}"
    return f'<p class="agreement {kind}">{said}. Their probabilities overlap by {_percent(overlap)}.</p>'


# --- several pictures --------------------------------------------------------------------------------------


def several(rows: Sequence[Row], names: Sequence[str], threshold: float) -> str:
    """All pictures with the answers of the artifacts ``names``: a summary, the CSV, a gallery, a table."""
    read = [row for row in rows if not row.problem]
    counts = [f"{len(rows)} picture{'s' * (len(rows) != 1)}"]
    if len(names) == 2 and read:
        counts.append(f"{names[0]} and {names[1]} agree on {sum(map(_agree, read))} of {len(read)}")
    if len(read) < len(rows):
        without = len(rows) - len(read)
        counts.append(f"{without} {'has' if without == 1 else 'have'} no answer")
    content = base64.b64encode(_csv(rows, names).encode("utf-8-sig")).decode()  # so that Excel takes it for UTF-8
    headings = "".join(f'<th scope="col">{escape(name)}</th>' for name in (names if len(names) > 1 else ["Answer"]))
    address = f"data:text/csv;charset=utf-8;base64,{content}"
    return (
        f'<div class="summary"><p role="status">{escape("; ".join(counts))}.</p>'
        f'<a class="download" download="answers.csv" href="{address}">Download CSV</a></div>'
        f'<ul class="gallery">{"".join(_tile(row, threshold) for row in rows)}</ul>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of the answers">'
        f'<table class="results"><thead><tr><th scope="col">Picture</th>{headings}</tr></thead>'
        f"<tbody>{''.join(_row(row, len(names), threshold) for row in rows)}</tbody></table></div>"
    )


def _tile(row: Row, threshold: float) -> str:
    if row.small is None or not row.opinions:
        name = escape(row.file)
        return f'<li><span class="broken" aria-hidden="true"></span><p class="bad">{name}: no answer</p></li>'
    first = row.opinions[0]
    differ = "".join(
        f"<small>{escape(o.name)}: {_isolated(o.label)}</small>" for o in row.opinions[1:] if o.label != first.label
    )
    return (
        f'<li {_sureness(first, threshold)}><img src="{_image(row.small)}" alt="{escape(row.file)}">'
        f"<p>{_isolated(first.label)} <small>{_percent(first.confidence)}</small>"
        f'<small class="tag if-unsure">not sure</small>{differ}</p></li>'
    )


def _isolated(label: str) -> str:
    """A label beside a number, which one that is written from right to left would tear apart."""
    return f"<bdi>{escape(label)}</bdi>"


def _row(row: Row, columns: int, threshold: float) -> str:
    if row.problem:
        cells = f'<td colspan="{columns}" class="bad">{escape(_sentence(row.problem))}</td>'
    else:
        cells = "".join(
            f"<td {_sureness(o, threshold)}>{_isolated(o.label)} <small>{_percent(o.confidence)}</small>"
            ' <small class="tag if-unsure">not sure</small></td>'
            for o in row.opinions
        )
    differ = ' class="differ"' if row.opinions and not _agree(row) else ""
    return f'<tr{differ}><th scope="row">{escape(row.file)}</th>{cells}</tr>'


def _agree(row: Row) -> bool:
    return len({opinion.label for opinion in row.opinions}) == 1


def _csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    fields = ("answer", "confidence", "milliseconds")
    prefixes = [f"{name} " for name in names] if len(names) > 1 else [""]
    writer.writerow(["file", *(_cell(prefix + field) for prefix in prefixes for field in fields), "problem"])
    for row in rows:
        cells: list[str] = []
        for o in row.opinions:
            cells += [_cell(o.label), f"{o.confidence:.4f}", f"{o.answer.milliseconds:.1f}"]
        writer.writerow([_cell(row.file), *(cells or [""] * len(fields) * len(names)), row.problem])
    return file.getvalue()


def _cell(text: str) -> str:
    """``text`` so that no spreadsheet takes it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# --- where a model looked ----------------------------------------------------------------------------------


def looked(opinion: Opinion, seen: NDArray[np.uint8], shown: NDArray[np.uint8], found: Attention) -> str:
    """What the model got (``seen``, uint8 ``[S,S,3]``), and what counted (``shown``, uint8 ``[H,H,3]``)."""
    size, label = seen.shape[0], opinion.label
    if found.after > 0.9 * found.before:
        said = f"No single part decides: whatever is covered, {label} stays at {_percent(found.after)} or more."
    else:
        said = f"Covering the bright part takes {label} from {_percent(found.before)} to {_percent(found.after)}."
    return (
        f'<section class="looked"><h2 class="name">{escape(opinion.name)}</h2><div>'
        f'<figure><img class="pixels" src="{_image(seen)}" alt="The picture at {size} by {size} pixels">'
        f"<figcaption>What it sees: {size} × {size} pixels.</figcaption></figure>"
        f'<figure><img src="{_image(shown)}" alt="The picture, bright where it decided the answer">'
        f"<figcaption>{escape(said)}</figcaption></figure></div></section>"
    )


# --- what a model is ---------------------------------------------------------------------------------------


def title(about: Metadata) -> str:
    names = ", ".join(about.labels[:10]) + (", ..." if len(about.labels) > 10 else "")
    return (
        f"<h1>What is in this picture?</h1><p>One of {len(about.labels)} classes: {escape(names)}. "
        "Pictures go to this server and nowhere else, and are deleted within two hours.</p>"
    )


def card(name: str, about: Metadata, provider: str) -> str:
    """What the artifact ``name`` is, and what it is not."""
    macs = "" if about.macs is None else f"{about.macs * about.views / 1e6:,.0f} million multiply-adds a picture"
    facts = {
        "Network": about.model,
        "Parameters": f"{about.parameters:,}",
        "Operations": macs,
        "Test accuracy": _accuracy(about),
        "Confidence": _confidence(about),
        "Learned from": about.dataset + (f", with {about.teacher} as its teacher" if about.teacher else ""),
        "Classes": ", ".join(about.labels),
        "Runs on": f"{provider} (ONNX Runtime), {about.precision}",
    }
    rows = "".join(
        f'<tr><th scope="row">{key}</th><td>{escape(value)}</td></tr>' for key, value in facts.items() if value
    )
    limits = (
        f"It knows {len(about.labels)} classes and nothing else. A picture of anything else gets one of them too, "
        "at times with high confidence.",
        f"It sees the central square of a picture at {about.image_size} × {about.image_size} pixels. "
        "What is small or at the edge is lost.",
        "Its accuracy holds for pictures like those it learned from. On others it is wrong more often.",
        "It gives one answer for a whole picture. It does not count, and it does not find where things are.",
        "It is not meant for decisions about people, or where a wrong answer does harm.",
    )
    items = "".join(f"<li>{escape(limit)}</li>" for limit in limits)
    return (
        f'<article class="card"><h2>{escape(name)}</h2><h3>What it is</h3>'
        f'<table class="facts"><tbody>{rows}</tbody></table><h3>What it is not</h3><ul>{items}</ul></article>'
    )


def _accuracy(about: Metadata) -> str:
    if about.accuracy is None:
        return "not measured"
    views = f", as the mean over {about.views} views of each picture" if about.views > 1 else ""
    return f"{about.accuracy:.2%}{views}"


def _confidence(about: Metadata) -> str:
    if about.temperature is not None and not about.calibrated:
        return f"calibrated here, with temperature {about.temperature:.2f} from the validation set"
    off = "" if about.ece is None else f", off by {about.ece:.1%} on average on the test set"
    return ("calibrated in the graph" if about.calibrated else "not calibrated") + off


# --- small things ------------------------------------------------------------------------------------------


def _sureness(opinion: Opinion, threshold: float) -> str:
    """The attributes by which page.css and page.js show what is said below the threshold, or at it and above."""
    unsure = ' class="unsure"' if opinion.confidence < threshold else ""
    return f'data-confidence="{opinion.confidence:.6f}"{unsure}'


def _image(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=pixels.shape[0] <= 64, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _percent(share: float) -> str:
    """Rounded, but never to a certainty that the model does not have."""
    if 0.995 <= share < 1:
        return "over 99%"
    if 0 < share < 0.005:
        return "under 1%"
    return f"{share:.0%}"


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:] + "."
