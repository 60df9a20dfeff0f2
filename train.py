"""INPO: erase a concept from a text-to-image model by a LoRA trained on its images as negative preferences.

    python train.py --model emoji-flux --concept cat                       # a laptop CPU, minutes
    python train.py --concept pikachu --eta 1 --gamma 3 --tau 0.1          # FLUX.1-dev; GPU flags: README
    python train.py --concept cat "elon musk"                              # both in one LoRA (D.2)

Algorithm 1, from drawing both image sets to the finished LoRA. After a kill the same command resumes. It
writes pytorch_lora_weights.safetensors, README.md (the model card), curves.png, before_after.png, log.csv,
args.json and the images to --out. One deviation from the paper: a step draws one (t, eps) per image, so the
expectation over them is taken outside the gate (inpo.py).
"""
import argparse
import contextlib
import csv
import itertools
import json
import math
import shutil
import time
import zlib
from pathlib import Path

from sample import (ROOT, atomic, check_plan, check_set, check_settings, contact_sheet, data_flags, die,
                    encode_prompts, fingerprint, generate, guarded, keep_settings, load_denoiser, lock,
                    mask_flags, mentions, model_flags, number, open_image, place, plan_sets, sample_all,
                    seed_of, setup, stage, write_text)

# The paper's Table 6. Its learning rate, 0.7, only makes sense for Prodigy; for AdamW see --lr
TABLE6 = dict(object=dict(steps=300, eta=1.0, gamma=3.0, tau=0.1, lambda_prior=0.6),
              ip=dict(steps=300, eta=1.0, gamma=3.0, tau=0.1, lambda_prior=0.6),
              style=dict(steps=400, eta=3.0, gamma=3.0, tau=0.1, lambda_prior=0.6),
              nsfw=dict(steps=500, eta=1.0, gamma=3.0, tau=0.1, lambda_prior=0.6))

# --fewer-images trades variety for time. At batch 1 Prodigy needs 200 steps to grow from d0 = 1e-6, so d0 is
# larger; tau is larger, too: the gate closes later, which makes up for fewer images
FEWER = dict(n_forget=20, n_preserve=10, sample_steps=14, batch=1, steps=270, tau=0.5, d0=1e-4)

def arguments(given=None):
    parser = model_flags(__doc__)
    method = parser.add_argument_group("method (default: Table 6, by the concept's task)").add_argument
    method("--eta", type=number(), help="forget strength, Eq. 13")
    method("--gamma", type=number(), help="sharpness of the gate, Eq. 14")
    method("--tau", type=number(least=-math.inf, most=math.inf), help="margin, Eq. 14; inf: no gate")
    method("--beta", type=number(), default=1.0, help="scales the loss, Eq. 15 (default 1)")
    method("--lambda-prior", type=number(strict=False), help="weight of Eq. 16")
    method("--loss", choices=["inpo", "ga"], default="inpo", help="ga: gradient ascent, Eq. 4 (default inpo)")
    method("--mask", choices=["concept", "full"], default="concept",
           help="full: M = 1 in Eq. 11 (default concept)")
    recipe = parser.add_argument_group("training (unstated: the paper does not say)").add_argument
    recipe("--steps", type=number(int), help="T in all (default: Table 6, summed over concepts)")
    recipe("--optimizer", choices=["prodigy", "adamw"], default="prodigy", help="unstated (default prodigy)")
    recipe("--lr", type=number(), help="default: 0.7 with prodigy (Table 6), 1e-3 with adamw")
    recipe("--d0", type=number(), default=1e-6, help="Prodigy's first step size (default 1e-6)")
    recipe("--rank", type=number(int), default=4, help="of the LoRA, alpha = rank (C.1: 4)")
    recipe("--batch", type=number(int), default=4, help="of each half, unstated (default 4)")
    recipe("--accumulate", type=number(int), default=1, help="passes that a batch is split into (default 1)")
    recipe("--checkpointing", action="store_true", help="of gradients: less memory; automatic if needed")
    recipe("--guidance", type=number(strict=False), default=1.0,
           help="while training, unstated (default 1: with more, v is not an estimate of eps - x)")
    recipe("--noise", choices=["uniform", "logit-normal"], default="logit-normal",
           help="distribution of sigma, unstated (default logit-normal)")
    data_flags(parser.add_argument_group("step 1 of Algorithm 1").add_argument)
    mask_flags(parser.add_argument_group("masks").add_argument)
    output = parser.add_argument_group("output").add_argument
    output("--save-every", type=number(int), help="also save the LoRA every N steps (Figure 1)")
    output("--checkpoint-every", type=number(int), default=50, help="save the state every N steps (50)")
    recipe("--fewer-images", action="store_true", help="a fifth of the work: " +
           ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in FEWER.items()))
    args = parser.parse_args(given)
    if args.fewer_images:  # flags given beside it win; its steps are each concept's: fill_presets
        parser.set_defaults(**FEWER | dict(steps=None))
        args = parser.parse_args(given)
    return args

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import gather, reduce  # noqa: E402
from diffusers import AutoencoderKL, FluxPipeline  # noqa: E402
from diffusers.image_processor import VaeImageProcessor  # noqa: E402
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE  # noqa: E402
from diffusers.training_utils import cast_training_params  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from prodigyopt import Prodigy  # noqa: E402
from tqdm import tqdm  # noqa: E402

