"""Step 1 of Algorithm 1: sample the forget set and the preserve set from the frozen model.

    python sample.py --model emoji-flux --concept cat            # 50 + 200 images and a contact sheet, 30 s on 2 cores
    python sample.py --concept pikachu --n-forget 100            # FLUX.1-dev; earlier images are kept as they are

Also here, because every script needs them: prompt files, the prompt filter, the model's pre-flight check.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FLUX = "black-forest-labs/FLUX.1-dev"
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"


def die(message, code=2):
    """One line on stderr and a non-zero exit: 2 before work has started, 1 during it."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def number(kind=float, least=0.0, finite=True):
    """An argparse type: a number > least (an int >= least); NaN never, infinity only where said."""
    def parse(text):
        value = kind(text)
        if math.isnan(value) or (finite and math.isinf(value)) or value < least or (kind is float and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {'>' if kind is float else '>='} {least}")
        return value
    parse.__name__ = kind.__name__  # argparse: "invalid float value: 'x'"
    return parse


def model_flags(parser, needs_concept=True):
    """The flags that every script shares."""
    parser.error = die  # one line, without the usage
    parser.add_argument("--model", default=FLUX, help="a FluxPipeline: hub id or folder (default %(default)s)")
    parser.add_argument("--concept", required=needs_concept, help="what to erase: a file name of the model's prompts/ or of ours")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, else float32")


def sampling_flags(parser):
    parser.add_argument("--size", type=number(int, 1), help="pixels, the side of an image (default: the VAE's sample_size)")
    parser.add_argument("--n-forget", type=number(int, 1), default=50, help="N_ES, unstated in the paper (default 50)")
    parser.add_argument("--n-preserve", type=number(int, 1), default=25, help="images a preserved concept (C.1: 25)")
    parser.add_argument("--sample-steps", type=number(int, 1), default=28, help="denoising steps (default 28)")
    parser.add_argument("--sample-guidance", type=number(least=-1e-12), default=3.5, help="guidance when sampling (default 3.5)")
    parser.add_argument("--sample-batch", type=number(int, 1), default=5, help="images at once; they are fixed groups (default 5)")


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    sampling_flags(parser)
    parser.add_argument("--out", type=Path, help="default out/MODEL-CONCEPT, as train.py's")
    return parser.parse_args(given)


ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports, so that --help answers at once

import psutil  # noqa: E402
import torch  # noqa: E402
from diffusers import FluxPipeline  # noqa: E402
from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: E402
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tqdm import tqdm  # noqa: E402

# one filter for everything that is ever generated; "kidney", "kidding", "girlfriend" and "cowboy" pass
MINORS = re.compile(
    r"\b(child(ren|hood)?|childlike|kid(s|do|dos)?|girls?|boys?|schoolgirls?|schoolboys?|(pre)?teen(s|aged?|agers?)?"
    r"|bab(y|ies)|infants?|toddlers?|newborns?|minors|underaged?|juveniles?|adolescents?|youngsters?|lolis?|shotas?"
    r"|lolicon|shotacon|pupils?|kindergart\w+|preschool\w*|(elementary|middle|high) school\w*"
    r"|(age[ds]?|aged?( of)?) *:? *([1-9]|1[0-7])|([1-9]|1[0-7]) *-? *(y/?o|(year|yr)s?([ -]*olds?)?)"
    r"|(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen)"
    r"[ -]years?[ -]olds?)\b", re.IGNORECASE)


def guarded(main, args):
    """Run main(args); what goes wrong during work becomes one line that says how to go on."""
    try:
        main(args)
    except KeyboardInterrupt:
        die("interrupted; what is finished is kept, the same command goes on from there", 130)
    except (OSError, RuntimeError) as error:  # a full disk, a folder that cannot be written, out of memory
        lines = str(error).strip().splitlines() or [type(error).__name__]
        die(f"{lines[0]}; what is finished is kept, the same command goes on from there", 1)


def allowed(prompts, what):
    """The prompts that do not mention minors; says how many do."""
    kept = [p for p in prompts if not MINORS.search(p)]
    if len(kept) < len(prompts):
        print(f"{what}: {len(prompts) - len(kept)} of {len(prompts)} prompts dropped, they mention minors")
    return kept


def load_concept(model, name):
    """Read prompts/NAME.txt (format: README.md) -> dict of strings and lists; the model's own folder comes first."""
    folder = Path(model) / "prompts"
    folder = folder if folder.is_dir() else ROOT / "prompts"
    known = sorted(p.stem for p in folder.glob("*.txt"))
    path = folder / f"{name}.txt"
    if name not in known:
        die(f"--concept {name}: {folder} has {', '.join(known)}; for another, write {path} (README.md: a concept is a file)")
    found, section = dict(name=name), None
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), [])
        elif section is None:
            key, _, value = line.partition(":")
            found[key] = value.strip() if key == "task" else [v.strip() for v in value.split(",")]
        else:
            section.append(line)
    wanted = "task concept detect neighbours unrelated unseen backgrounds styles train eval paraphrases preserve".split()
    missing = [key for key in wanted if not found.get(key)]
    if missing or found["task"] not in ("object", "ip", "style", "nsfw"):
        die(f"{path}: {'no ' + ', '.join(missing) if missing else 'task must be object, ip, style or nsfw'}")
    return found | {k: allowed(found[k], f"{path} [{k}]") for k in ("train", "eval", "paraphrases", "preserve")}


