"""What a LoRA erased and what it kept: yes/no questions to a judge about images before and after, at the same seeds.

    python evaluate.py --model emoji-flux --lora out/emoji-flux-cat             # 100 images a figure, some minutes
    python evaluate.py --lora out/FLUX.1-dev-pikachu                            # FLUX.1-dev, asks LLaVA-1.5

The judge is the model folder's clip/ where there is one, else LLaVA (4.1). ACC is the share of "yes" about the target;
the other figures are the share of "yes" about what was asked for. Intervals are Wilson's, 95 %. Results go to
evaluation.json and evaluation.png beside the LoRA.
"""
import argparse
import json
from pathlib import Path

from mask import mask_flags
from sample import die, model_flags, number


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser, needs_concept=False)
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA folder, such as train.py's --out")
    parser.add_argument("--judge", help="a CLIP or LLaVA, hub id or folder (default: the model's clip/, else LLaVA-1.5)")
    parser.add_argument("--clip", help="for the CLIP score (default: the model's clip/, else openai's ViT-B/32)")
    parser.add_argument("--n", type=number(int), default=100, help="images a figure (4.1: 100)")
    parser.add_argument("--sample-steps", type=number(int), default=28, help="default 28")
    parser.add_argument("--sample-guidance", type=number(strict=False), default=3.5, help="default 3.5")
    parser.add_argument("--sample-batch", type=number(int), default=20, help="images at once (default 20)")
    mask_flags(parser)
    return parser.parse_args(given)


ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPModel  # noqa: E402

from mask import find_masks  # noqa: E402
from sample import (contact_sheet, encode_prompts, generate, guarded, load_denoiser, seed_of, setup)  # noqa: E402


def wilson(yes, n, z=1.96):
    """95 % interval of a rate, in percent."""
    p, d = yes / n, 1 + z * z / n
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return 100 * (p + z * z / (2 * n) - half) / d, 100 * (p + z * z / (2 * n) + half) / d


def clip_scores(name, images, texts, device):
    """100 x cosine of each image and its text (N,), by transformers' CLIPModel."""
    processor, model = AutoProcessor.from_pretrained(name), CLIPModel.from_pretrained(name, dtype=torch.float32)
    model.to(device).eval()
    found = []
    for first in range(0, len(images), 50):
        inputs = processor(text=texts[first:first + 50], images=images[first:first + 50], padding="max_length",
                           truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            out = model(**inputs)
        found.append(100 * (out.image_embeds * out.text_embeds).sum(-1).cpu())  # both are unit vectors
    return torch.cat(found)


def clip_judge(name, device):
    """Yes: the image is nearer to "a picture of X" than to "a picture"; an argmax over labels cannot score a pair."""
    def ask(images, phrases):
        threshold = getattr(AutoConfig.from_pretrained(name), "judge_threshold", 0.0)
        yes = clip_scores(name, images, [f"a picture of {p}" for p in phrases], device)
        return (yes - clip_scores(name, images, ["a picture"] * len(images), device)).numpy() > threshold
    return ask


def llava_judge(name, device, dtype):
    """Yes: the first answer token weighs more as some form of yes than of no (no text is parsed)."""
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()
    tokens = processor.tokenizer
    tokens.padding_side = "left"  # so that the last position is the answer's
    ids = {word: {tokens.convert_tokens_to_ids(form) for form in
                  (word, word.title(), "\u2581" + word, "\u2581" + word.title())} - {tokens.unk_token_id, None}
           for word in ("yes", "no")}
    if not ids["yes"] or not ids["no"] or ids["yes"] & ids["no"]:
        die(f"--judge {name}: its tokenizer has no distinct yes and no")

    def ask(images, phrases):
        found = []
        for image, phrase in zip(tqdm(images, desc="judge"), phrases):
            talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text=(
                f"Is there {phrase} in this image? Answer yes or no."))])]
            text = processor.apply_chat_template(talk, add_generation_prompt=True)
            inputs = processor(images=image, text=text, return_tensors="pt").to(device, dtype)
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[0, -1].float()  # (V,)
            found.append((logits[list(ids["yes"])].logsumexp(0) > logits[list(ids["no"])].logsumexp(0)).item())
        return np.array(found)
    return ask


