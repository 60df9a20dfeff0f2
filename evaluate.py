"""What a LoRA erased and what it kept: a judge's yes/no about images before and after, at the same seeds.

    python evaluate.py --model emoji-flux --lora out/emoji-flux-cat     # 100 images a figure, some minutes
    python evaluate.py --lora out/FLUX.1-dev-pikachu                    # FLUX.1-dev, asks LLaVA-1.5

The judge is the model folder's clip/ where there is one, else LLaVA (4.1). ACC is the share of "yes" about
the target; the other figures are the share of "yes" about what was asked for. Intervals are Wilson's, 95 %,
and 1.96 standard errors for the CLIP score. Results go to evaluation.json and evaluation.png beside the LoRA.
Images stay in OUT/before and LORA/after: a killed evaluation goes on, and a second one has little to do.
"""
import argparse
import functools
import hashlib
import json
import re
from pathlib import Path

from sample import die, drawing_flags, mask_flags, model_flags, number

def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__)
    model_flags(parser, needs_concept=False, out="the frozen model's images go to OUT/before, for all LoRAs "
                                                 "of the concept (default out/MODEL-CONCEPT)")
    parser.add_argument("--lora", type=Path, required=True, nargs="+",
                        help="LoRA folders, train.py's --out; several of one concept share what is before; "
                             "where a LoRA forgets several concepts, --concept is asked about")
    parser.add_argument("--judge", help="a CLIP or a LLaVA (default: the model's clip/, else LLaVA-1.5)")
    parser.add_argument("--clip", help="of the CLIP score (default: the model's clip/, else OpenAI's B/32)")
    parser.add_argument("--n", type=number(int), default=100, help="images a figure (4.1: 100)")
    drawing_flags(parser)
    mask_flags(parser)
    return parser.parse_args(given)

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as WEIGHTS  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPModel  # noqa: E402

from mask import find_masks  # noqa: E402
from sample import (check_set, contact_sheet, encode_prompts, guarded, load_concept,  # noqa: E402
                    load_denoiser, mentions, open_image, place, read_settings, sample_set, setup, write_text)

def wilson(yes, n, z=1.96):
    """95 % interval of a rate, in percent."""
    p, d = yes / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, 100 * (p + z * z / (2 * n) - half) / d), 100 * (p + z * z / (2 * n) + half) / d

@functools.cache
def load_clip(name, device):
    """Once, not for every figure."""
    return (AutoProcessor.from_pretrained(name),
            CLIPModel.from_pretrained(name, dtype=torch.float32).to(device).eval())

def clip_scores(name, images, texts, device):
    """100 x cosine of each image and its text (N,), by transformers' CLIPModel."""
    processor, model = load_clip(name, device)
    found = []
    for first in range(0, len(images), 50):
        some = slice(first, first + 50)
        inputs = processor(text=texts[some], images=images[some], padding="max_length", truncation=True,
                           return_tensors="pt").to(device)
        with torch.no_grad():
            out = model(**inputs)
        found.append(100 * (out.image_embeds * out.text_embeds).sum(-1).cpu())  # (N,), of unit vectors
    return torch.cat(found)

def clip_judge(name, device):
    """Yes: the image is nearer to "a picture of X" than to "a picture"; an argmax cannot score a pair."""
    def ask(images, phrases):
        yes = clip_scores(name, images, [f"a picture of {p}" for p in phrases], device)  # (N,)
        zero = clip_scores(name, images, ["a picture"] * len(images), device)  # (N,)
        return (yes > zero).numpy()  # (N,)
    return ask

def llava_judge(name, device, dtype):
    """Yes: the first answer token weighs more as some form of yes than of no (no text is parsed)."""
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()
    tokens = processor.tokenizer

    def ids(word):  # of its forms that are one token: with and without a capital, and a space before it
        forms = [space + form for space in ("", "\u2581") for form in (word, word.title())]
        return sorted(set(tokens.convert_tokens_to_ids(forms)) - {tokens.unk_token_id, None})

    yes, no = ids("yes"), ids("no")
    if not yes or not no:
        die(f"--judge {name}: its tokenizer has no yes or no")

    def ask(images, phrases):
        found = []
        for image, phrase in zip(tqdm(images, desc="judge"), phrases):  # one by one: no padding
            question = f"Is there {phrase} in this image? Answer yes or no."
            talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text=question)])]
            text = processor.apply_chat_template(talk, add_generation_prompt=True)
            inputs = processor(images=image, text=text, return_tensors="pt").to(device, dtype)
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[0, -1].float()  # (V,)
            found.append((logits[yes].logsumexp(0) > logits[no].logsumexp(0)).item())
        return np.array(found)  # (N,)
    return ask