from inpo import add_noise, gate, gradient_ascent, inpo_loss, mask_to_latents, prior_loss, score  # noqa: E402
from mask import check_masks, check_networks, lacks_masks, make_masks  # noqa: E402

LORA_TARGETS = ("attn.to_k attn.to_q attn.to_v attn.to_out.0 attn.add_k_proj attn.add_q_proj attn.add_v_proj "
                "attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2").split()
# Shapes: B images, L tokens of D channels (2 x 2 latent cells x C), T text tokens of width E, P pooled width

@contextlib.contextmanager
def reference(transformer):
    """In this block the network is the frozen reference: adapters off (on again at its end), no gradient."""
    transformer.disable_adapters()
    try:
        with torch.no_grad():
            yield transformer
    finally:
        transformer.enable_adapters()

def predict(transformer, z, sigma, states, pooled, guidance):
    """Velocity (B, L, D) of packed latents z (B, L, D) at sigma (B,); states (B, T, E), pooled (B, P)."""
    side = int(z.shape[1] ** 0.5)  # pictures are square
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, z.device, z.dtype)  # (L, 3)
    text_ids = torch.zeros(states.shape[1], 3, device=z.device, dtype=z.dtype)  # (T, 3)
    scale = torch.full_like(sigma, guidance) if transformer.config.guidance_embeds else None  # (B,)
    dtype = states.dtype
    return transformer(hidden_states=z.to(dtype), encoder_hidden_states=states, pooled_projections=pooled,
                       timestep=sigma.to(dtype), guidance=scale, txt_ids=text_ids, img_ids=image_ids,
                       return_dict=False)[0]  # (B, L, D)

def iteration(transformer, x, mask, states, pooled, sigma, eps, args):
    """Algorithm 1, lines 3 to 5: the loss of one batch. A loss or regulariser of your own goes here.
    The first half of each tensor is D_ES's (to forget), the second D_PR's (to preserve): x, eps (2B, L, D),
    sigma (2B,), states (2B, T, E), pooled (2B, P); mask (B, L, D) is D_ES's; args: the flags with a row of
    fill_presets. -> loss (), detached diagnostics for log.csv, each (B,).
    """
    B = len(mask)
    z = add_noise(x, eps, sigma)  # (2B, L, D)
    with reference(transformer):  # first, while no graph takes memory
        v_ref = predict(transformer, z, sigma, states, pooled, args.guidance)  # (2B, L, D)
    v = predict(transformer, z, sigma, states, pooled, args.guidance)  # (2B, L, D)
    target = eps - x  # (2B, L, D)
    S = score(v[:B], target[:B], mask)  # (B,)
    S_ref = score(v_ref[:B], target[:B], mask)  # (B,)
    dS = S - S_ref  # (B,)
    alpha = gate(dS.detach(), args.gamma, args.tau)  # (B,), for the log only: inpo_loss computes its own
    if args.loss == "ga":
        forget = gradient_ascent(S)  # (B,)
    else:
        forget = inpo_loss(dS, args.eta, args.gamma, args.tau, args.beta)  # (B,)
    prior = prior_loss(v[B:], v_ref[B:])  # (B,)
    loss = forget.mean() + args.lambda_prior * prior.mean()
    return loss, dict(S=S.detach(), S_ref=S_ref, dS=dS.detach(), alpha=alpha, prior=prior.detach(),
                      sigma=sigma[:B])

