"""What an evaluation draws and asks: the paper's prompt sets, and which prompts and questions a suite takes.

    load_prompts("mma", "black-forest-labs/FLUX.1-dev")["rows"]     # [(prompt, its own seed or None)]

The sets are I2P, four red-team sets (C.2) and COCO; none is shipped. A set is read from the user's csv file,
else from the model folder's promptsets/NAME.csv, else from the hub, with the user's token. Rows that mention
minors (sample.py's filter) are dropped before anything is drawn, and counted by word.
"""
import csv
import random
from collections import Counter
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError

from metrics import NUDITY_PARTS, NotAvailable
from sample import die, load_concept, mentions, minors_in, prompts_folder, says, seed_of

HUB, GITHUB = "https://huggingface.co/datasets/", "https://raw.githubusercontent.com/"
I2P, COCO = HUB + "AIML-TUDA/i2p", GITHUB + "rohitgandikota/erasing/main/data/coco_30k.csv"
MMA = HUB + "YijunYang280/MMA-Diffusion-NSFW-adv-prompts-benchmark"
UNLEARNDIFF = GITHUB + "OPTML-Group/Diffusion-MU-Attack/main/prompts/nudity.csv"  # 142 rows, C.2 says 143
# name -> title, address, number of rows there (None: unknown), column of the prompts (None: no header)
SETS = {
    "i2p": ("I2P", I2P, 4703, "prompt"),
    "mma": ("MMA-Diffusion", MMA, 1000, "adv_prompt"),
    "p4d": ("P4D", HUB + "joycenerd/p4d", None, "prompt"),
    "ringabell": ("Ring-A-Bell", HUB + "Chia15/RingABell-Nudity", 285, None),  # it has no header
    "unlearndiff": ("UnlearnDiff", UNLEARNDIFF, 142, "prompt"),
    "coco": ("COCO, the first 10,000 captions", COCO, 30000, "prompt")}
# part -> set: the part is the set's first rows, whose pictures it shares (I2P's rows called sexual; 500
# captions). The paper does not say which 10,000 captions and which 500: we take the first 10,000 (9,939 of
# them are in UnlearnDiffAtk's coco_10k.csv) and draw 500 with a fixed seed
PARTS = {"i2p-sexual": "i2p", "coco-500": "coco"}

HARM = {"table2", "table3", "table4", "table5"}  # suites that ask the same of every LoRA, whatever it forgets
# Table 1's categories: while one of the three goes, the other two are scored too (C.2); and emoji-flux's
CATEGORIES = [names.split(", ") for names in (
    "cat, bird, airplane", "snoopy, pikachu, elon musk", "van gogh, ukiyo-e, chinese", "ghost, robot, alien",
    "noto, twemoji, fluent")]

def attack_sets(model):
    """The names of the red-team sets: the model folder's NAME-attack.csv, else the four of Table 3."""
    own = sorted(file.stem for file in Path(model, "promptsets").glob("*-attack.csv"))
    return own or ["mma", "p4d", "ringabell", "unlearndiff"]

def harm_of(model):
    """The concept of I2P and the red-team sets: nudity, or that in the model folder's promptsets/harm.txt."""
    said = Path(model, "promptsets", "harm.txt")
    return said.read_text("utf-8").strip() if said.exists() else "nudity"

def published(name):
    """The csv files of a set of SETS, from the hub or its cache; NotAvailable says how else to get them."""
    title, address, _, _ = SETS[name]
    instead = f"--prompt-set {name}=PATH"
    if address.startswith(GITHUB):
        raise NotAvailable(f"{title} is on GitHub, curl -LO {address} and give {instead}")
    try:
        folder = snapshot_download(address.removeprefix(HUB), repo_type="dataset", allow_patterns="*.csv")
    except GatedRepoError:
        raise NotAvailable(f"{title} is gated, ask at {address}, then hf auth login") from None
    except Exception as error:  # every HTTP stack has a class of its own for "no network"
        raise NotAvailable(f"{title} cannot be reached ({type(error).__name__}), connect, or get it from "
                           f"{address} and give {instead}") from None
    files = sorted(Path(folder).rglob("*.csv"))
    if not files:
        raise NotAvailable(f"{title} has no csv at {address}, save its prompts as one and give {instead}")
    return files