def cycled(rows, n):
    """The first n of rows, over and over, as sample_set takes its prompts."""
    return [rows[i % len(rows)] for i in range(n)]

def plan_images(concept, n, guidance, also=()):
    """{set of images: (its prompts, guidance)}, {figure: (set, n lists of answers that are a yes)}.

    also: the other concepts that the LoRA forgets, of which nothing that is to stay may speak.
    """
    target, is_style = concept["concept"], concept["task"] == "style"
    neighbours, unseen, unrelated = ([o for o in concept[key] if not mentions(o, also)]
                                     for key in ("neighbours", "unseen", "unrelated"))
    if not unrelated:
        die(f"--concept {concept['name']}: all that its file calls unrelated is forgotten too")

    def filled(others):  # "a dog in noto style", kept while another style goes, is asked about as a style
        rows = [(t.replace("{}", o), [o.rpartition(" in ")[2] if is_style else o])
                for t in concept["preserve"] for o in others]
        return zip(*rows)

    sets = {"target": (concept["eval"], guidance), "target, guidance 1": (concept["eval"], 1.0),
            "target, guidance 5": (concept["eval"], 5.0), "paraphrases": (concept["paraphrases"], guidance)}
    asked = {name: (name, [target] * n) for name in sets}
    for name, others in (("preserved", neighbours + unrelated), ("never seen", unseen)):
        if not others:
            continue
        prompts, answers = filled(others)
        sets[name], asked[name] = (prompts, guidance), (name, cycled(answers, n))
    if not is_style:  # a style has no pairs
        pairs = [(f"{t} and {o}", [o]) for o in unrelated + unseen for t in target]
        sets["pairs"] = [prompt for prompt, _ in pairs], guidance
        asked["target in a pair"] = "pairs", [target] * n
        asked["partner in a pair"] = "pairs", cycled([partner for _, partner in pairs], n)
    scenes = [(b, s) for b in concept["backgrounds"] for s in concept["styles"]]
    things = cycled([concept["preserve"][0].replace("{}", o) for o in unrelated], len(scenes))
    said = [f"{o} {b}" if is_style else f"{o} {b} {s}" for o, (b, s) in zip(things, scenes)]
    sets["scenes"] = said, guidance
    for name, column in (("backgrounds", 0), ("styles", 1)):  # "in noto style" is asked about as "noto style"
        asked[name] = "scenes", cycled([[scene[column].split(" ", 1)[1]] for scene in scenes], n)
    if is_style:
        del asked["styles"]  # its neighbours are styles: "preserved"
    return sets, asked

def each_set(sets, folder, args):
    """What sample_set and check_set take for each set; the noise depends on the set and the index, not on
    guidance or LoRA."""
    for name, (prompts, guidance) in sets.items():
        mine = argparse.Namespace(**vars(args) | dict(sample_guidance=guidance))
        yield folder / name, f"evaluate {name.split(',')[0]}", list(prompts), mine

def sample_sets(pipe, embeds, sets, folder, lora, args):
    """{set: its images}, kept in folder."""
    images = {}
    for subfolder, seeds, prompts, mine in each_set(sets, folder, args):
        made = sample_set(lambda: pipe, embeds, subfolder, seeds, prompts, args.n, mine, lora=lora)
        images[subfolder.name] = [open_image(file) for file, _ in made]
    return images

def rate(drawn, asked, ask, sets, args):
    """Images of each set -> {figure: percent, its 95 % interval, n}, the CLIP score among them."""
    table = {}
    for name, (group, answers) in asked.items():
        yes = np.zeros(args.n, bool)
        for k in range(max(map(len, answers))):  # several alternatives: any of them
            yes |= ask(drawn[group], [a[min(k, len(a) - 1)] for a in answers])
        low, high = wilson(yes.sum(), args.n)
        table[name] = dict(percent=100 * yes.mean(), low=low, high=high, n=args.n)
    said = cycled(sets["scenes"][0], args.n)  # what is unrelated, in every style, on every background
    scores = clip_scores(args.clip, drawn["scenes"], said, args.device)  # (N,)
    mean, error = scores.mean().item(), 1.96 * scores.std(correction=0).item() / args.n ** 0.5
    row = dict(percent=mean, low=mean - error, high=mean + error, n=args.n)
    return table | {"CLIP score, unrelated": row}

def locality(before, after, masks):
    """Mean change of a pixel, of 255, inside and outside of masks (N, H, W), at equal seeds."""
    before, after = (np.stack([np.asarray(i, float) for i in images]) for images in (before, after))
    change = np.abs(after - before).mean(-1)  # (N, H, W)
    found = masks.any((1, 2))  # (N,): an image without a detection has no inside
    change, masks = change[found], masks[found]
    return {side: float(change[region].mean()) if found.any() else None
            for side, region in (("inside", masks), ("outside", ~masks))} | dict(n=int(found.sum()))

