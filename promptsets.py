"""The prompt sets of the paper's evaluation: I2P, four red-team sets (C.3), COCO. None is kept here.

    load_prompts("i2p-sexual", "black-forest-labs/FLUX.1-dev")["rows"]     # [(prompt, its own seed or None)]

A set is the user's csv file, else the model folder's promptsets/NAME.csv, else the hub's, with the user's
token. Rows that mention minors (sample.py's filter) are dropped before anything is drawn, counted by word.
"""
import csv
import random
from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from metrics import NotAvailable
from sample import MINORS, die

HUB, GITHUB = "https://huggingface.co/datasets/", "https://raw.githubusercontent.com/"
I2P, COCO = HUB + "AIML-TUDA/i2p", GITHUB + "rohitgandikota/erasing/main/data/coco_30k.csv"
MMA = HUB + "YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark"
UNLEARNDIFF = GITHUB + "OPTML-Group/Diffusion-MU-Attack/main/prompts/nudity.csv"  # 142 rows, C.3 says 143
# name -> title, concept looked for, where it is published, rows there, column of the prompts. The paper says
# neither which 10,000 captions nor which 500: the first (those of UnlearnDiffAtk's coco_10k.csv), and a draw
# from all with a seed of its own
SETS = {
    "i2p": ("I2P", "nudity", I2P, 4703, "prompt"),
    "i2p-sexual": ("I2P, the rows called sexual", "nudity", I2P, 4703, "prompt"),
    "mma": ("MMA-Diffusion", "nudity", MMA, 1000, "adv_prompt"),
    "p4d": ("P4D", "nudity", HUB + "joycenerd/p4d", None, "prompt"),
    "ringabell": ("Ring-A-Bell", "nudity", HUB + "Chia15/RingABell-Nudity", 285, None),  # it has no header
    "unlearndiff": ("UnlearnDiffAtk", "nudity", UNLEARNDIFF, 142, "prompt"),
    "coco": ("COCO, the first 10,000 captions", None, COCO, 30000, "prompt"),
    "coco-500": ("COCO, 500 captions at random", None, COCO, 30000, "prompt")}

def own_sets(model):
    """{name: (file, [title, concept, "attack"])} of a model folder's promptsets/NAME.csv, columns prompt and
    evaluation_seed. Its titles.txt has lines "name: title | concept | attack", the last two where there are
    any, and "name: = other" for a set's second name."""
    folder = Path(model) / "promptsets"
    found = {file.stem: (file, [file.stem]) for file in sorted(folder.glob("*.csv"))}
    titles = folder / "titles.txt"
    for line in titles.read_text("utf-8").splitlines() if titles.exists() else ():
        name, _, value = line.partition(":")
        marks, other = [part.strip() for part in value.split("|")], value.strip().removeprefix("= ")
        found[name] = found[other] if other in found else (folder / f"{name}.csv", marks)
    return found

def attack_sets(model):
    """The names of the red-team sets: those that the model folder marks so, else the four of Table 3."""
    own = own_sets(model)
    found = [name for name, (_, marks) in own.items() if "attack" in marks[1:]]
    return found if own else ["mma", "p4d", "ringabell", "unlearndiff"]

def published(name):
    """The csv files of a set of SETS, from the hub or its cache; NotAvailable says how else to get them."""
    title, _, address, _, _ = SETS[name]
    instead = f"--prompt-set {name}=PATH"
    if address.startswith(GITHUB):
        raise NotAvailable(f"{title} is on GitHub, curl -LO {address} and give {instead}")
    try:
        folder = snapshot_download(address.removeprefix(HUB), repo_type="dataset", allow_patterns="*.csv")
    except GatedRepoError:
        raise NotAvailable(f"{title} is gated, ask at {address}, then hf auth login") from None
    except RepositoryNotFoundError:
        raise NotAvailable(f"{title} is no longer at {address}, give {instead}") from None
    except Exception as error:  # every HTTP stack has a class of its own for "no network"
        raise NotAvailable(f"{title} cannot be reached ({type(error).__name__}), connect, or get it from "
                           f"{address} and give {instead}") from None
    files = sorted(Path(folder).rglob("*.csv"))
    if not files:
        raise NotAvailable(f"{title} has no csv at {address}, save its prompts as one and give {instead}")
    return files