def check_model(model, device, dtype, size=None):
    """Refuse, in this order: not here and no network; no licence; does not fit -> the image size in pixels.

    Nothing is downloaded. What must fit is the largest folder of weights, since the stages load one at a time.
    """
    instead = "what runs here and now: python train.py --model emoji-flux --concept cat"
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, HFValidationError):
            folder = None
    if folder:
        if not (folder / "model_index.json").exists() or "FluxPipeline" not in (folder / "model_index.json").read_text():
            die(f"--model {model}: {folder} holds no FluxPipeline (model_index.json); {instead}")
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.glob("*/*.safetensors")}
        vae = json.loads((folder / "vae" / "config.json").read_text())
    else:
        try:
            info = HfApi().model_info(model, files_metadata=True, timeout=10)
            HfApi().auth_check(model)
        except GatedRepoError:
            die(f"--model {model}: accept its licence at https://huggingface.co/{model}, then `hf auth login`; {instead}")
        except (RepositoryNotFoundError, HFValidationError):
            die(f"--model {model}: neither a folder here nor a model on the hub; {instead}")
        except Exception as error:  # each HTTP stack has its own class for "no network"
            die(f"--model {model}: no such folder, not in the cache, and the hub cannot be reached "
                f"({type(error).__name__}): connect or pass a folder; {instead}")
        files = {f.rfilename: f.size for f in info.siblings if re.fullmatch(r"[^/]+/[^/]+\.safetensors", f.rfilename)}
        vae = json.loads(Path(hf_hub_download(model, "vae/config.json")).read_text())
    need = {}
    for name, n_bytes in files.items():  # on disk they are bf16
        need[name.split("/")[0]] = need.get(name.split("/")[0], 0) + n_bytes * dtype.itemsize // 2
    if not need:
        die(f"--model {model}: has no */*.safetensors; {instead}")
    part = max(need, key=need.get)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if need[part] > free:
        die(f"--model {model}: {part} needs {need[part] / 2**30:.1f} GiB in {str(dtype)[6:]}, {device} has "
            f"{free / 2**30:.1f} GiB free; {instead}")
    size = size or vae["sample_size"]
    step = 2 * 2 ** (len(vae["block_out_channels"]) - 1)  # the VAE's factor, times FLUX's 2 x 2 packing
    if size < step or size % step:
        die(f"--size {size}: must be a multiple of {step}, the VAE's factor times the packing")
    return size


def encode_prompts(model, prompts, device, dtype):
    """{prompt: (T5 states (L, D), pooled CLIP state (D,))} on the CPU; the text encoders are freed on return."""
    pipe = FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=dtype).to(device)
    length = pipe.tokenizer_2.model_max_length
    found = {}
    with torch.no_grad():  # encode_prompt keeps a graph otherwise
        for prompt in tqdm(sorted(set(prompts)), desc="encode prompts"):
            states, pooled, _ = pipe.encode_prompt(prompt, None, device=device, max_sequence_length=length)
            found[prompt] = states[0].cpu(), pooled[0].cpu()
    return found


def load_denoiser(model, device, dtype):
    """FluxPipeline without its text encoders: transformer, VAE, scheduler, frozen and in eval mode."""
    pipe = FluxPipeline.from_pretrained(model, text_encoder=None, text_encoder_2=None, tokenizer=None,
                                        tokenizer_2=None, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    return pipe


def generate(pipe, embeds, prompts, seeds, steps, guidance, size):
    """One batch -> list of PIL images; image i depends on prompts[i] and seeds[i] (and, by rounding, on the batch)."""
    device = pipe.transformer.device
    states, pooled = (torch.stack([embeds[p][k] for p in prompts]).to(device) for k in (0, 1))
    noise = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompt_embeds=states, pooled_prompt_embeds=pooled, generator=noise, num_inference_steps=steps,
                guidance_scale=guidance, height=size, width=size).images


def seed_of(seed, concept, index):
    """The noise of image `index` of a concept: more images, or other concepts, never change it."""
    return zlib.crc32(f"{seed}/{concept}/{index}".encode())


def save_image(image, path):
    """Write under another name first: a killed run leaves no half image."""
    image.save(path.with_suffix(".tmp"), format="PNG")
    os.replace(path.with_suffix(".tmp"), path)