def encode_images(vae, files, size, masked=False):
    """Image files -> packed latents (N, L, D) and, from X.mask.png, packed masks (N, L, D) in {0, 1}."""
    preprocess, xs, ms = VaeImageProcessor(do_resize=False).preprocess, [], []
    for file in tqdm(files, desc="encode images"):
        image = open_image(file, (size, size))
        pixels = preprocess(image).to(vae.device, vae.dtype)  # (1, 3, Y, X) in [-1, 1]
        with torch.no_grad():
            x = vae.encode(pixels).latent_dist.mode().float().cpu()  # (1, C, H, W)
        x = (x - vae.config.shift_factor) * vae.config.scaling_factor  # (1, C, H, W)
        xs.append(FluxPipeline._pack_latents(x, *x.shape))
        if masked:
            m = np.asarray(open_image(file.with_suffix(".mask.png"), image.size)) > 127  # (Y, X)
            m = torch.from_numpy(m)[None, None]  # (1, 1, Y, X)
            m = mask_to_latents(m, *x.shape[2:]).float().expand(x.shape)  # (1, C, H, W)
            ms.append(FluxPipeline._pack_latents(m, *x.shape))  # in the order of the latents' cells
    return torch.cat(xs), torch.cat(ms) if masked else None

def batch_of(step, forget, preserve, embeds, args):
    """Yield this process's share of a step's batch, in args.accumulate parts, each iteration's arguments. The
    batch depends on (seed, step) alone, so that a resumed run sees the same.

    forget: (latents (N, L, D), masks (N, L, D), prompts); preserve: (latents, prompts).
    """
    world = PartialState()
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    i = torch.randperm(len(forget[0]), generator=rng)[:args.batch * world.num_processes].tolist()
    j = torch.randperm(len(preserve[0]), generator=rng)[:args.batch * world.num_processes].tolist()
    x = torch.cat([forget[0][i], preserve[0][j]])  # (2B, L, D)
    prompts = [forget[2][k] for k in i] + [preserve[1][k] for k in j]
    states, pooled = (torch.stack([embeds[p][k] for p in prompts]) for k in (0, 1))  # (2B, T, E), (2B, P)
    eps = torch.randn(x.shape, generator=rng)  # (2B, L, D)  eps ~ N(0, 1)
    if args.noise == "logit-normal":  # not shifted: only FLUX's sampler shifts sigma
        sigma = torch.randn(len(x), generator=rng).sigmoid()  # (2B,)
    else:
        sigma = torch.rand(len(x), generator=rng)  # (2B,)  ~ U(0, 1)
    parts = args.accumulate * world.num_processes
    for part in range(world.process_index, parts, world.num_processes):
        mine = list(range(part, len(i), parts))  # the gate is per sample: a split batch has the same gradient
        rows = mine + [len(i) + k for k in mine]
        data = x[rows], forget[1][i][mine], states[rows], pooled[rows], sigma[rows], eps[rows]
        yield [tensor.to(args.device) for tensor in data]

def save_lora(transformer, folder):
    """Write pytorch_lora_weights.safetensors, which FluxPipeline.load_lora_weights reads; all or nothing."""
    lora = get_peft_model_state_dict(transformer)
    with atomic(folder / LORA_WEIGHT_NAME_SAFE) as half:
        FluxPipeline.save_lora_weights(folder, lora, weight_name=half.name)

def add_lora(transformer, rank, seed):
    """Add a LoRA that changes nothing yet, in float32 (in bf16 it ends far worse) -> its parameters."""
    torch.manual_seed(seed)
    # the saved file has no alpha, and loaders then take the rank for it: another one would be lost
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=LORA_TARGETS))
    cast_training_params(transformer, torch.float32)
    return [p for p in transformer.parameters() if p.requires_grad]

def make_optimizer(params, args):
    if args.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=args.lr, weight_decay=1e-4)
    return Prodigy(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=1e-4, decouple=True, d0=args.d0,
                   use_bias_correction=True, safeguard_warmup=True)