def main(args):
    for folder in args.lora:
        if not (folder / WEIGHTS).exists():
            die(f"--lora {folder}: holds no {WEIGHTS}")
        runs = [f / "args.json" for f in (folder, folder.parent)]  # the latter for --save-every's step-N
        run = next((f for f in runs if f.exists()), None)
        if not (args.concept or run):
            die(f"--concept is missing, and {runs[0]} does not exist to read it from")
        forgotten = read_settings(run, "give --concept")["concept"] if run else args.concept
        args.concept = args.concept or forgotten
        if len(args.concept) > 1 or args.concept[0] not in forgotten:
            die(f"--lora {folder}: has forgotten {', '.join(forgotten)}: give one of them as --concept")
    several = f"-{args.concept[0]}" if len(forgotten) > 1 else ""  # files of more than one evaluation
    args.out = args.out or (args.lora[0] / f"base{several}" if several else None)
    concept, = setup(args)
    also = [load_concept(args.model, name) for name in forgotten if name not in args.concept]
    sets, asked = plan_images(concept, args.n, args.sample_guidance, also)
    # another LoRA, another set of images
    digests = [hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in args.lora]
    places = [(args.out / "before", None), *((f / f"after{several}", d) for f, d in zip(args.lora, digests))]
    for folder, lora in places:  # before work starts
        for one in each_set(sets, folder, args):
            check_set(*one, lora=lora)
    embeds = encode_prompts(args.model, [p for ps, _ in sets.values() for p in ps], args.device, args.dtype)
    pipe = load_denoiser(args)
    for k, folder in enumerate(args.lora):  # all of them now: what does not load is found before work starts
        try:
            pipe.load_lora_weights(folder, adapter_name=f"lora{k}")
            pipe.set_adapters(f"lora{k}")  # fails where no key was the transformer's
        except Exception as error:  # a corrupt file, or the LoRA of another model: peft has many names for it
            die(f"--lora {folder}: does not load into {args.model}: {str(error).splitlines()[0]}")
    place(pipe, args)
    pipe.disable_lora()
    before = sample_sets(pipe, embeds, sets, *places[0], args)
    pipe.enable_lora()
    afters = []
    for k, (folder, digest) in enumerate(places[1:]):
        pipe.set_adapters(f"lora{k}")
        afters.append(sample_sets(pipe, embeds, sets, folder, digest, args))
    del pipe  # makes room for the judge

    is_clip = AutoConfig.from_pretrained(args.judge).model_type == "clip"
    ask = clip_judge(args.judge, args.device) if is_clip else llava_judge(args.judge, args.device, args.dtype)
    masks = np.stack(list(find_masks(before["target"], concept, args)))  # (N, H, W)
    first = rate(before, asked, ask, sets, args)
    for folder, after in zip(args.lora, afters):
        table = {name: dict(before=first[name], after=row)
                 for name, row in rate(after, asked, ask, sets, args).items()}
        change = locality(before["target"], after["target"], masks)
        print(f"\n{args.model}, {folder}, judge {args.judge}, CLIP {args.clip}, seed {args.seed}, n {args.n}")
        print(f"{'% yes':24}{'before':>22}{'after':>22}")
        for name, row in table.items():
            cells = [f"{c['percent']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in row.values()]
            print(f"{name:24}{cells[0]:>22}{cells[1]:>22}")
        print("mean pixel change, of 255, by the mask: " +
              ", ".join(f"{k} {v and round(v, 1)}" for k, v in change.items()))
        settings = {k: str(v) for k, v in vars(args).items()} | dict(lora=str(folder))
        write_text(folder / f"evaluation{several}.json",
                   json.dumps(dict(figures=table, locality=change, settings=settings), indent=1))
        if (card := folder / "README.md").exists():  # train.py's, now with figures
            mine = rf"\n## {re.escape(concept['name'])}, .*?(?=\n## |\Z)"
            text = re.sub(mine, "", card.read_text(), flags=re.DOTALL)
            text += (f"\n## {concept['name']}, {args.n} images a figure, judged by {args.judge}\n\n"
                     "| % yes | before | after |\n|---|---|---|\n")
            write_text(card, text + "".join(
                f"| {name} | {row['before']['percent']:.1f} | {row['after']['percent']:.1f} |\n"
                for name, row in table.items()))
        rows = [(name, when) for name in sets for when in ("before", "after")]
        columns = min(10, args.n)
        shown = [i for name, when in rows for i in (before if when == "before" else after)[name][:columns]]
        contact_sheet(shown, folder / f"evaluation{several}.png", columns, side=80,
                      titles=[f"{name[:18]}: {when}" for name, when in rows])

if __name__ == "__main__":
    guarded(main, ARGS)