def figures(concept, n, guidance):
    """{figure: (prompts, [alternatives that count as yes] for each, guidance)}, n prompts each."""
    def cycle(pairs):
        return [pairs[i % len(pairs)] for i in range(n)]

    target, kept = concept["concept"], concept["neighbours"] + concept["unrelated"]
    others = concept["unrelated"] + concept["unseen"]
    plan = {"target": ([(p, target) for p in concept["eval"]], guidance)}
    plan["target, guidance 1"] = plan["target"][0], 1.0
    plan["target, guidance 5"] = plan["target"][0], 5.0
    plan["paraphrases"] = [(p, target) for p in concept["paraphrases"]], guidance
    plan["preserved"] = [(t.replace("{}", o), [o]) for t in concept["preserve"] for o in kept], guidance
    plan["never seen"] = [(t.replace("{}", o), [o]) for t in concept["preserve"] for o in concept["unseen"]], guidance
    if concept["task"] != "style":  # a style has no pairs
        pairs = [(f"{t} and {o}", t, o) for o in others for t in target]
        plan["target in a pair"] = [(p, target) for p, t, o in pairs], guidance
        plan["partner in a pair"] = [(p, [o]) for p, t, o in pairs], guidance
    for kind in ("backgrounds", "styles"):
        plan[kind] = [(f"{o} {s}", [s.split(" ", 1)[1]]) for o in others for s in concept[kind]], guidance
    return {name: ([p for p, _ in cycle(pairs)], [y for _, y in cycle(pairs)], g) for name, (pairs, g) in plan.items()}


def main(args):
    run = args.lora / "args.json"
    if not (args.lora / "pytorch_lora_weights.safetensors").exists():
        die(f"--lora {args.lora}: holds no pytorch_lora_weights.safetensors")
    if args.concept is None:
        if not run.exists():
            die(f"--concept is missing, and {run} does not exist to read it from")
        args.concept = json.loads(run.read_text())["settings"]["concept"]
    concept = setup(args)
    plan = figures(concept, args.n, args.sample_guidance)
    embeds = encode_prompts(args.model, [p for prompts, _, _ in plan.values() for p in prompts], args.device, args.dtype)
    pipe = load_denoiser(args.model, args.device, args.dtype)
    images = {}
    for when in ("before", "after"):
        if when == "after":
            try:
                pipe.load_lora_weights(args.lora)
            except Exception as error:  # a corrupt file, or the LoRA of another model: peft has many names for it
                die(f"--lora {args.lora}: does not load into {args.model}: {str(error).splitlines()[0]}")
        for name, (prompts, _, guidance) in tqdm(plan.items(), desc=f"sample {when}"):
            made = images[name, when] = []
            for first in range(0, args.n, args.sample_batch):
                some = range(first, min(first + args.sample_batch, args.n))
                seeds = [seed_of(args.seed, f"evaluate {name.split(',')[0]}", i) for i in some]
                made += generate(pipe, embeds, [prompts[i] for i in some], seeds, args.sample_steps, guidance, args.size)
    del pipe
    is_clip = AutoConfig.from_pretrained(args.judge).model_type == "clip"
    ask = clip_judge(args.judge, args.device) if is_clip else llava_judge(args.judge, args.device, args.dtype)
    table = {}
    for name, (_, answers, _) in plan.items():
        for when in ("before", "after"):
            yes = np.zeros(args.n, bool)
            for k in range(max(len(a) for a in answers)):  # several alternatives: any of them
                yes |= ask(images[name, when], [a[min(k, len(a) - 1)] for a in answers])
            low, high = wilson(yes.sum(), args.n)
            table.setdefault(name, {})[when] = dict(percent=100 * yes.mean(), low=low, high=high, n=args.n)
    texts = plan["never seen"][0]
    for when in ("before", "after"):
        scores = clip_scores(args.clip, images["never seen", when], texts, args.device).numpy()
        error = 1.96 * scores.std(ddof=1) / args.n ** 0.5 if args.n > 1 else float("nan")
        table.setdefault("CLIP score, never seen", {})[when] = dict(
            percent=float(scores.mean()), low=float(scores.mean() - error), high=float(scores.mean() + error), n=args.n)
    before, after = (np.stack([np.asarray(i, float) for i in images["target", w]]) for w in ("before", "after"))
    change = np.abs(after - before).mean(-1)  # (N, H, W), in [0, 255]
    masks = np.stack(list(find_masks(images["target", "before"], concept, args)))  # (N, H, W)
    locality = dict(inside=float(change[masks].mean()), outside=float(change[~masks].mean()), n=len(masks))

    print(f"\n{args.model}, {args.lora}, judge {args.judge}, CLIP {args.clip}, seed {args.seed}, n = {args.n}")
    print(f"{'% yes':24}{'before':>22}{'after':>22}")
    for name, row in table.items():
        cells = [f"{c['percent']:.1f} [{c['low']:.1f}, {c['high']:.1f}]" for c in (row["before"], row["after"])]
        print(f"{name:24}{cells[0]:>22}{cells[1]:>22}")
    print(f"mean pixel change: {locality['inside']:.1f} in the mask, {locality['outside']:.1f} outside, of 255")
    settings = {k: str(v) for k, v in vars(args).items()}
    (args.lora / "evaluation.json").write_text(json.dumps(dict(figures=table, locality=locality, settings=settings), indent=1))
    shown = [i for name in plan for when in ("before", "after") for i in images[name, when][:10]]
    contact_sheet((shown), args.lora / "evaluation.png", 10, side=80,
                  titles=[f"{name[:18]}: {when}" for name in plan for when in ("before", "after")])


if __name__ == "__main__":
    guarded(main, ARGS)
