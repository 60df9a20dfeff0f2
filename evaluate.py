"""What a LoRA erased and what it kept, before and after at the same seeds, by the paper's protocols or ours.

    python evaluate.py --model emoji-flux --lora out/emoji-flux-cat                    # our own figures
    python evaluate.py --model emoji-flux --lora out/emoji-flux-cat --suite table1     # the paper's Table 1
    python evaluate.py --lora out/FLUX.1-dev-nudity --suite table2 table3              # I2P, COCO, attacks
    python evaluate.py --compare out/inpo out/ga --suite table4                        # variants, paired

A suite is a set of prompts and metrics; nothing is trained. Missing pictures are drawn: each LoRA's, and the
frozen model's once, in OUT, with two seeds: the second tells how much a figure moves by chance. Scores stay
beside the pictures. report.html, .json and .csv, with n, seed, network and 95 % interval of each figure, are
written beside the LoRA, or to OUT/report if there are several.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import sys
import warnings
import zlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sample import (PICTURES, TASKS, check_folder, check_plan, check_set, contact_sheet, die, drawing_flags,
                    encode_prompts, finder_flags, fingerprint, guarded, load_concept, load_denoiser,
                    model_flags, number, open_or_none, place, prompts_folder, read_settings, sample_set,
                    seed_of, seed_suffix, setup, stage, write_text)

SUITES = "concept table1 table2 table3 table4 table5 table7 table8 table12".split()
ROUND = 1000  # prompts encoded at once
CAPTIONS = {"target": "what the concept became (Figures 4 and 5)", "paraphrases": "without its name",
            "rephrased": "without its name (Table 12)", "preserved": "neighbours and unrelated things",
            "scenes": "unrelated prompts (Figures 5 and 8)", "coco": "unrelated prompts (Figure 8)",
            "i2p": "unsafe prompts (Figures 2 and 6)", "other": "of the same category (C.2)",
            "pairs": "the concept beside something else", "never seen": "in no set of the training"}
NOTES = [
    "A judge's yes is not a person's: it misses what is faint, and says yes to what only looks alike.",
    "Seed noise is the frozen model against itself under another seed: a difference within it may be chance.",
    "Intervals of counts and differences are a bootstrap over pictures: too narrow where fewer than about "
    "three pictures differ, and of no width where none does.",
    "What a concept's file calls unrelated was in the preserve set, in other scenes. Never seen is what no "
    "set by that file holds (a run's own --images, --prompts or --preserve may). Table 1's other two of a "
    "category were in the preserve set, too, where the file calls them neighbours.",
    "Where a prompt of COCO or its stand-in names what a LoRA forgets, the set's scores have no arrow: they "
    "need neither stay nor fall.",
    "Cost lacks the forward passes of sampling that was killed, and of images that another run had made.",
    "Intervals hold for these prompts and this seed; another training run differs by more (README: results).",
    "The paper's counts, if shown, are over whole prompt sets; ours (see n) over what the filter keeps.",
    "A Frechet distance has no paired difference, and is not counted among what should stay."]
OF_IMAGES = ["Pictures made elsewhere are taken to be drawn with the seeds of --list; unless a manifest says "
             "so, before and after may come from different noise."]

def arguments(given=None):
    parser = model_flags(__doc__, needs_concept=False, out="the frozen model's pictures, for all LoRAs "
                         "(default out/MODEL-base, with -SEED where it is not 0)")
    parser.add_argument("--task", choices=TASKS, help="for a --concept without a prompt file; only for "
                        "Tables 2 to 5, which ask nothing about the concept")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--lora", type=Path, nargs="+", action="extend", metavar="DIR",
                      help="train.py's --out; several make one report, a row each; if a LoRA forgets "
                           "several concepts, --concept says which one is asked about")
    what.add_argument("--compare", type=Path, nargs="+", action="extend", metavar="DIR",
                      help="several LoRAs of one concept, and their differences from each other")
    what.add_argument("--images", type=Path, metavar="DIR", dest="pictures",
                      help="pictures made elsewhere, named as --list says, or by a manifest.json like "
                           "sample.py's in each DIR/SET/")
    parser.add_argument("--suite", nargs="+", action="extend", choices=[*SUITES, "all"], metavar="SUITE",
                        help=f"{', '.join(SUITES)}, all: the paper's tables (default: concept, our figures)")
    parser.add_argument("--report", type=Path, help="where the report goes (default: beside the LoRA, or "
                        "OUT/report where there are several)")
    parser.add_argument("--limit", type=number(int), help="at most N pictures a set: a quick look")
    parser.add_argument("--list", type=Path, metavar="FILE",
                        help="write each picture's name, seed and prompt there, a json line each, and stop")
    parser.add_argument("--prompt-set", nargs="+", action="extend", default=[], metavar="NAME=CSV",
                        help="a prompt set from your file (default: the model's promptsets/, else the hub)")
    parser.add_argument("--no-floor", action="store_true",
                        help="do not draw the base with a second seed: a third fewer pictures, no seed noise")
    networks = parser.add_argument_group("networks")
    networks.add_argument("--judge", help="a CLIP or a LLaVA (default: the model's clip/, else LLaVA-1.5)")
    networks.add_argument("--clip", help="of the CLIP score (default: the model's clip/, else OpenAI's B/32)")
    networks.add_argument("--image-reward", help="default THUDM/ImageReward; none if the model has a clip/")
    networks.add_argument("--pick-score", help="default yuvalkirstain/PickScore_v1; likewise")
    finder_flags(networks.add_argument)
    drawing_flags(parser.add_argument_group("how pictures are drawn").add_argument)
    args = parser.parse_args(given)
    args.suite = args.suite or ["concept"]
    return args

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import broadcast_object_list  # noqa: E402
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: E402
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as WEIGHTS  # noqa: E402
from diffusers.training_utils import free_memory  # noqa: E402
from huggingface_hub import snapshot_download  # noqa: E402
from PIL import Image  # noqa: E402

import metrics  # noqa: E402
from mask import find_masks  # noqa: E402
from promptsets import HARM, PARTS, cycled, harm_of, load_prompts, own_name, plan_suite  # noqa: E402
from report import (FIGURES, PAPER, VERSION, check_report, decimals, n_of, of, value_of,  # noqa: E402
                    write_report)

BLANK = Image.new("RGB", (64, 64))  # stands in for a picture that cannot be read

def network_id(name):
    """A network's name with its revision: the hub's commit, or a checksum of its local weights."""
    if Path(name).exists():
        suffixes = {".safetensors", ".bin", ".pt", ".pth"}
        weights = [Path(name)] if Path(name).is_file() else [
            file for file in sorted(Path(name).iterdir()) if file.suffix in suffixes]
        return f"{name}@{fingerprint(weights)}"
    with contextlib.suppress(Exception):  # the hub is away, or the name is a URL
        return f"{name}@{Path(snapshot_download(name, allow_patterns='*.json')).name[:8]}"
    return name

def finder(words, args):
    """The detector's name with all that its answers depend on: for the report, and as its scores' key."""
    name = package_id("NudeNet", "nudenet") if words == ["nudenet"] else network_id(args.detector)
    return f"{name}, {', '.join(words)} at {args.threshold}"

def package_id(name, package):
    """A network's name with the version of the package that brings or names its weights."""
    return name + (f" {version(package)}" if find_spec(package.replace("-", "_")) else "")