def train(pipe, forget, preserve, embeds, presets, args, stamp=None):
    """The loop -> log.csv's rows, one a step. LoRA and optimiser state go to checkpoint.pt, which is all that
    a resumed run knows: a schedule or an average of your own must go there, too.

    forget: for each concept what batch_of takes; presets: for each concept args with its row of Table 6;
    stamp: a checksum of the settings; a checkpoint with another one is refused.
    """
    transformer, main_process = pipe.transformer, PartialState().is_main_process
    params = add_lora(transformer, args.rank, args.seed)
    place(pipe, args, ["transformer"])
    if args.checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = make_optimizer(params, args)
    checkpoint, previous = args.out / "checkpoint.pt", args.out / "checkpoint-previous.pt"
    start, rows = 0, []
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["stamp"] != stamp:
                raise ValueError
            set_peft_model_state_dict(transformer, state["lora"])
            optimizer.load_state_dict(state["optimizer"])
            start, rows = state["step"], state["rows"]
        except Exception:  # cut short or not ours: torch raises many kinds
            instead = f"put {previous.name} in its place, or " * previous.exists()
            die(f"{checkpoint}: cannot be read, or is of other settings; {instead}delete it to train from "
                "step 0", 1)

    def stop(why):
        good = f"{checkpoint} holds the last good state" if checkpoint.exists() else "nothing was saved yet"
        die(f"{why}; {good}: lower --lr or --eta and use another --out", 1)

    done = range(args.save_every, start + 1, args.save_every) if args.save_every else ()
    lost = [step for step in done if not (args.out / f"step-{step}").exists()]
    if lost and main_process:
        print(f"--save-every: the LoRA of step {lost[0]} was not kept; to have all, use another --out")
    if rows and main_process:
        write_log(rows, args.out / "log.csv")  # it may be lost, or newer than a checkpoint that was put back

    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train",
               disable=not main_process)
    for step in bar:
        tick, seen, turn = time.perf_counter(), [], step % len(forget)  # one concept a step, in turn
        for part in batch_of(step, forget[turn], preserve, embeds, args):
            try:
                loss, info = iteration(transformer, *part, presets[turn])
            except ValueError as error:  # inpo.py refuses NaN
                stop(f"step {step}: {error}")
            (loss / args.accumulate).backward()
            seen.append(info | dict(loss=loss.detach()))
        info = {k: gather(torch.cat([s[k].flatten() for s in seen]).float()).cpu() for k in seen[0]}
        for p in params:
            p.grad = reduce(p.grad, "mean")  # over the processes of accelerate launch
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        size, mean = torch.nn.utils.get_total_norm([p.detach() for p in params]), info["loss"].mean()
        if not all(map(math.isfinite, (mean, norm, size))):  # the same in all processes: all stop
            stop(f"step {step}: loss {mean:.4g}, norm of the gradient {norm:.4g}, of the LoRA {size:.4g}")
        group = optimizer.param_groups[0]
        d_lr = group.get("d", 1.0) * group["lr"]  # d: Prodigy's own step size
        row = dict(step=step, concept=args.concept[turn])
        row |= {k: v.mean().item() for k, v in info.items() if k != "sigma"}
        passes = 4 if args.checkpointing else 3  # reference, forward, backward; 4: forward again
        forwards = 2 * args.batch * PartialState().num_processes * passes
        row |= dict(grad_norm=float(norm), d_lr=d_lr, forwards=forwards, seconds=time.perf_counter() - tick)
        row |= {k + "_each": " ".join(f"{v:.4f}" for v in info[k].tolist()) for k in ("sigma", "dS")}
        rows.append(row)
        bar.set_postfix_str(f"dS {row['dS']:.3f} alpha {row['alpha']:.3f}")
        if not main_process:
            continue
        if args.save_every and (step + 1) % args.save_every == 0:
            save_lora(transformer, args.out / f"step-{step + 1}")
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            if checkpoint.exists():
                with atomic(previous) as half:
                    shutil.copyfile(checkpoint, half)
            write_log(rows, args.out / "log.csv")
            with atomic(checkpoint) as half:  # last: a resumed run repeats nothing before it
                torch.save(dict(lora=get_peft_model_state_dict(transformer), step=step + 1, rows=rows,
                                optimizer=optimizer.state_dict(), stamp=stamp), half)
    if main_process:
        save_lora(transformer, args.out)
    return rows