def sample_set(pipe, embeds, folder, concept, prompts, count, args):
    """Fill folder with 000.png ... and manifest.json -> [(path, prompt)]; what is there already is kept.

    Images are made in whole groups of args.sample_batch, so that their number cannot change their rounding.
    """
    settings = dict(model=args.model, concept=concept, prompts=prompts, seed=args.seed, size=args.size,
                    steps=args.sample_steps, guidance=args.sample_guidance, group=args.sample_batch, dtype=str(args.dtype))
    manifest = folder / "manifest.json"
    if manifest.exists():
        made = json.loads(manifest.read_text())["settings"]
        for key, value in settings.items():
            if made.get(key) != value:
                die(f"{folder}: its images were made with {key} = {made.get(key)}, not {value}; use another --out", 2)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(file=f"{i:03}.png", prompt=prompts[i % len(prompts)], seed=seed_of(args.seed, concept, i))
            for i in range(-(-count // args.sample_batch) * args.sample_batch)]
    manifest.write_text(json.dumps(dict(settings=settings, images=rows[:count]), indent=1))
    for first in range(0, count, args.sample_batch):
        group = rows[first:first + args.sample_batch]
        if all((folder / r["file"]).exists() for r in group if r in rows[:count]):
            continue
        images = generate(pipe, embeds, [r["prompt"] for r in group], [r["seed"] for r in group],
                          args.sample_steps, args.sample_guidance, args.size)
        for row, image in zip(group, images):
            if row in rows[:count]:
                save_image(image, folder / row["file"])
    return [(folder / r["file"], r["prompt"]) for r in rows[:count]]


def contact_sheet(images, path, columns=10, side=96, titles=()):
    """Images, row by row, as one picture; titles name the rows."""
    left = 150 if titles else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (left + columns * side, rows * side), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        sheet.paste(image.convert("RGB").resize((side - 2, side - 2)), (left + i % columns * side, i // columns * side))
    for i, title in enumerate(titles):
        pen.text((4, i * side + side // 2 - 12), title, fill="black")
    save_image(sheet, Path(path))


def sample_all(pipe, embeds, concept, args):
    """Step 1 of Algorithm 1 -> D_ES as [(path, prompt)], D_PR as [(path, prompt)]."""
    forget = sample_set(pipe, embeds, args.out / "forget", concept["name"], concept["train"], args.n_forget, args)
    preserve = []
    for other in tqdm(concept["neighbours"] + concept["unrelated"], desc="sample preserve set"):
        prompts = [t.replace("{}", other) for t in concept["preserve"]]
        preserve += sample_set(pipe, embeds, args.out / "preserve" / other, other, prompts, args.n_preserve, args)
    shown = [Image.open(p) for p, _ in forget[:10] + preserve[::args.n_preserve]]
    contact_sheet(shown, args.out / "samples.png", columns=6)
    return forget, preserve


def open_image(path, size=None):
    """An image file as RGB (masks: as L), whole; a corrupt one, or one of another size, is named."""
    try:
        with Image.open(path) as image:
            image = image.convert("L" if path.name.endswith(".mask.png") else "RGB")
    except OSError as error:
        die(f"{path}: {error}; delete it and run the same command again", 1)
    if size and image.size != size:
        die(f"{path}: is {image.size}, its image is {size}; delete it and run the same command again", 1)
    return image


def beside(model, name, hub):
    """model/name where the model's folder has it, else what the hub has."""
    here = Path(model) / name
    return str(here) if here.exists() else hub


def setup(args):
    """Fill in what the flags left open and refuse what cannot work, before anything is written -> the concept."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    concept = load_concept(args.model, args.concept)
    args.size = check_model(args.model, args.device, args.dtype, getattr(args, "size", None))
    tag = f"-{args.seed}" if args.seed else ""
    args.out = getattr(args, "out", None) or Path("out") / f"{Path(args.model).name}-{args.concept}{tag}"
    for flag, name, hub in (("detector", "detector", "google/owlv2-base-patch16-ensemble"), ("sam", "sam.pth", SAM_URL),
                            ("judge", "clip", "llava-hf/llava-1.5-7b-hf"), ("clip", "clip", "openai/clip-vit-base-patch32")):
        if hasattr(args, flag):
            setattr(args, flag, getattr(args, flag) or beside(args.model, name, hub))
            print(f"{flag}: {getattr(args, flag)}")
    return concept


def check_settings(path, args, ignore):
    """Write the run's settings, versions and commit; refuse a folder that other settings have made."""
    settings = {k: v if isinstance(v, (int, float, bool)) or v is None else str(v) for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ignore}
    if path.exists():
        made = json.loads(path.read_text())["settings"]
        for key in settings.keys() | made.keys():
            if made.get(key) != settings.get(key):
                die(f"--out {path.parent}: was made with {key} = {made.get(key)}, not {settings.get(key)}; use another")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "segment-anything")}
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    path.write_text(json.dumps(dict(settings=settings, versions=versions, commit=commit), indent=1))


def main(args):
    concept = setup(args)
    prompts = concept["train"] + [t.replace("{}", other) for other in concept["neighbours"] + concept["unrelated"]
                                  for t in concept["preserve"]]
    embeds = encode_prompts(args.model, prompts, args.device, args.dtype)
    forget, preserve = sample_all(load_denoiser(args.model, args.device, args.dtype), embeds, concept, args)
    print(f"{args.out}: {len(forget)} + {len(preserve)} images; look at samples.png")


if __name__ == "__main__":
    guarded(main, ARGS)