def metric_table(args, words):
    """{metric: (name() of its network, load() -> network(images, what is asked) -> answers or features)}. For
    a metric of your own add an entry here, and a column() in promptsets.plan_suite."""
    def by(load, name, *more):
        return (lambda: network_id(name)), functools.partial(load, name, args.device, *more)

    inception = (lambda: package_id("Inception of torch-fidelity", "torch-fidelity"),
                 functools.partial(metrics.inception_features, args.device))
    harm = (lambda: finder(words, args),
            functools.partial(metrics.load_kinds, words, args.detector, args.threshold, args.device))
    if words == ["nudenet"]:
        harm = (lambda: package_id("NudeNet", "nudenet") + ", 320 px", metrics.load_nudenet)
    return dict(judge=by(metrics.load_judge, args.judge, args.dtype),
                clip=by(metrics.load_clip_score, args.clip),
                distance=by(metrics.clip_features, args.judge) if own_name(args.judge) else inception,
                ImageReward=by(metrics.load_image_reward, args.image_reward),
                PickScore=by(metrics.load_clip_score, args.pick_score, None),  # None: its own scale
                harm=harm, locality=(None, None))  # by masks: score_all

def read_rows(args):
    """What is judged, a row each: dict(name, folder, digest of the LoRA, forgotten and asked concepts)."""
    if args.pictures:
        if len(args.concept or []) != 1:
            die(f"--images {args.pictures}: needs one --concept, to know what is asked")
        return [dict(name=args.pictures.resolve().name, folder=args.pictures, digest=None,
                     forgotten=args.concept, asked=args.concept[0])]
    rows = []
    for folder in args.lora:
        files = [f for f in [folder / WEIGHTS] if f.exists()] or sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            die(f"--lora {folder}: holds no {WEIGHTS}, nor one other .safetensors alone" +
                ": give its folder" * folder.is_file())
        runs = [f / "args.json" for f in (folder, folder.parent)]  # the latter for --save-every's step-N
        run = next((f for f in runs if f.exists()), runs[0])
        settings = read_settings(run, None if args.concept else "--concept is missing, give it")
        base, forgotten = settings.get("model") or args.model, settings.get("concept")
        own = settings.get("images") and args.concept  # trained without a prompt file; to ask takes one
        if own or not (isinstance(forgotten, list) and forgotten and isinstance(forgotten[0], str)):
            forgotten = args.concept or die(f"{run}: names no concept, give --concept")
        if Path(base).name != Path(args.model).name:
            die(f"{folder}: was trained on {base}, not on --model {args.model}")
        asked, forgotten = sorted({*(args.concept or forgotten)}), sorted(forgotten)  # in any order
        alone = len(asked) == 1 or set(args.suite) <= HARM | {"table8"}  # the others ask about one concept
        if not alone or not set(asked) <= set(forgotten):
            die(f"{folder}: has forgotten {', '.join(forgotten)}: give one of them as --concept")
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()  # another LoRA, other pictures
        rows.append(dict(folder=folder, file=files[0], digest=digest, forgotten=forgotten, asked=asked[0],
                         weights=settings.get("weights")))
    said = sorted({" + ".join(row["forgotten"]) for row in rows})
    if args.compare and len(said) > 1 and not set(args.suite) <= HARM:  # HARM's are the same for all
        die(f"--compare: needs LoRAs that forget the same, these forget {', '.join(said)}")
    for names in zip(*[(row["asked"], row["folder"].resolve().name, str(row["folder"])) for row in rows]):
        if len(set(names)) == len(rows):  # the shortest that tells them apart
            return [row | dict(name=name) for row, name in zip(rows, names)]
    die("--lora, --compare: names one LoRA twice")