def read_csv(path, columns, fail):
    """-> a dict per row, {column: field}, its "seed" a number or None; blank lines are skipped. columns:
    those it must have; if none, it may lack a header, and a row is then a prompt. fail(why) never returns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a quoted field may hold line breaks
            reader = csv.DictReader(file, strict=True)
            names = [name.strip() for name in reader.fieldnames or ()]
            if not columns and "prompt" not in names:  # no header: the first line is a prompt
                file.seek(0)
                reader, names = csv.DictReader(file, strict=True), ["prompt"]
            reader.fieldnames = names
            rows = [(row, reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} is no readable UTF-8 csv ({type(error).__name__}: {error})")
    if missing := [column for column in columns if column not in names]:
        fail(f"{path} has no column {' and no '.join(missing)}, only {', '.join(names) or 'an empty line'}")
    key = next((key for key in ("evaluation_seed", "sd_seed", "seed") if key in names), None)
    if twice := [name for name in (*(columns or ["prompt"]), key) if names.count(name) > 1]:
        fail(f"{path} has column {twice[0]} twice")
    for row, line in rows:
        if None in row or None in row.values():  # more fields, or fewer
            fail(f"{path}, line {line}: not {len(names)} fields; quote the ones with commas")
        seed = row.get(key, "").strip().removesuffix(".0")  # pandas writes 12.0 if a seed is missing
        if seed and not (seed.isdecimal() and len(seed) < 20 and int(seed) < 2**63):
            fail(f"{path}, line {line}: {key} is {seed}, not an integer from 0 to 2^63 - 1")
        row["seed"] = int(seed) if seed else None
    return [row for row, _ in rows]

def load_prompts(name, model, source=None):
    """Read a set of SETS, PARTS or the model's folder, or source, the user's csv for it -> dict: name, of the
    whole set; title; rows [(prompt, seed or None)]; n, how many of them, from the first, are used; dropped
    {word: number of rows}; published, whether it has as many rows as the published set.
    NotAvailable says how to get a set that is not there; a local file that is unusable ends the run."""
    whole = PARTS.get(name, name)
    title, _, size, column = SETS.get(whole, (whole.removesuffix("-attack"), None, None, "prompt"))
    file = Path(model, "promptsets", f"{whole}.csv")
    if own := file.exists():  # then it is not the published set of that name
        source, size, column = source or file, None, "prompt"
    files = [Path(source)] if source else published(whole)

    def fail(why):
        if source:
            die(f"--prompt-set {whole}: {why}")
        raise NotAvailable(f"{title}: {why}")

    by_category = name == "i2p-sexual" and not own  # in the model folder's own i2p every row counts
    columns = [column] * bool(column) + ["categories"] * by_category
    rows = [row for path in files for row in read_csv(path, columns, fail)]
    total = len(rows)
    if size and total != size:
        print(f"{title}: has {total} rows, as published it has {size}")

    if whole == "i2p" and not own:
        rows.sort(key=lambda row: "sexual" not in row.get("categories", ""))  # stable: the file's order
    if whole == "coco" and not own:
        rows = rows[:10000]
        random.Random(0).shuffle(rows)
    kept, dropped, n = [], Counter(), 0
    for row in rows:
        prompt = row.get(column or "prompt", "").strip()
        young, asked = minors_in(prompt), not by_category or "sexual" in row.get("categories", "")
        if prompt and not young:
            kept.append((prompt, row["seed"]))
            n += asked
        elif asked:
            dropped[" ".join(young[0].lower().split()) if young else "(empty)"] += 1
    if not n:
        fail(f"{', '.join(map(str, files))} has no prompt left")
    n = min(n, 500) if name == "coco-500" else n
    return dict(name=whole, title=title, rows=kept, n=n, dropped=dict(dropped),
                published=size in (None, total))

def own_name(network):
    """The mark " (emoji)" for a network inside the folder emoji-flux, as clip/ is: its figures shall not bear
    a real metric's name alone. "" for one that is not inside a model's folder."""
    folder = Path(network).resolve().parent
    return f" ({folder.name.split('-')[0]})" * (folder / "model_index.json").exists()

def cycled(rows, n):
    """n rows, starting over when they run out, as sample_set does with its prompts."""
    return [rows[i % len(rows)] for i in range(n)]

def plan_images(concept, n, guidance, also=()):
    """-> {set of images: (its prompts, guidance)}, {figure: (set, for each of n images the phrases to ask)}.
    also: the other concepts that the LoRA forgets: prompts for what should stay name none of them, and what
    any of them was trained beside is not "never seen"."""
    target, is_style = concept["concept"], concept["task"] == "style"
    neighbours, unseen, unrelated = ([o for o in concept[key] if not mentions(o, also)]
                                     for key in ("neighbours", "unseen", "unrelated"))
    seen = "\n".join(text for c in (concept, *also) for text in c["train"] + [
        t.replace("{}", o) for t in c["preserve"] for o in c["neighbours"] + c["unrelated"]])
    unseen = [o for o in unseen if not says(seen, [o.split(" in ")[0] if is_style else o])]
    templates = [t for t in concept["preserve"] if not mentions(t, also)]
    if not unrelated or not templates:
        die(f"--concept {concept['name']}: all that its file calls unrelated is forgotten too")

    sets = {"target": (concept["eval"], guidance), "target, guidance 1": (concept["eval"], 1.0),
            "target, guidance 5": (concept["eval"], 5.0), "paraphrases": (concept["paraphrases"], guidance)}
    asked = {name: (name, [target] * n) for name in sets}
    for name, others, part in (("preserved", neighbours + unrelated, -1), ("never seen", unseen, 0)):
        # of "a dog in noto style", "preserved" asks about the style (-1), "never seen" about the dog (0)
        rows = [(t.replace("{}", o), [o.split(" in ")[part] if is_style else o])
                for t in templates for o in others]
        if rows:
            prompts, answers = zip(*rows)
            sets[name], asked[name] = (prompts, guidance), (name, cycled(answers, n))
    if not is_style:  # a style has no pairs
        prompts, partners = zip(*[(f"{t} and {o}", [o]) for o in unrelated + unseen for t in target])
        sets["pairs"] = prompts, guidance
        asked["target in a pair"] = "pairs", [target] * n
        asked["partner in a pair"] = "pairs", cycled(partners, n)
    styles = [s for s in concept["styles"] if is_style or not mentions(s, also)]
    scenes = [(b, s) for b in concept["backgrounds"] for s in styles or [""]]
    first = templates[0] if is_style else "{}"  # no "photo of a truck in watercolor style"
    things = cycled([first.replace("{}", o) for o in unrelated], len(scenes))
    said = [f"{o} {b}" if is_style else f"{o} {b} {s}".rstrip() for o, (b, s) in zip(things, scenes)]
    sets["scenes"] = said, guidance
    for name, column in (("backgrounds", 0), ("styles", 1)):  # "in noto style" is asked about as "noto style"
        if name == "backgrounds" or styles and not is_style:  # a style's "preserved" asks that already
            asked[name] = "scenes", cycled([[scene[column].split(" ", 1)[1]] for scene in scenes], n)
    return sets, asked

def plan_suite(suite, concept, forgotten, prompts_of, words, args):
    """What one suite asks -> its sets of pictures, {name: dict(prompts, n, guidance, ...)}, and its columns,
    dict(suite, column, metric, sets, asked, kind, unit, better, part). asked: for each set its questions, one
    per picture; part: which column of the metric's answers is the figure. prompts_of(name) gives a set as
    load_prompts does; words are what the harm metric looks for."""
    sets, columns, missing = {}, [], {}
    also = [c for c in forgotten if c is not concept]
    own, answers = ({}, {}) if suite in HARM else plan_images(concept, 100, args.sample_guidance, also)
    parts = NUDITY_PARTS if words == ["nudenet"] else [*words, "Total", "pictures"]
    acc, clip = "ACC" + own_name(args.judge), "CLIP" + own_name(args.clip)
    mark = "" if words == ["nudenet"] else own_name(args.detector)

    def take(name, prompts, guidance=args.sample_guidance, n=100, **more):
        sets[name] = dict(prompts=list(prompts), n=min(n, args.limit or n), guidance=guidance) | more

    def take_set(name):
        """-> its title, and the name it is taken under: a part that is its whole set has the set's name."""
        try:
            found = prompts_of(name)
        except NotAvailable as error:
            missing[name] = str(error)
            return SETS[PARTS.get(name, name)][0], name
        prompts, seeds = zip(*found["rows"])
        drawn = [seed_of(0, found["name"], i) if seed is None else seed for i, seed in enumerate(seeds)]
        seeds = None if set(seeds) == {None} else drawn  # where it lacks one, ours stands in
        name = name if found["n"] < len(prompts) else found["name"]
        take(name, prompts, n=found["n"], seeds=seeds, shared=found["name"], published=found["published"])
        return found["title"], name

    def column(title, metric, *names, asked=None, kind="mean", unit="", better="higher", part=0):
        why = next((missing[name] for name in names if name in missing), None)
        asked = asked or [sets[name]["prompts"] for name in names if not why]  # else each its own prompt
        asked = [cycled(said, sets[name]["n"]) for name, said in zip(names, asked)]
        columns.append(dict(suite=suite, column=title, metric=metric, sets=names, asked=asked, kind=kind,
                            unit=unit, better=better, part=part, unavailable=why))

    def judged(title, *names, asked, better="lower"):  # part None: a yes to any question
        column(title, "judge", *names, asked=asked, kind="rate", unit="%", better=better, part=None)

    def harmful(title, *names, part):
        kind = "pictures" if part == "pictures" else "count"
        column(title + mark, "harm", *names, kind=kind, better="lower", part=parts.index(part))

    def unless_named(name, better, concepts):
        """better, but None if the set's prompts name one of the concepts: no change there is good or bad."""
        said = sets[name]["prompts"][:sets[name]["n"]] if name in sets else []
        return None if any(mentions(prompt, concepts) for prompt in said) else better

    def unrelated_and_locality():
        column(f"{clip}, unrelated", "clip", "scenes")
        for part, side in enumerate(("inside", "outside")):
            column(f"pixels {side} of the mask", "locality", "target", unit="of 255", part=part,
                   better=unless_named("target", "lower", also) if side == "outside" else None)
        for name in sets.keys() & {"target", "preserved", "never seen"}:  # for the matrix: what each shows
            sets[name] |= dict(shows=answers[name][1])

    def quality(name, **rewards):
        better = unless_named(name, "higher", forgotten)
        column(clip, "clip", name, better=better)
        for title, network in rewards.items():
            if network:
                column(title, title, name, better=better)

    if suite == "concept":
        for name in own:
            take(name, *own[name])
        for figure, (name, said) in answers.items():
            judged(figure, name, asked=[said], better="lower" if said[0] == concept["concept"] else "higher")
        unrelated_and_locality()
    elif suite in ("table1", "table7"):
        for name in ("target", "scenes", "preserved"):  # the last is for the matrix
            take(name, *own[name])
        judged(acc, "target", asked=[[concept["concept"]]])
        category = next((names for names in CATEGORIES if concept["name"] in names), [])
        gone = {each["name"] for each in forgotten}
        known = {file.stem for file in prompts_folder(args.model).glob("*.txt")}  # a model may have its own
        others = []
        for name in [each for each in category if each in known - gone]:
            said = load_concept(args.model, name)["eval"]
            if kept := [prompt for prompt in said if not mentions(prompt, also)]:
                others.append(f"other, {name}")
                take(others[-1], kept, **dict(shared=others[-1]) if kept == said else {})
        if others:
            column(f"{clip}, the other" + " two" * (len(others) == 2), "clip", *others)
        unrelated_and_locality()
    elif suite == "table8" and len(forgotten) > 1:
        for each in forgotten:
            take(f"target, {each['name']}", each["eval"])
        judged(acc, *sets, asked=[[each["concept"]] for each in forgotten])
        take("scenes", *own["scenes"])
        column(clip, "clip", "scenes")
        alike = [each for each in forgotten if (each["task"] == "style") == (concept["task"] == "style")]
        union = {key: list(dict.fromkeys(sum([each[key] for each in alike], [])))
                 for key in ("neighbours", "unrelated", "unseen")}
        kept, said = plan_images(concept | union, 100, args.sample_guidance, forgotten)
        for name in [name for name in ("preserved", "never seen") if name in kept]:
            take(f"{name}, of all", *kept[name])
            judged(f"{name}, of all", f"{name}, of all", asked=[said[name][1]], better="higher")
        for each in forgotten:
            judged(f"{acc}, {each['name']}", f"target, {each['name']}", asked=[[each["concept"]]])
    elif suite == "table12":
        take("rephrased", concept["paraphrases"], n=120)  # 15 prompts x 8; emoji-flux: 4 x 30
        judged("rephrased", "rephrased", asked=[[concept["concept"]]])
    elif suite == "table3":
        attacks = [take_set(name) for name in attack_sets(args.model)]
        for title, name in attacks:
            harmful(title, name, part="pictures")
        harmful("Total", *(name for _, name in attacks), part="pictures")
    elif suite == "table2":
        _, i2p = take_set("i2p")
        for part in parts:
            harmful(part, i2p, part=part)
        _, coco = take_set("coco")
        column("FD-judge" if own_name(args.judge) else "FID", "distance", coco,
               better=unless_named(coco, "lower", forgotten))
        quality(coco, ImageReward=args.image_reward, PickScore=args.pick_score)
    elif suite in ("table4", "table5"):
        _, i2p = take_set("i2p-sexual")
        harmful("Residuals", i2p, part="Total")
        _, coco = take_set("coco-500")
        quality(coco, ImageReward=suite == "table4" and args.image_reward)
    return sets, columns
