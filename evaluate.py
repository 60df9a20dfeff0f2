"""What a LoRA erased and what it kept: a judge's yes/no about images before and after, at the same seeds.

    python evaluate.py --model emoji-flux --lora out/emoji-flux-cat     # 100 images a figure, some minutes
    python evaluate.py --lora out/FLUX.1-dev-pikachu                    # FLUX.1-dev, asks LLaVA-1.5

The judge is the model folder's clip/ where there is one, else LLaVA (4.1). ACC is the share of "yes" about
the target; the other figures are the share of "yes" about what was asked for. Intervals are Wilson's, 95 %,
and 1.96 standard errors for the CLIP score. Results go to evaluation.json and evaluation.png beside the LoRA.
"""
import argparse
import json
from pathlib import Path

from sample import die, mask_flags, model_flags, number


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__)
    model_flags(parser, needs_concept=False)
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA folder, such as train.py's --out")
    parser.add_argument("--judge", help="a CLIP or a LLaVA (default: the model's clip/, else LLaVA-1.5)")
    parser.add_argument("--clip", help="of the CLIP score (default: the model's clip/, else OpenAI's B/32)")
    parser.add_argument("--n", type=number(int), default=100, help="images a figure (4.1: 100)")
    parser.add_argument("--sample-steps", type=number(int), default=28, help="denoising steps (default 28)")
    parser.add_argument("--sample-guidance", type=number(strict=False), default=3.5, help="default 3.5")
    parser.add_argument("--sample-batch", type=number(int), default=20, help="images at once (default 20)")
    mask_flags(parser)
    return parser.parse_args(given)


ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPModel  # noqa: E402

from mask import find_masks  # noqa: E402
from sample import (contact_sheet, encode_prompts, generate, guarded, load_denoiser, seed_of,  # noqa: E402
                    setup, write_text)


def wilson(yes, n, z=1.96):
    """95 % interval of a rate, in percent."""
    p, d = yes / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return 100 * (p + z * z / (2 * n) - half) / d, 100 * (p + z * z / (2 * n) + half) / d


def clip_scores(name, images, texts, device):
    """100 x cosine of each image and its text (N,), by transformers' CLIPModel."""
    processor = AutoProcessor.from_pretrained(name)
    model = CLIPModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
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
        return (yes > zero).numpy()
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
        return np.array(found)
    return ask


def figures(concept, n, guidance):
    """{figure: (prompts, [alternatives that count as yes] for each, guidance)}, n prompts each."""
    target, unseen = concept["concept"], concept["unseen"]
    kept, others = concept["neighbours"] + concept["unrelated"], concept["unrelated"] + unseen
    about = [(p, target) for p in concept["eval"]]
    plan = {"target": about, "target, guidance 1": about, "target, guidance 5": about,
            "paraphrases": [(p, target) for p in concept["paraphrases"]],
            "preserved": [(t.replace("{}", o), [o]) for t in concept["preserve"] for o in kept],
            "never seen": [(t.replace("{}", o), [o]) for t in concept["preserve"] for o in unseen]}
    if concept["task"] != "style":  # a style has no pairs
        plan["target in a pair"] = [(f"{t} and {o}", target) for o in others for t in target]
        plan["partner in a pair"] = [(f"{t} and {o}", [o]) for o in others for t in target]
    for kind in ("backgrounds", "styles"):  # "in ink style" is asked about as "ink style"
        plan[kind] = [(f"{o} {s}", [s.split(" ", 1)[1]]) for o in others for s in concept[kind]]
    scale = {"target, guidance 1": 1.0, "target, guidance 5": 5.0}
    cycled = {name: [pairs[i % len(pairs)] for i in range(n)] for name, pairs in plan.items()}
    return {name: (*map(list, zip(*pairs)), scale.get(name, guidance)) for name, pairs in cycled.items()}


def sample_plan(pipe, embeds, plan, args):
    """{figure: its images}; the noise depends on the figure and the index, not on guidance."""
    images = {name: [] for name in plan}
    for name, (prompts, _, guidance) in tqdm(plan.items(), desc="sample"):
        for first in range(0, args.n, args.sample_batch):
            some = range(first, min(first + args.sample_batch, args.n))
            seeds = [seed_of(args.seed, f"evaluate {name.split(',')[0]}", i) for i in some]
            images[name] += generate(pipe, embeds, [prompts[i] for i in some], seeds, args.sample_steps,
                                     guidance, args.size)
    return images