def check_loras(loras, args):
    """Refuse a LoRA of {digest: file} that is corrupt or does not fit the model, before anything is written,
    by loading it into a network on the meta device, which takes no memory."""
    logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)  # else it says the same before us
    config = FluxTransformer2DModel.load_config(args.model, subfolder="transformer", revision=args.weights)
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(config)
    layers = {f"transformer.{name}" for name, part in network.named_modules()
              if isinstance(part, torch.nn.Linear)}
    for digest, file in loras.items():
        check_folder("lora", file.parent / f"after{seed_suffix(args.seed)}")  # its pictures go there
        try:
            lora, alphas = FluxPipeline.lora_state_dict(file.parent, weight_name=file.name,
                                                        return_alphas=True)
            odd = [key for key in lora if key.split(".lora")[0].removesuffix(".alpha") not in layers]
            if odd or not lora:  # peft would only warn and ignore it
                raise ValueError(f"it has no layer for {odd[0]}" if odd else "it holds nothing")
            halves = {key.replace(f"lora_{a}", f"lora_{b}") for a, b in ("AB", "BA") for key in lora
                      if key.endswith(f".lora_{a}.weight")}
            if lost := sorted(halves - lora.keys()):
                raise ValueError(f"it lacks {lost[0]}")
            if odd := [key for key, value in lora.items() if not value.isfinite().all()]:
                raise ValueError(f"its {odd[0]} is not finite")
            with warnings.catch_warnings(action="ignore"):  # that meta tensors hold no values
                FluxPipeline.load_lora_into_transformer(lora, alphas, network, adapter_name=digest)
            network.set_adapters(digest)
        except Exception as error:  # safetensors, peft and diffusers' converters raise many kinds
            why = str(error).strip().splitlines()[-1].strip()
            die(f"--lora {file.parent}: does not load into {args.model}: {why}")

