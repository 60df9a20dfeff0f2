"""What evaluate.py has found: report.json (all of it), report.csv (a line a cell), report.html (to read).

The page is one file without network or script, in light and dark; wide tables scroll in a box of their own,
pictures of unsafe content are blurred until clicked. Beside each difference is the seed noise: the same
difference between the base model and itself with another seed. A difference no larger than the seed noise or
the ends of its interval is grey.
"""
import base64
import contextlib
import csv
import io
import json
import math
import re
from html import escape
from pathlib import Path

from metrics import wilson
from sample import ROOT, die, open_or_none, write_text

VERSION = 1  # of report.json: another one is refused
FIGURES = ("before", "after", "difference", "floor")
TITLES = dict(concept="Our own figures", table1="Table 1: objects, characters, styles",
              table2="Table 2: unsafe content and general quality", table3="Table 3: red-team prompts",
              table4="Table 4: ablation", table5="Table 5: hyperparameters",
              table7="Table 7: the other CIFAR-10 classes", table8="Table 8: ten concepts at once",
              table12="Table 12: rephrased prompts")
# The paper's figures, {(suite, row, column): dict(before, after)}: of the base model and of INPO, None if it
# has none. ACC and "rephrased" are percent, Tables 2 to 5 counts. The paper does not say which prompts the
# CLIP scores of Tables 5, 7 and 8 are for
with open(ROOT / "docs" / "paper.csv", encoding="utf-8", newline="") as lines:
    PAPER = {(line["suite"], line["row"], line["column"]): {
        when: float(line[when]) if line[when] else None for when in ("before", "after")}
        for line in csv.DictReader(lines)}

def check_report(path):
    """A report.json -> the command that made it. One line and exit 2 where it is no report, or one of another
    version."""
    made = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        made = dict(json.loads(path.read_text(encoding="utf-8")))
    if made.get("version") != VERSION:
        what = f"a report of version {made['version']}, not {VERSION}" if "version" in made else "no report"
        die(f"{path}: is {what}; delete it and evaluate again")
    return made.get("command")

def write_report(report, folder):
    """A dict of plain types (NaN raises a ValueError) -> the three files, each whole, in folder."""
    made = {"report.json": json.dumps(report, indent=1, allow_nan=False),
            "report.csv": csv_text(report), "report.html": html_text(report)}
    for name, text in made.items():
        write_text(folder / name, text)

def csv_text(report):
    """A line a cell, its figures unrounded in columns of their own: before_value, before_low, ..."""
    plain = ("suite", "row", "column", "network", "unit", "better", "set", "seed", "unavailable")
    keys = [(figure, key) for figure in FIGURES for key in ("value", "low", "high", "n")]
    keys += [("paper", "before"), ("paper", "after")]
    file = io.StringIO()
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow([*plain, *map("_".join, keys)])
    for cell in report["cells"]:
        lines.writerow([*(cell.get(key) for key in plain), *(value_of(cell, *key) for key in keys)])
    return file.getvalue()

def of(entries, **given):
    """The entries (dicts) that have the given values: of(cells, suite="table1")."""
    return [entry for entry in entries if all(entry[k] == v for k, v in given.items())]

def value_of(cell, which, key="value"):
    """A part of a cell's figure (one of FIGURES), or None if the cell does not have that figure."""
    return (cell.get(which) or {}).get(key)

def n_of(cell):
    """How many pictures a cell's figures are of, as text: "40 → 99" where before and after differ."""
    counts = [n for which in ("before", "after") if (n := value_of(cell, which, "n")) is not None]
    return " → ".join(map(str, dict.fromkeys(counts)))

def decimals(cells):
    """Decimals of a column: two digits of its narrowest interval, else three of its least value; counts 0."""
    figures = [cell.get(which) or {} for cell in cells for which in ("before", "after")]
    if cells and cells[0]["unit"] != "%" and all((f.get("value") or 0) % 1 == 0 for f in figures):
        return 0
    sizes = [f["high"] - f["low"] for f in figures if f.get("low") is not None and f["high"] > f["low"]]
    sizes = sizes or [abs(f["value"]) / 10 for f in figures if f.get("value")]
    return max(0, min(4, 1 - math.floor(math.log10(min(sizes))))) if sizes else 1

def number(value, digits, sign=""):
    """Without a negative zero, and with a minus as wide as a plus."""
    return "–" if value is None else f"{value:{sign}z.{digits}f}".replace("-", "−")

def interval(figure, digits):
    """[low, high], or "" if there were too few pictures for an interval."""
    ends = [figure.get(key) for key in ("low", "high")]
    return "" if None in ends else f"[{', '.join(number(end, digits) for end in ends)}]"