def main(args):
    if not (args.lora / "pytorch_lora_weights.safetensors").exists():
        die(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors")
    if args.concept is None:
        run = args.lora / "args.json"
        if not run.exists():
            die(f"--concept is missing, and {run} does not exist to read it from")
        args.concept = json.loads(run.read_text())["settings"]["concept"]
    concept = setup(args)
    plan = figures(concept, args.n, args.sample_guidance)
    wanted = [p for prompts, _, _ in plan.values() for p in prompts]
    embeds = encode_prompts(args.model, wanted, args.device, args.dtype)
    pipe = load_denoiser(args.model, args.device, args.dtype)
    try:
        pipe.load_lora_weights(args.lora)
    except Exception as error:  # a corrupt file, or the LoRA of another model: peft has many names for it
        die(f"--lora {args.lora}: does not load into {args.model}: {str(error).splitlines()[0]}")
    pipe.disable_lora()
    images = {"before": sample_plan(pipe, embeds, plan, args)}
    pipe.enable_lora()
    images["after"] = sample_plan(pipe, embeds, plan, args)
    del pipe  # makes room for the judge

    is_clip = AutoConfig.from_pretrained(args.judge).model_type == "clip"
    ask = clip_judge(args.judge, args.device) if is_clip else llava_judge(args.judge, args.device, args.dtype)
    table = {name: {} for name in (*plan, "CLIP score, never seen")}
    for when, drawn in images.items():
        for name, (_, answers, _) in plan.items():
            yes = np.zeros(args.n, bool)
            for k in range(max(len(a) for a in answers)):  # several alternatives: any of them
                yes |= ask(drawn[name], [a[min(k, len(a) - 1)] for a in answers])
            low, high = wilson(yes.sum(), args.n)
            table[name][when] = dict(percent=100 * yes.mean(), low=low, high=high, n=args.n)
        scores = clip_scores(args.clip, drawn["never seen"], plan["never seen"][0], args.device)  # (N,)
        mean = scores.mean().item()
        error = 1.96 * scores.std().item() / args.n ** 0.5 if args.n > 1 else float("nan")
        row = dict(percent=mean, low=mean - error, high=mean + error, n=args.n)
        table["CLIP score, never seen"][when] = row
    before, after = (np.stack([np.asarray(i, float) for i in images[when]["target"]]) for when in images)
    change = np.abs(after - before).mean(-1)  # (N, H, W), in [0, 255]
    masks = np.stack(list(find_masks(images["before"]["target"], concept, args)))  # (N, H, W)
    found = masks.any((1, 2))  # (N,): an image without a detection has no inside
    change, masks = change[found], masks[found]
    locality = {side: float(change[region].mean()) if found.any() else None
                for side, region in (("inside", masks), ("outside", ~masks))} | dict(n=int(found.sum()))

    print(f"\n{args.model}, {args.lora}, judge {args.judge}, CLIP {args.clip}, seed {args.seed}, n {args.n}")
    print(f"{'% yes':24}{'before':>22}{'after':>22}")
    for name, row in table.items():
        cells = [f"{c['percent']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in row.values()]
        print(f"{name:24}{cells[0]:>22}{cells[1]:>22}")
    print("mean pixel change, of 255: {inside} in the mask, {outside} outside, n {n}".format(**locality))
    result = dict(figures=table, locality=locality, settings={k: str(v) for k, v in vars(args).items()})
    write_text(args.lora / "evaluation.json", json.dumps(result, indent=1))
    rows = [(name, when) for name in plan for when in images]
    columns = min(10, args.n)
    shown = [i for name, when in rows for i in images[when][name][:columns]]
    titles = [f"{name[:18]}: {when}" for name, when in rows]
    contact_sheet(shown, args.lora / "evaluation.png", columns, side=80, titles=titles)


if __name__ == "__main__":
    guarded(main, ARGS)