def own_files(files, said, seeds):
    """The files of pictures made elsewhere: manifest.json's, whose prompts (and seeds, if any) must be those
    asked for; else the files given here; else, of other names, all in their order. None may be missing."""
    folder = files[0].parent
    if (manifest := folder / "manifest.json").exists():
        try:
            rows = json.loads(manifest.read_text("utf-8-sig"))
            listed = [(folder / row["file"], row["prompt"], row.get("seed")) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            die(f"--images {manifest}: is no list of objects with file and prompt")
        for (file, prompt, seed), asked, noise in zip(listed, said, seeds):
            if prompt != asked or seed not in (noise, None):
                what = "prompt" if prompt != asked else "seed"
                die(f"--images: {file} has another {what} in manifest.json than asked for: see --list")
        files = [file for file, *_ in listed[:len(said)]]
    elif not any(file.exists() for file in files):
        drawn = [file for file in folder.glob("[!.]*")
                 if file.suffix.lower() in PICTURES and not file.stem.lower().endswith(".mask")]
        drawn.sort(key=lambda file: re.sub(r"\d+", lambda n: n[0].zfill(20), file.name))  # 10 after 9
        if len(drawn) >= len(said):
            files = drawn[:len(said)]
            print(f"--images {folder}: taken in order, {files[0].name} to {files[-1].name}")
    if (found := sum(file.exists() for file in files)) < len(said):
        die(f"--images {folder}: holds {found} of {len(said)} pictures; see --list for names and prompts")
    return files

def seeds_of(job):
    """The noise seed of each of a job's pictures."""
    return job.made_by.get("seeds") or [seed_of(job.args.seed, job.noise, i) for i in range(job.n)]

def plan_jobs(rows, args):
    """{(row, set, when): Namespace of what sample_set takes, and its files}; scores are kept in its folder.
    Pictures that other settings have made are refused."""
    jobs = {}
    for row in rows:
        others = [name for name in row["forgotten"] if name != row["asked"]]  # no prompt may mention them
        after = args.out / "report" if args.pictures else row["folder"] / f"after{seed_suffix(args.seed)}"
        for name, one in row["sets"].items():
            called = one.get("shared", name)  # a part of a set uses the whole set's pictures
            part = Path("shared" if "shared" in one else "+".join([row["asked"], *others])) / called
            for when in ("before", "after", "again")[:2 if args.no_floor else 3]:
                mine = argparse.Namespace(**vars(args) | dict(sample_guidance=one["guidance"]))
                mine.seed += when == "again"
                made_by = dict(lora=row["digest"] if when == "after" else None)
                if one.get("seeds") and when != "again":
                    made_by["seeds"] = one["seeds"]
                # the noise depends on the set, not on guidance or LoRA
                job = argparse.Namespace(
                    folder=(after if when == "after" else args.out / when) / part, made_by=made_by,
                    noise=f"evaluate {called.split(',')[0]}", prompts=one["prompts"], n=one["n"], args=mine,
                    broken=[])  # of its files, those that score() could not read
                job.files = [job.folder / f"{i:03}.png" for i in range(job.n)]
                if args.pictures and when == "after":
                    job.files = [args.pictures / called / file.name for file in job.files]
                    if not args.list:
                        job.files = own_files(job.files, cycled(job.prompts, job.n), seeds_of(job))
                elif not args.list:
                    check_set(job.folder, job.noise, job.prompts, job.n, mine, **made_by)
                jobs[row["name"], name, when] = job
    return jobs

def in_rounds(jobs, group):
    """Split the work into rounds of some ROUND prompts: [(prompts, [(job, up to which picture)])]. The states
    of a prompt take 4 MB with T5-XXL: those of COCO's 10,000 would not fit into memory."""
    rounds = []
    for first in range(0, max((job.n for job in jobs), default=0), ROUND):
        for job in (job for job in jobs if first < job.n):  # before and after: the same prompts, encoded once
            stop = min(first + ROUND, job.n)
            whole_groups = range(first // group * group, -(-stop // group) * group)  # as sample_set draws
            said = {job.prompts[i % len(job.prompts)] for i in whole_groups}
            if not rounds or len(rounds[-1][0] | said) > max(ROUND, len(rounds[-1][0])):
                rounds.append((set(), []))
            rounds[-1][0].update(said)
            rounds[-1][1].append((job, stop))
    return rounds

def sample_round(prompts, parts, loras, args):
    """Draw a round of in_rounds. Then call free_memory(): diffusers' hooks keep its networks in a cycle."""
    embeds = encode_prompts(prompts, args)
    pipe = load_denoiser(args)
    with warnings.catch_warnings(action="ignore"):  # peft warns of several adapters: here one is on at a time
        for digest, file in loras.items():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=digest)
    place(pipe, args)
    for job, count in parts:
        if job.made_by["lora"]:
            pipe.enable_lora()
            pipe.set_adapters(job.made_by["lora"])
        elif loras:
            pipe.disable_lora()
        sample_set(lambda: pipe, embeds, job.folder, job.noise, job.prompts, count, job.args, **job.made_by)
    PartialState().wait_for_everyone()

def keep(folder, key, files, make):
    """make()'s result for these files: kept in folder/scores.json, made anew if they or metrics.py change."""
    path, kept = folder / "scores.json", {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or cut short: make again
        kept = dict(json.loads(path.read_text()))
    seen = [(os.path.relpath(f, folder), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    stamp = zlib.crc32(f"{fingerprint([Path(metrics.__file__)])} {seen}".encode())
    if kept.get(key, {}).get("stamp") != stamp:
        kept[key] = dict(stamp=stamp, found=make())
        write_text(path, json.dumps(kept))
    return kept[key]["found"]

def compute(load, files, asked):
    """A network's answers about pictures, or their features, (N, parts); NaN for one that cannot be read."""
    network, found = load(), []
    if isinstance(network, metrics.NotAvailable):
        raise network
    for first in range(0, len(files), 50):  # 10,000 pictures do not fit into memory
        images = [open_or_none(file) for file in files[first:first + 50]]
        said = network([image or BLANK for image in images], asked[first:first + 50])
        found.append(np.array(said, float).reshape(len(images), -1))  # (50, parts)
        found[-1][[image is None for image in images]] = np.nan
    return np.concatenate(found)

def score(job, asked, key, load):
    """A metric's answers about a job's pictures, (N, parts), kept beside them."""
    key = f"{key}, {zlib.crc32(json.dumps(asked).encode()):08x}, {job.n}"
    found = np.array(keep(job.folder, key, job.files, lambda: compute(load, job.files, asked).tolist()))
    job.broken = [str(file) for file, row in zip(job.files, found) if np.isnan(row).any()]
    return found

def change(before, other, masks_of):
    """(N, 2): how much a pixel changes inside and outside of the concept's mask; NaN where there is none."""
    old, new = ([open_or_none(file) for file in job.files] for job in (before, other))
    if any(a.size != b.size for a, b in zip(old, new) if a and b):
        raise metrics.NotAvailable("the pictures have another size than the model's, give --size")
    return metrics.locality(old, new, masks_of(tuple(before.files))).tolist()

def distance(before, other, load):
    """Frechet distance of two sets' features, a dict(value, low, high, n). A picture that cannot be read is
    left out of both sets: the jackknife then leaves out the same prompts on either side."""
    sets = np.stack([compute(load, job.files, job.files) for job in (before, other)])  # (2, N, features)
    return metrics.frechet_summary(*sets[:, ~np.isnan(sets).any((0, 2))])

def tried(load):
    """load()'s network, or the reason why there is none."""
    try:
        return load()
    except metrics.NotAvailable as error:
        return error

def answers(row, column, when, jobs, key, load):
    """A column's answers under one condition: one a picture (N,), or one figure for a set, or None."""
    if column["unavailable"]:
        raise metrics.NotAvailable(column["unavailable"])
    before = jobs[row["name"], column["sets"][0], "before"]
    mine = [jobs[row["name"], name, when] for name in column["sets"]]
    if tell := dict(distance=distance, locality=change).get(column["metric"]):
        if when == "before":
            return None  # these two compare a set with "before"
        found = keep(mine[0].folder, f"{key}, from {before.folder}", before.files + mine[0].files,
                     lambda: tell(before, *mine, load))
        lost = np.isnan(found).any(1) if tell is change else [found["n"] < before.n] * before.n
        for job in (before, *mine):
            job.broken = [str(file) for file, odd in zip(job.files, lost) if odd and not open_or_none(file)]
        if tell is distance:
            return found
        if np.isnan(found).all():
            raise metrics.NotAvailable("no picture before has a mask, lower --threshold; a style has one "
                                       "only where it is framed")
        return np.array(found)[:, column["part"]]
    found = [score(job, asked, key, load) for job, asked in zip(mine, column["asked"])]  # each (N, parts)
    return np.concatenate([f.max(1) if column["part"] is None else f[:, column["part"]] for f in found])

def score_all(rows, jobs, concepts, words, args):
    """Add to each column its network, and its answers "before", "after" and "again" or why there are none ->
    make_matrices's. Metrics are the outer loop, so that one network is loaded at a time."""
    matrices = []

    @functools.lru_cache(1)  # for every LoRA, and for the noise floor
    def masks_of(files):
        images = [open_or_none(file) or Image.new("RGB", (args.size, args.size)) for file in files]
        with metrics.reach(network, "connect, or give --detector and --sam; pip install nudenet for nudity"):
            return np.stack(list(find_masks(images, concept, args)))  # (N, H, W)

    asked = {column["metric"] for row in rows for column in row["columns"]}
    for metric, (name, load) in metric_table(args, words).items():
        if metric not in asked:  # name() may ask the hub
            continue
        network = name and name()
        load = functools.cache(functools.partial(tried, load)) if load else masks_of  # loaded, or not, once
        for row in rows:
            concept = concepts[row["asked"]]
            if metric == "locality":
                network = f"{finder(concept['detect'], args)}, {concept['task']}, {network_id(args.sam)}"
            key = f"{metric}, {network}"
            for column in of(row["columns"], metric=metric):
                column["network"] = network
                try:
                    for when in ("before", "after", "again")[:2 if args.no_floor else 3]:
                        column[when] = answers(row, column, when, jobs, key, load)
                except metrics.NotAvailable as error:
                    column["unavailable"] = str(error)
            if metric == "judge":
                with contextlib.suppress(metrics.NotAvailable):  # the cells of the judge say why
                    matrices += make_matrices(row, jobs, key, load, args.seed)
    return matrices

def make_matrices(row, jobs, key, load, seed):
    """Every concept asked of every concept's pictures: what the target became, what its neighbours lost."""
    sets = {name: one for name, one in row["sets"].items() if "shows" in one}
    named = list(dict.fromkeys(tuple(phrases) for one in sets.values() for phrases in one["shows"]))
    starts, phrases = np.cumsum([0, *map(len, named[:-1])]), sum(named, ())
    shows = [" / ".join(some) for one in sets.values() for some in one["shows"][:one["n"]]]  # (N,)
    for when in ("before", "after") if len(sets) > 1 else ():
        said = np.concatenate([score(jobs[row["name"], name, when], [phrases] * one["n"], key, load)
                               for name, one in sets.items()])  # (N, phrases)
        said = np.maximum.reduceat(said, starts, axis=1)  # (N, named), a yes to any phrase
        groups, n, percent = zip(*metrics.confusion(said, shows))
        yield dict(row=row["name"], when=when, network=key.removeprefix("judge, "), seed=seed, asked=groups,
                   n=n, named=list(map(" / ".join, named)), percent=percent)

def make_cell(row, column, args):
    """A column's figures for one LoRA, as report.json has them: FIGURES are dict(value, low, high, n)."""
    own = [row["sets"].get(name, {}).get("seeds") for name in column["sets"]]  # none: not available
    seeds = {"own" if some else str(args.seed) for some in own}
    kind, before, after, again = column["kind"], *(column.get(when) for when in ("before", "after", "again"))
    cell = dict(suite=column["suite"], row=row["name"], column=column["column"], network=column["network"],
                unit=column["unit"], better=column["better"], set=" + ".join(column["sets"]),
                seed=" + ".join(sorted(seeds)) if len(seeds) > 1 or "own" in seeds else args.seed,
                **dict.fromkeys(FIGURES), unavailable=column["unavailable"], paper=None)
    published = all(row["sets"].get(name, {}).get("published", True) for name in column["sets"])
    if Path(args.model).name == "FLUX.1-dev" and not args.limit and row["digest"] and published:
        called, forgotten = row["folder"].resolve().name, " + ".join(row["forgotten"])
        names = [forgotten] * (not args.compare or called == "INPO")  # else a variant
        if column["suite"] in ("table4", "table5") and forgotten == "nudity":
            names.insert(0, called)  # "no mask", say
        printed = (PAPER.get((column["suite"], name, column["column"])) for name in names)
        cell["paper"] = next(filter(None, printed), None)
    if cell["unavailable"]:
        return cell
    if column["metric"] == "distance":
        return cell | dict(after=after, floor=again, of=row["sets"][column["sets"][0]]["n"])
    if before is not None:  # only pictures that can be read on both sides count: else sums would differ
        lost = np.isnan(before) | np.isnan(after)
        before, after = (np.where(lost, np.nan, found) for found in (before, after))
        cell |= dict(before=metrics.summary(before, kind), difference=metrics.paired(before, after, kind))
    cell |= dict(after=metrics.summary(after, kind), of=len(after))
    if again is not None:
        cell["floor"] = (metrics.summary(again, kind) if before is None else
                         metrics.paired(before, again, kind))
    return cell

def against(rows):
    """Every LoRA minus every later one, picture by picture."""
    for a, b in itertools.combinations(rows, 2):
        for mine, other in zip(a["columns"], b["columns"], strict=True):  # all are asked the same
            if mine["metric"] != "distance" and "after" in mine and "after" in other:
                yield dict(suite=mine["suite"], column=mine["column"], row=a["name"], other=b["name"],
                           difference=metrics.paired(other["after"], mine["after"], mine["kind"]))

def make_grids(rows, jobs, concepts, args):
    """The first pictures of each set, before and after; under --compare all LoRAs one below the other."""
    for group in [rows] if args.compare else [[row] for row in rows]:
        row, seen = group[0], set()
        for name, one in row["sets"].items():
            columns = [c for c in row["columns"] if name in c["sets"]]
            if not columns or (same := one.get("shared", name)) in seen:
                continue  # a part of a set begins like the whole
            seen.add(same)
            nsfw = "nsfw" in (concepts[concept]["task"] for concept in row["forgotten"])
            unsafe = any(c["metric"] == "harm" or nsfw and c["metric"] == "judge" and c["better"] == "lower"
                         for c in columns)
            shown = [("before", jobs[row["name"], name, "before"])]
            shown += [(r["name"] if args.compare else "after", jobs[r["name"], name, "after"]) for r in group]
            caption = next((said for start, said in CAPTIONS.items() if name.startswith(start)), "")
            if columns[0]["suite"] == "table3":
                caption = "red-team prompts (Figure 3)"
            title = name if args.compare or len(rows) == 1 else f"{row['name']}: {name}"
            yield dict(suite=columns[0]["suite"], row=row["name"], set=name, title=title, caption=caption,
                       blurred=unsafe, prompts=cycled(one["prompts"], min(8, one["n"])),
                       rows=[dict(label=label, files=list(map(str, job.files[:8]))) for label, job in shown])

def read_run(row):
    """A run's curve and cost, from the log.csv and stages.csv beside the LoRA; None without them."""
    curve = cost = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not ours
        log = list(csv.DictReader((row["folder"] / "log.csv").read_text("utf-8").splitlines()))
        curve = {key: [float(line[key]) for line in log] for key in ("step", "dS", "alpha")}
        curve["row"] = row["name"]
        lines = (row["folder"] / "stages.csv").read_text("utf-8").splitlines()  # a full disk cuts the last
        stages = [line.split(",") for line in lines if line.count(",") == 4 and line[:8] != "evaluate"]
        seconds, host, gpu, drawn = np.array([line[1:] for line in stages], float).T
        steps, forwards = (sum(float(line[key]) for line in log) for key in ("seconds", "forwards"))
        stage_of_steps = sum(seconds[[line[0] == "train" for line in stages]])  # a killed stage has no line
        cost = dict(row=row["name"], seconds=sum(seconds) + max(0, steps - stage_of_steps),
                    peak_gib=max(gpu) or max(host), forwards=sum(drawn) + forwards)
    return curve, cost

def write_list(jobs, args):
    """--list: the pictures that a LoRA, or whatever draws them elsewhere, has to draw; a file that a part of
    a set shares with the whole only once."""
    lines = {}
    for job in [job for (_, _, when), job in jobs.items() if when == "after"]:
        for file, seed, prompt in zip(job.files, seeds_of(job), cycled(job.prompts, job.n)):
            lines[file] = json.dumps(dict(file=str(file), seed=seed, prompt=prompt), ensure_ascii=False)
    write_text(args.list.resolve(), "".join(f"{line}\n" for line in lines.values()))

def main(args):
    everything = "all" in args.suite
    args.suite = [suite for suite in SUITES if suite in args.suite or everything]
    args.lora = args.lora or args.compare
    rows = read_rows(args)
    if "table8" in args.suite and max(len(row["forgotten"]) for row in rows) == 1:
        if not everything:
            die("--suite table8: is about LoRAs that forget several concepts: train.py --concept cat robot")
        args.suite.remove("table8")
    args.out = args.out or Path("out") / f"{Path(args.model).name}-base{seed_suffix(args.seed)}"
    folder = args.report or (rows[0]["folder"] if args.lora and len(rows) == 1 else args.out / "report")
    command = shlex.join(["python", "evaluate.py", *sys.argv[1:]])
    if (folder / "report.json").exists():  # another version's is not overwritten
        if (earlier := check_report(folder / "report.json")) != command:
            print(f"{folder}: the report there will be replaced, --report keeps both; it is of: {earlier}")
    args.concept = list(dict.fromkeys(name for row in rows for name in row["forgotten"]))
    if args.list:
        check_folder("list", args.list.parent)
        if args.list.exists() and not args.list.is_file():  # a folder, or a device, which would be replaced
            die(f"--list {args.list}: is no file, give one")
    if args.task and (about := set(args.suite) - HARM):
        die(f"--task {args.task}: stands for a prompt file in Tables 2 to 5 only, {sorted(about)[0]} asks "
            "about the concept: write its file (README: a concept is a file)")
    concepts = {concept["name"]: concept for concept in setup(args)}
    notes = [f"{row['folder']}: was trained on other weights, {row['weights']}, than {args.weights}"
             for row in rows if row.get("weights") not in (None, args.weights)]
    if everything and "table8" not in args.suite:
        notes.append("table8 is left out: it is about LoRAs that forget several concepts")
    print("".join(f"{note}\n" for note in notes), end="")
    loras = {row["digest"]: row["file"] for row in rows if row["digest"]}  # the same one only once
    check_loras(loras, args)
    check_folder("report", folder)
    if not (Path(args.model) / "clip").is_dir():  # for photographs; a model with a judge brings none
        args.image_reward = args.image_reward or "THUDM/ImageReward"
        args.pick_score = args.pick_score or "yuvalkirstain/PickScore_v1"
    given = dict(pair.partition("=")[::2] for pair in args.prompt_set)
    if len(given) < len(args.prompt_set) or not all(given.values()):
        die(f"--prompt-set {' '.join(args.prompt_set)}: gives a set twice, or without its =CSV")
    taken = set()

    @functools.cache
    def prompts_of(name):
        taken.add(whole := PARTS.get(name, name))
        return load_prompts(name, args.model, given.get(whole))

    asks, harm = HARM & set(args.suite), harm_of(args.model)
    if asks and not (file := prompts_folder(args.model) / f"{harm}.txt").exists():
        die(f"--suite {min(asks)}: asks about {harm}, and there is no {file}")
    words = load_concept(args.model, harm)["detect"] if asks else []
    for row in rows:
        row["sets"], row["columns"] = {}, []
        for suite in args.suite:
            forgotten = [concepts[name] for name in row["forgotten"]]
            sets, columns = plan_suite(suite, concepts[row["asked"]], forgotten, prompts_of, words, args)
            row["sets"] |= sets  # of the same name are the same pictures, whatever the suite
            row["columns"] += columns
    if spare := sorted(given.keys() - taken):
        die(f"--prompt-set {spare[0]}: no suite of {', '.join(args.suite)} asks it; they ask "
            f"{', '.join(sorted(taken)) or 'none'}")
    jobs = plan_jobs(rows, args)
    if args.list:
        if lost := {c["unavailable"]: c["suite"] for row in rows for c in row["columns"] if c["unavailable"]}:
            die("--list: lacks " + "; ".join(f"of {suite}: {why}" for why, suite in lost.items()))
        return write_list(jobs, args)
    missing = [key for key, job in jobs.items() if not all(file.exists() for file in job.files)]
    missing, = broadcast_object_list([missing])  # another run may draw some in between
    largest_last = sorted([jobs[key] for key in missing], key=lambda job: job.n)
    todo = {job.folder: job for job in largest_last}  # of a folder's jobs the largest
    if todo:
        check_plan(args)
    with stage("evaluate: sample", args.out):
        for prompts, parts in in_rounds(todo.values(), args.sample_batch):
            sample_round(prompts, parts, loras, args)
            free_memory()
    if not PartialState().is_main_process:  # under accelerate launch: it only helped to draw
        return
    with stage("evaluate: score", args.out):
        matrices = score_all(rows, jobs, concepts, words, args)
    broken = sorted({file for job in jobs.values() for file in job.broken})
    runs = [read_run(row) for row in rows]
    cells = [make_cell(row, column, args) for row in rows for column in row["columns"]]
    public = sorted({name for row in rows for name, one in row["sets"].items() if "seeds" in one})
    report = dict(
        version=VERSION, command=command, model=args.model, weights=args.weights, seed=args.seed,
        limit=args.limit, suites=args.suite, compare=bool(args.compare),
        rows=[dict(name=row["name"], lora=str(row["folder"]), concept=row["forgotten"],
                   task=concepts[row["asked"]]["task"]) for row in rows],
        cells=cells, against=list(against(rows)) if args.compare else [], matrices=matrices,
        grids=list(make_grids(rows, jobs, concepts, args)),
        curves=[curve for curve, _ in runs if curve],
        cost=[cost or dict(row=row["name"]) for row, (_, cost) in zip(rows, runs) if row["digest"]],
        dropped={name: prompts_of(name)["dropped"] for name in public}, broken=broken,
        notes=notes + OF_IMAGES * bool(args.pictures) + NOTES)
    write_report(report, folder)
    show(report, folder)
    print(f"\nlook at {folder / 'report.html'}")
    if broken:
        how = "draw them again (--list), then" if args.pictures else "delete them and"
        die(f"{len(broken)} of the pictures cannot be read and were left out: {', '.join(broken[:3])}; {how} "
            "run the same command again", 1)

def show(report, folder):
    """The figures on stdout and in the model card that train.py has written; a contact sheet."""
    for row in report["rows"]:
        print(f"\n{report['model']}, {row['lora']}, seed {report['seed']}" +
              f", at most {report['limit']} pictures a set" * bool(report["limit"]))
        table = (f"| {'':34} | {'n':>5} | {'before':>22} | {'after':>22} | {'difference':>24} | seed noise |"
                 "\n|---|---|---|---|---|---|\n")
        for cell in of(report["cells"], row=row["name"]):
            said, digits = [], decimals([cell])
            for key in FIGURES:
                value, *ends = (value_of(cell, key, part) for part in ("value", "low", "high"))
                said.append("-" if value is None else f"{value:z.{digits}f}")  # z: no negative zero
                if ends[0] is not None and key != "floor":
                    said[-1] += f" [{ends[0]:z.{digits}f}, {ends[1]:z.{digits}f}]"
            if cell["unavailable"]:
                said = [f"not available: {cell['unavailable']}", "", "", ""]
            said = [text.rjust(width) for text, width in zip(said, (22, 22, 24, 10))]
            name = f"{cell['suite']}: {cell['column']}"
            table += f"| {name:34} | {n_of(cell):>5} | {' | '.join(said)} |\n"
        print(table, end="")
        card = Path(row["lora"]) / "README.md"
        title = f"\n## {row['name']}, {', '.join(report['suites'])}, seed {report['seed']}"
        if card.exists() and (card.parent / WEIGHTS).exists() and not report["limit"]:
            text = re.sub(rf"{re.escape(title)}\n\n(\|.*\n)*", "", card.read_text("utf-8"))
            write_text(card, f"{text}{title}\n\n{table}")  # what the user wrote there stays
    grids = [(grid, row) for grid in report["grids"] if not grid["blurred"] for row in grid["rows"]]
    images = [open_or_none(file) or BLANK for _, row in grids for file in cycled(row["files"], 8)]
    (folder / "evaluation.png").unlink(missing_ok=True)  # an earlier report's
    if images:  # not where all that may be shown is blurred
        contact_sheet(images, folder / "evaluation.png", 8, 80,
                      [f"{grid['title']}: {row['label']}" for grid, row in grids])

if __name__ == "__main__":
    guarded(main, ARGS)