def within_noise(cell):
    """Is the difference no larger than the seed noise, or than an end of the seed noise's interval? None: not
    known."""
    floor, value = cell.get("floor") or {}, value_of(cell, "difference")
    reach = [abs(floor[key]) for key in ("value", "low", "high") if floor.get(key) is not None]
    return abs(value) <= max(reach) if reach and value is not None else None

def is_best(report, cell):
    """Is this row better than each other one by a paired interval without zero? If one is missing: no."""
    key = dict(suite=cell["suite"], column=cell["column"])
    rows = [c["row"] for c in of(report["cells"], **key) if value_of(c, "after") is not None]
    side = dict(lower=-1, higher=1).get(cell["better"], 0)
    won = 0
    for pair in of(report["against"], **key):
        sign = side * ((pair["row"] == cell["row"]) - (pair["other"] == cell["row"]))  # 0: not about this row
        won += all(sign * (pair["difference"][end] or 0) > 0 for end in ("low", "high"))
    return won > 0 and won == len(rows) - 1

def sentence(report, suite):
    """A suite in a sentence: the total (else the first) of what should fall; what should stay but fell."""
    cells = [c for c in of(report["cells"], suite=suite) if value_of(c, "after") is not None]
    said, columns = [], [c["column"] for c in cells if c["better"] == "lower"]
    if columns:
        total = next((column for column in columns if column.startswith("Total")), columns[0])
        fall = of(cells, column=total)
        digits, unit = decimals(fall), f" {fall[0]['unit'] or ''}".rstrip()
        first, last = ([value_of(c, which) for c in fall] for which in ("before", "after"))
        several = len(fall) > 1 and not report["compare"]
        fine = max(digits, 1) if several else digits  # a mean of counts has decimals
        mean = [number(None if None in some else sum(some) / len(fall), fine) for some in (first, last)]
        each = [f"{number(value, digits)}{unit} with {c['row']}" for value, c in zip(last, fall)]
        worst = f" on average of {len(fall)}, most {each[last.index(max(last))]}" * several
        now = ", ".join(each) if report["compare"] else mean[1] + unit + worst
        said.append(f"{total} {mean[0]} → {now}")
    stay = [c for c in cells if c["better"] == "higher" and within_noise(c) is not None]
    lost = [f"{c['row']}: {c['column']}" for c in stay
            if (c["difference"]["high"] or 0) < 0 and not within_noise(c)]
    if stay:
        said.append(f"of what should stay, {len(lost)} of {len(stay)} figures fall beyond seed noise" +
                    f" ({'; '.join(lost)})" * (0 < len(lost) < 4))
    title = TITLES.get(suite, suite).partition(":")[0]
    return f"{title}: {'; '.join(said) or 'no figure is available'}."

def small(text, before=""):
    return f"<small>{before}{text}</small>" if text else ""

def table(label, head, rows, kind=""):
    """HTML column heads, and rows of (HTML name, HTML <td>s) -> a table in a box that scrolls by itself."""
    head = "".join(f'<th scope="col">{text}</th>' for text in head)
    body = "".join(f'<tr><th scope="row">{name}</th>{cells}</tr>\n' for name, cells in rows)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
            f'<table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n')

def figures_html(report, cell, digits):
    """A cell's two <td>: before -> after with the paper's, and the difference with the seed noise."""
    if cell.get("unavailable"):
        return f'<td colspan="2" class="none">not available: {escape(cell["unavailable"])}</td>'
    before, after, change, floor = (cell.get(key) or {} for key in FIGURES)
    shown, grey = number(after.get("value"), digits), within_noise(cell)
    shown = f"<b>{shown}</b>" if is_best(report, cell) else shown
    shown = f"{number(before.get('value'), digits)} → {shown}"
    ranges = " → ".join(filter(None, (interval(before, digits), interval(after, digits))))
    least = min([figure["n"] for figure in (before, after) if figure], default=0)
    few = least < cell.get("of", 0) and f"only {least} of {cell['of']} pictures"
    paper = " → ".join(f"{x:g}" for x in (cell.get("paper") or {}).values() if x is not None)
    sign = "+" if change else ""  # a distance has no sign
    noise = floor and f"seed noise {number(floor['value'], digits, sign)} {interval(floor, digits)}"
    return (f"<td>{shown}{small(ranges)}{small(few)}{small(paper, 'the paper: ')}</td>"
            f'<td class="{"within" if grey else ""}">{number(change.get("value"), digits, "+")}'
            f"{small(interval(change, digits))}{small(noise, 'within ' if grey else '')}</td>")