def write_log(rows, path):
    with atomic(path) as half, open(half, "w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, rows[-1], extrasaction="ignore", lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)

def draw_curves(rows, path):
    figure = Figure((12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    step = [r["step"] for r in rows]
    for axis, keys in zip(axes.flat, ["loss", "S S_ref", "dS alpha", "prior", "grad_norm d_lr"]):
        for key in keys.split():
            axis.plot(step, [r[key] for r in rows], label=key, linewidth=1)
        axis.set_xlabel("step")
        axis.legend()
    axes[1, 1].set_yscale("log")
    last = rows[-max(1, len(rows) // 3):]
    sigma, dS = ([float(v) for r in last for v in r[k + "_each"].split()] for k in ("sigma", "dS"))
    axes[1, 2].scatter(sigma, dS, s=4)
    axes[1, 2].set(xlabel="sigma", ylabel="dS", title="dS by noise level, last third")
    with atomic(path) as half:
        figure.savefig(half, dpi=80, format="png")

def draw_before_after(pipe, embeds, groups, path, args, columns=6):
    """Two rows a group, the base model's above the LoRA's, with the same seeds -> number of forwards."""
    images, titles = [], []
    for title, prompts in groups.items():
        prompts = (prompts * columns)[:columns]
        seeds = [seed_of(args.seed, "before_after", i) for i in range(columns)]
        for adapters in (reference(pipe.transformer), contextlib.nullcontext()):
            with adapters:  # no more pictures at once than for the image sets
                for i in range(0, columns, args.sample_batch):
                    some = slice(i, i + args.sample_batch)
                    images += generate(pipe, embeds, prompts[some], seeds[some], args.sample_steps,
                                       args.sample_guidance, args.size)
        titles += [f"{title}: before", f"{title}: after"]
    contact_sheet(images, path, columns, titles=titles)
    return len(images) * args.sample_steps

def picture_groups(concepts):
    """What before_after.png shows, {title: prompts}: each concept alone, none of them, two at once."""
    groups = {concept["name"]: concept["eval"] for concept in concepts}
    groups |= {key: [o for c in concepts for o in c[key] if not mentions(o, concepts)]
               for key in ("neighbours", "unrelated")}
    no_style = [c for c in concepts if c["task"] != "style"]  # "noto style and a dog" is no prompt
    pairs = [[f"{c['concept'][0]} and {o}" for o in c["unrelated"] + c["unseen"] if not mentions(o, concepts)]
             for c in no_style]  # a list a concept, beside what its own file names; then from each in turn
    groups["pairs"] = [pair for some in itertools.zip_longest(*pairs) for pair in some if pair]
    things = [c["concept"][0] for c in no_style if c["detect"] != ["nudenet"]]  # nobody is put beside a nude
    styles = [c["concept"][0] for c in concepts if c["task"] == "style"]
    groups["together"] = [f"{a} and {b}" for a, b in itertools.combinations(things, 2)]
    groups["together"] += [f"{a} in {style}" for a in things for style in styles]
    return {title: prompts for title, prompts in groups.items() if prompts}

def fill_presets(concepts, args):
    """-> each concept's row of Table 6, changed by flags; args.steps becomes their sum if not given."""
    given = {key: getattr(args, key) for key in TABLE6["object"] if getattr(args, key) is not None}
    rows = [TABLE6[concept["task"]] | given for concept in concepts]
    args.steps = args.steps or sum((FEWER if args.fewer_images else row)["steps"] for row in rows)
    return rows

def write_card(concepts, settings, rows, path):
    """Write the LoRA's model card, which the hub shows: docs/card.md, filled in."""
    last = rows[-max(1, len(rows) // 10):]
    means = {key: sum(row[key] for row in last) / len(last) for key in ("dS", "alpha", "prior")}
    model, names = settings["model"], ", ".join(concept["name"] for concept in concepts)
    known = ROOT / "docs" / f"licence-{Path(model).name}.md"  # for the hub, and in words
    inherited = known.read_text() if known.exists() else "other\n\nthat of its base model"
    licence, terms = inherited.strip().split("\n\n", 1)
    table = "\n".join(f"| {key} | {value} |" for key, value in settings.items() if value is not None)
    base = f"base_model: {model}\n" * (not Path(model).is_dir())  # the hub knows no folder
    loss, card = settings["loss"], (ROOT / "docs" / "card.md").read_text()
    write_text(path, card.format(
        model=model, base=base, names=names, licence=licence, terms=terms, settings=table, steps=len(last),
        rank=settings["rank"], method=dict(inpo="INPO", ga="gradient ascent (Eq. 4)").get(loss, loss),
        gate=f"gate {means['alpha']:.4f}; " * (loss == "inpo"), **means))

def main(args):
    concepts = setup(args)
    table6 = fill_presets(concepts, args)
    args.lr = args.lr or dict(prodigy=0.7, adamw=1e-3)[args.optimizer]
    if args.batch % args.accumulate:
        die(f"--accumulate {args.accumulate} does not divide --batch {args.batch}")
    if args.steps < len(concepts):
        die(f"--steps {args.steps}: below the {len(concepts)} concepts, which take turns")
    forget, preserve = plan_sets(concepts, args)
    batch = args.batch * PartialState().num_processes
    preserved = sum(count for *_, count in preserve)
    if batch > min(args.n_forget, preserved):
        die(f"--batch {batch}: above the {args.n_forget} forget (--n-forget) or {preserved} preserved images "
            "(--n-preserve)")
    # no part of settings: what a resumed run may change, and what each concept has a value of its own for
    apart = ("out device save_every checkpoint_every checkpointing accumulate offload min_found eta gamma "
             "tau lambda_prior").split()
    settings = {k: v for k, v in vars(args).items() if k not in apart}
    settings["processes"] = PartialState().num_processes  # --batch is per process
    settings["train.py and inpo.py"] = fingerprint([ROOT / "train.py", ROOT / "inpo.py"])  # another loss?
    settings["preserved"] = [name for _, name, *_ in preserve]
    made = [check_set(*one, args) for one in forget + preserve]
    shown = [(one["concept"], one["prompts"], one.get("own pictures")) for one in made]  # or its masks
    settings["sets"] = f"{zlib.crc32(json.dumps(shown).encode()):08x}"
    for i, (concept, preset) in enumerate(zip(concepts, table6)):
        own = preset | dict(detect=concept["detect"], steps=len(range(i, args.steps, len(concepts))))
        settings |= {f"{concept['name']}.{key}": value for key, value in own.items()}
    stamp = zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode())
    # args.json binds once one of these is there; until then images and masks check their own settings
    ours = "checkpoint*.pt", LORA_WEIGHT_NAME_SAFE, "README.md", "step-*"
    there = [file.name for name in ours for file in args.out.glob(name)]
    if there and not (args.out / "args.json").exists():
        die(f"--out {args.out}: holds a {there[0]}, but no args.json says how it was made: use another --out")
    if there:
        check_settings(args.out / "args.json", settings, f"--out {args.out}")
    check_networks(args, [c for (folder, *_), c in zip(forget, concepts) if lacks_masks(folder, c)])
    for (folder, *_), concept in zip(forget, concepts):
        check_masks(folder, concept, args)
    check_plan(args)
    with lock(args.out):
        main_process = PartialState().is_main_process
        if main_process and not there:  # with the versions and commit of the first step
            keep_settings(args.out / "args.json", settings, apart={k: vars(args)[k] for k in apart})
        groups = picture_groups(concepts)
        wanted = [p for _, _, prompts, _ in forget + preserve for p in prompts]
        wanted += [p for prompts in groups.values() for p in prompts]
        with stage("prompts", args.out):
            embeds = encode_prompts(wanted, args)
        with stage("sample", args.out) as peak:  # Algorithm 1, step 1
            D_ES, D_PR, peak[2] = sample_all(embeds, forget, preserve, args)
        with stage("masks", args.out), PartialState().main_process_first():
            kept = [make_masks([file for file, _ in found], c, args) for found, c in zip(D_ES, concepts)]
        for concept, files in zip(concepts, kept):
            if len(files) < batch:
                die(f"{concept['name']}: only {len(files)} forget images have a mask, under --batch {batch}: "
                    f"{'add to --images, use another --out' if args.images else 'raise --n-forget'}", 1)
        with stage("latents", args.out):
            vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae", revision=args.weights,
                                                dtype=args.dtype).to(args.device)
            forget = []
            for found, files in zip(D_ES, kept):
                x, mask = encode_images(vae, files, args.size, masked=True)
                mask = torch.ones_like(mask) if args.mask == "full" else mask  # (N, L, D)
                forget.append((x, mask, [dict(found)[file] for file in files]))
            files, texts = zip(*D_PR)
            preserve = encode_images(vae, files, args.size)[0], texts
            del vae
        with stage("train", args.out):  # Algorithm 1, lines 2 to 6
            pipe = load_denoiser(args)
            presets = [argparse.Namespace(**vars(args) | preset) for preset in table6]
            rows = train(pipe, forget, preserve, embeds, presets, args, stamp)
        if not main_process:
            return
        draw_curves(rows, args.out / "curves.png")
        if "README.md" not in there:  # evaluate.py adds its figures to it
            write_card(concepts, settings, rows, args.out / "README.md")
        with stage("pictures", args.out) as peak:
            place(pipe, args, ["vae"])
            peak[2] = draw_before_after(pipe, embeds, groups, args.out / "before_after.png", args)
        print(f"{args.out}: dS {rows[-1]['dS']:.2f}; look at before_after.png and curves.png")

if __name__ == "__main__":
    guarded(main, ARGS)