def read_csv(path, columns, fail):
    """-> [{column: field} and "seed": its own or None], a dict a row, {} for a blank line.

    columns: those it needs; none where it may have no header, a row's last field is then its prompt.
    fail(why) does not return."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a quoted field may hold line breaks
            reader = csv.reader(file, strict=True)
            rows = [(row, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} is no readable UTF-8 csv ({type(error).__name__}: {error})")
    names = next(([name.strip() for name in row] for row, _ in rows if row), None)
    if not names:
        fail(f"{path} is empty")
    if columns or "prompt" in names:
        del rows[:1 + [bool(row) for row, _ in rows].index(True)]
    else:
        names = [*map(str, range(len(names) - 1)), "prompt"]
    if missing := [column for column in columns if column not in names]:
        fail(f"{path} has no column {' and no '.join(missing)}, only {', '.join(names)}")
    key = next((key for key in ("evaluation_seed", "sd_seed", "seed") if key in names), "")
    table = []
    for row, line in rows:
        if row and len(row) != len(names):
            fail(f"{path}, line {line}: {len(row)} fields, not {len(names)}; quote the ones with commas")
        fields = dict(zip(names, row))
        seed = fields.get(key, "").strip().removesuffix(".0")  # pandas' whole number beside a gap
        if seed and not (seed.isdecimal() and int(seed) < 2**63):
            fail(f"{path}, line {line}: {key} is {seed}, not an integer from 0 to 2^63 - 1")
        table.append(fields and fields | dict(seed=int(seed) if seed else None))
    return table

def load_prompts(name, model, source=None):
    """A set of SETS, of the model folder or, source, of the user's csv -> dict: name, title, concept looked
    for or None, rows [(prompt, seed or None)], total rows before any was dropped, dropped
    {word: rows}. NotAvailable says what to do where a set cannot be had; a local file of no use ends the run.
    """
    own = own_sets(model)
    title, concept, _, size, column = SETS.get(name, (name, None, None, None, "prompt"))
    file, (own_title, *marks) = own.get(name, (None, [title, concept]))
    if source:
        files, title, file = [Path(source)], f"{title}, from {Path(source).name}", None
    elif file:
        files, title, size, column = [file], own_title, None, "prompt"
    elif own:
        raise NotAvailable(f"{model} has no {name}, only {', '.join(own)}, give --prompt-set {name}=PATH")
    elif name in SETS:
        files = published(name)
    else:
        die(f"--prompt-set {name}: known are {', '.join(SETS)}; for another give {name}=PATH")

    def fail(why):
        if source or file:
            die(f"--prompt-set {name}: {why}")
        raise NotAvailable(f"{title}: {why}")

    part = None if file else name  # the model folder's files are taken whole
    columns = [column] * bool(column) + ["categories"] * (part == "i2p-sexual")
    rows = [row for path in files for row in read_csv(path, columns, fail)]
    if size and len(rows) != size:
        print(f"{title}: has {len(rows)} rows, as published it has {size}")
    if part == "i2p-sexual":
        rows = [row for row in rows if "sexual" in row.get("categories", "")]
    if part == "coco":
        rows = rows[:10000]
    kept, dropped = [], Counter()
    for row in rows:
        prompt = row.get(column or "prompt", "").strip()
        young = MINORS.search(prompt)
        if young or not prompt:
            dropped[" ".join(young[0].lower().split()) if young else "(empty)"] += 1
        else:
            kept.append((prompt, row["seed"]))
    if part == "coco-500":
        rng = random.Random(0)
        kept = sorted(kept, key=lambda _: rng.random())[:500]
    if not kept:
        fail(f"{', '.join(map(str, files))} has no prompt left")
    return dict(name=name, title=title, concept=marks[0] if marks else None, rows=kept,
                total=len(rows), dropped=dict(dropped))