def suite_html(report, suite):
    """A suite's table, a row a LoRA, and its footnotes; with --compare the rows against each other, too."""
    head, digits, notes, pairs, rows = ["LoRA"], {}, "", {}, []
    cells = of(report["cells"], suite=suite)
    for column in dict.fromkeys(c["column"] for c in cells):
        mine = of(cells, column=column)
        digits[column] = decimals(mine)
        unit = escape(f", {mine[0]['unit']}" if mine[0]["unit"] else "")
        better = {c["better"] for c in mine}  # rows differ where prompts name what one LoRA forgets
        arrow = dict(lower=" ↓", higher=" ↑").get(better.pop(), "") if len(better) == 1 else ""
        head += [f"<b>{escape(column)}</b>{unit}{arrow}<small>before → after</small>",
                 "&nbsp;<small>difference</small>"]
        sources = dict.fromkeys(f"{c['network']}, set {c['set']}, seed {c['seed']}, n = {n_of(c)}"
                                for c in mine if value_of(c, "after") is not None)
        notes += f"<li>{escape(column)}: {escape('; '.join(sources))}</li>" if sources else ""
    for row in report["rows"]:
        found = {c["column"]: figures_html(report, c, digits[c["column"]])
                 for c in of(cells, row=row["name"])}
        rows.append((escape(row["name"]) + small(escape(row["task"] or "")),
                     "".join(found.get(column, '<td colspan="2">–</td>') for column in digits)))
    for pair in of(report["against"], suite=suite):
        d, size = pair["difference"], digits[pair["column"]]
        shown = pairs.setdefault(f"{escape(pair['row'])} − {escape(pair['other'])}", {})
        shown[pair["column"]] = f"<td>{number(d['value'], size, '+')} {interval(d, size)}</td>"
    against = [(name, "".join(shown.get(c, "<td>–</td>") for c in digits)) for name, shown in pairs.items()]
    floors = {c["column"]: number(c["floor"]["value"], digits[c["column"]], "+" if c["difference"] else "")
              for c in cells if c["floor"]}  # the base's: the same in all rows
    titles = [escape(c) + small(c in floors and f"seed noise {floors[c]}") for c in digits]
    notes = f'<details class="note"><summary>Networks, sets, seeds, n</summary><ul>{notes}</ul></details>'
    return (table(TITLES.get(suite, suite), head, rows) + notes +
            ("<h3>Against each other, paired</h3>" + table(
                "Against each other", ["LoRAs", *titles], against) if against else ""))

def picture_html(file, said, blurred):
    """One picture, at most 208 pixels a side, inside the page; a broken one says so."""
    if not (image := open_or_none(file)):
        return "cannot be read"
    image.thumbnail((208, 208))
    inside = io.BytesIO()
    image.save(inside, "WEBP", quality=85)
    data = base64.b64encode(inside.getvalue()).decode()
    shown = f'<img src="data:image/webp;base64,{data}" alt="{escape(said)}">'
    if blurred:  # a checkbox, so that no script is needed and the space bar works
        return f'<label class="veil"><input type="checkbox" aria-label="show {escape(said)}">{shown}</label>'
    return shown

def grid_html(grid):
    prompts = list(map(escape, grid["prompts"]))
    rows = [(escape(row["label"]), "".join(
        f"<td>{picture_html(file, row['label'] + ': ' + prompt, grid['blurred'])}</td>"
        for file, prompt in zip(row["files"], grid["prompts"]))) for row in grid["rows"]]
    how = " Blurred: click, tap or press the space bar to see a picture." * grid["blurred"]
    return (f"<figure><h3>{escape(grid['title'])}</h3>" +
            table(grid["title"], ["", *(f"<span>{prompt}</span>" for prompt in prompts)], rows, "pictures") +
            f"<figcaption>{escape(grid['caption'])}{how}</figcaption>\n<details><summary>Prompts</summary>"
            f"<ul>{''.join(f'<li>{prompt}</li>' for prompt in prompts)}</ul></details></figure>\n")

def heat_html(matrix):
    """Rows: what the pictures were asked to show; columns: what the judge was asked about. A cell's tooltip:
    its interval."""
    def cell(share, n):
        if share is None:  # none of them could be read
            return "<td>–</td>"
        low, high = wilson(share * n / 100, n)
        return (f'<td style="--v: {share / 100:.2f}" title="95 % interval {low:.0f} to {high:.0f}">'
                f"{number(share, 0)}</td>")

    rows = [(escape(name) + small(f"n = {n}"), "".join(cell(share, n) for share in shares))
            for name, n, shares in zip(matrix["asked"], matrix["n"], matrix["percent"])]
    return table(f"{matrix['row']}, {matrix['when']}",
                 [escape(matrix["when"]), *map(escape, matrix["named"])], rows, "heat")

def chart(label, steps, values, low, high):
    """One curve as an SVG, its axes labelled at their ends."""
    width, height = (steps[-1] - steps[0]) or 1, (high - low) or 1
    points = " ".join(f"{44 + 280 * (x - steps[0]) / width:.1f},{130 - 110 * (y - low) / height:.1f}"
                      for x, y in zip(steps, values))
    return (f'<svg viewBox="0 0 340 150" role="img" aria-label="{label}, {low:.3g} to {high:.3g}, by step">'
            f'<path d="M44 20V130H324"/><polyline points="{points}"/><text x="44" y="12">{label}</text>'
            f'<text x="38" y="24" text-anchor="end">{high:.3g}</text>'
            f'<text x="38" y="130" text-anchor="end">{low:.3g}</text><text x="44" y="145">{steps[0]:g}</text>'
            f'<text x="324" y="145" text-anchor="end">step {steps[-1]:g}</text></svg>')

def html_text(report):
    """The page, in a reader's order: how good, how it looks, why, at what price, what is not said."""
    judges = sorted({f"{m['network']}, seed {m['seed']}" for m in report["matrices"]})
    heats = "".join(f'<h3>{escape(row)}</h3><div class="side">' +
                    "".join(map(heat_html, of(report["matrices"], row=row))) + "</div>"
                    for row in dict.fromkeys(m["row"] for m in report["matrices"]))
    curves = ""
    for c in [c for c in report["curves"] if c["step"]]:
        curves += (f'<h3>{escape(c["row"])}</h3><div class="side">' +
                   chart("dS", c["step"], c["dS"], min(0, *c["dS"]), max(0, *c["dS"])) +
                   chart("alpha", c["step"], c["alpha"], 0, 1) + "</div>")
    cost = [(escape(c["row"]), "".join(f"<td>{number(c.get(key), digits)}</td>" for key, digits in (
        ("seconds", 0), ("peak_gib", 2), ("forwards", 0))) if "forwards" in c else
        '<td colspan="3" class="none">not available: its log.csv or stages.csv is not beside it</td>')
        for c in report["cost"]]
    words = [(escape(name), f"<td>{sum(found.values())}</td><td>" +
              escape(", ".join(f"{word} {count}" for word, count in found.items())) + "</td>")
             for name, found in report["dropped"].items() if found]
    broken, notes = (f"<ul>{''.join(f'<li>{escape(str(line))}</li>' for line in report[key])}</ul>" *
                     bool(report[key]) for key in ("broken", "notes"))
    sections = [(TITLES.get(suite, suite), suite_html(report, suite)) for suite in report["suites"]] + [
        ("Before and after", "".join(map(grid_html, report["grids"]))),
        ("What became of each concept", heats and '<p class="note">Percent of "yes": a row is what the model '
         f"was asked for, a column what the judge was asked about ({escape('; '.join(judges))}). Hover "
         f"over a cell to see its interval.</p>{heats}"),
        ("Training", curves),
        ("Cost", cost and table("Cost", ["LoRA", "seconds", "peak, GiB", "forward passes"], cost)),
        ("Prompts dropped before anything was drawn", words and table(
            "Dropped prompts", ["set", "dropped", "by word"], words)),
        ("Pictures that could not be read", broken), ("What the figures do not say", notes)]
    sections = [(f"s{i}", title, text) for i, (title, text) in enumerate(sections) if text]
    concepts = ", ".join(dict.fromkeys(name for row in report["rows"] for name in row["concept"]))
    title = escape(f"{Path(report['model']).name} after forgetting {concepts}")
    mark = f" <small>--limit {report['limit']}: a quick look</small>" if report["limit"] is not None else ""
    style = (ROOT / "report.css").read_text(encoding="utf-8")
    bold = " Bold: better than each other row, by paired intervals that exclude zero." * report["compare"]
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>\n{style}</style></head>\n<body><main><h1>{title}</h1>\n" +
            "".join(f'<p class="lead">{escape(sentence(report, s))}</p>\n' for s in report["suites"]) +
            f'<p class="note">Weights {escape(str(report["weights"]))}, seed {report["seed"]}. '
            f'<code>{escape(report["command"])}</code></p>\n<nav aria-label="Sections">' +
            "".join(f'<a href="#{key}">{escape(head)}</a> ' for key, head, _ in sections) + "</nav>\n"
            '<p class="note">In brackets: 95 % intervals. Seed noise: the same difference between the base '
            "model and itself under another seed; a difference no larger than that, or than an end of its "
            f"interval, is grey.{bold}</p>\n" +
            "".join(f'<section id="{key}"><h2>{escape(head)}</h2>\n{text}</section>\n'
                    for key, head, text in sections) + "</main></body></html>\n")
    return re.sub(r"(?=</h[1-3]>)", lambda _: mark, page)  # names are escaped: only our own headings match
