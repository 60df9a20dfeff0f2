"""Step 1 of Algorithm 1: sample the forget set and the preserve set from the frozen model.

    python sample.py --model emoji-flux --concept cat     # 50 + 200 images, out/emoji-flux-cat/samples.png
    python sample.py --concept pikachu --n-forget 100     # FLUX.1-dev; images already there are kept

Step 1 itself is the last section. What comes before it is shared by all scripts, which import it from here:
flags, prompt files and their filter, what is refused before work, settings, files, the frozen model.
"""
import argparse
import contextlib
import functools
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# ---------------------------------------------------------------------------------------------------- flags

ROOT = Path(__file__).resolve().parent
# flag -> the network's default: this path in the model's folder if it exists, else this hub id or URL
HUB = dict(detector=("detector", "google/owlv2-base-patch16-ensemble"),
           sam=("sam.pth", "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth"),
           judge=("clip", "llava-hf/llava-1.5-7b-hf"), clip=("clip", "openai/clip-vit-base-patch32"))
TASKS = ("object", "ip", "style", "nsfw")
SCRIPTS = ("sample", "mask", "train", "evaluate", "bench", "build")
# --quantize -> bytes per frozen weight, scales included; None: as many as the dtype has
WEIGHT_BYTES = dict(none=None, int8=1.01, nf4=0.57)

def is_other_rank():
    """Is this a process of accelerate launch, but not its first? Other tools set RANK alone."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"

def die(message, code=2):
    """Print one line to stderr (below any progress bar) and exit: 2 before work has begun, 1 during it."""
    # before work all processes of accelerate launch find the same: once rank 0 has said it, launch ends the
    # others; one that ended first would end rank 0 unheard
    if code == 2 and is_other_rank():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(20)
    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # guarded()'s; launch may still send one: no more
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("\n" * (code != 2) + f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(code)

def number(kind=float, least=0.0, strict=True, most=None):
    """An argparse type: a number > least (>= least if not strict) and <= most; never NaN."""
    most = most or {int: 2**31 - 1, float: 3.4e38}[kind]  # the largest int32 and float32

    def parse(text):
        value = kind(text)
        if not least <= value <= most or (strict and value == least):
            bounds = f"{'>' if strict else '>='} {least:g}" + f" and <= {most}" * (value > most)
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value
    parse.__name__ = kind.__name__  # argparse then says "invalid float value: 'x'"
    return parse

def model_flag(flag):
    """flag, here and below: the add_argument method of a parser or of one of its groups."""
    def path(name):  # . and .. need their real name: --out is named after it
        return (Path(name) if Path(name).name.strip(".") else Path(name).resolve()).as_posix()

    flag("--model", type=path, default="black-forest-labs/FLUX.1-dev",
         help="a FluxPipeline: hub id or folder (default %(default)s)")

def model_flags(doc, needs_concept=True, out="default out/MODEL-CONCEPT, with -SEED where it is not 0"):
    """A script's parser, with the flags that all scripts share."""
    raw = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=110)
    parser = argparse.ArgumentParser(description=doc, usage="%(prog)s [flags]", formatter_class=raw)
    parser.error = die  # one line, without the usage
    flag = parser.add_argument
    model_flag(flag)
    flag("--concept", nargs="+", action="extend", metavar="NAME", required=needs_concept,
         help="a prompt file's name; if several, one LoRA forgets them all (D.2)" if needs_concept else
         "the concept to ask about, where a LoRA forgot several (default: its own)")
    flag("--out", type=Path, help=out)
    flag("--seed", type=number(int, strict=False, most=2**32 - 1), default=0, help="default 0")
    flag("--device", choices=["cpu", "cuda", "mps"], help="default: cuda where there is one")
    flag("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda")
    return parser

def drawing_flags(flag):
    flag("--quantize", choices=list(WEIGHT_BYTES), default="none",
         help="store frozen weights as int8 by torchao or nf4 by bitsandbytes (default none)")
    flag("--offload", action="store_true", help="frozen weights stay in main memory but for one layer: slow")
    flag("--size", type=number(int), help="pixels a side (default: the VAE's sample_size)")
    flag("--sample-steps", type=number(int), default=28, help="denoising steps (default 28, our choice)")
    flag("--sample-guidance", type=number(strict=False), default=3.5, help="default 3.5, our choice")
    flag("--sample-batch", type=number(int),
         help="images drawn at once (default 25, 5 or 1, by --size; 5 at 1024 or with --fewer-images)")

def data_flags(flag):
    flag("--n-forget", type=number(int), default=50, help="N_ES (default 50, or all --images)")
    flag("--n-preserve", type=number(int), default=25, help="images of each preserved concept (C.1: 25)")
    flag("--prompts", type=Path, help="a text file of forget prompts (default: the prompt file's [train])")
    flag("--preserve", type=Path,
         help="a text file of prompts to preserve: 8 x --n-preserve images, or one per line if that is more")
    flag("--preserve-dir", type=Path, help="the preserve images' folder, which runs may share (OUT/preserve)")
    flag("--images", type=Path, help="a folder of your own forget images, no prompt file needed: X.jpg, its "
                                     "caption X.txt, its mask X.mask.png")
    flag("--task", choices=TASKS, help="with --images: what the concept is, for Table 6's preset")
    flag("--caption", help='with --images: the caption where X.txt is missing, e.g. "a photo of {}"')
    drawing_flags(flag)

def finder_flags(flag):
    flag("--detector", help="OWLv2 or GroundingDINO (default: the model's own, else OWLv2)")
    flag("--sam", help="a .pth, file or URL (default: the model's own, else SAM's ViT-H)")
    flag("--threshold", type=number(strict=False, most=1), default=0.2,
         help="lowest score of a box (0.2; NudeNet itself drops those below 0.25)")

def mask_flags(flag):
    finder_flags(flag)
    flag("--min-found", type=number(strict=False, most=1), default=0.5, help="share that needs a mask (0.5)")

def arguments(given=None):
    parser = model_flags(__doc__)
    data_flags(parser.add_argument)
    return parser.parse_args(given)

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once
if Path(sys.argv[0]).stem in SCRIPTS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C in the slow imports below: no traceback
if not {"-h", "--help"} & set(sys.argv):  # --help needs only the flags: no slow imports
    for name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer",
                 "diffusers.loaders.lora_base"):  # their warnings are about what we do on purpose
        logging.getLogger(name).setLevel(logging.ERROR)
    import numpy as np
    import psutil
    import torch
    from accelerate import PartialState
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import gather
    from diffusers import (BitsAndBytesConfig, FluxPipeline, FluxTransformer2DModel,
                           PipelineQuantizationConfig, TorchAoConfig)
    from diffusers.training_utils import free_memory
    from filelock import FileLock, Timeout
    from huggingface_hub import (HfApi, hf_hub_download, parse_local_safetensors_file_metadata,
                                 snapshot_download)
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from PIL import Image, ImageDraw, ImageOps
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm
    from transformers import CLIPTextModel, T5EncoderModel

# ------------------------------------------------------------------------------------ a failed run's one line

# how devices and libraries word it
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")

def guarded(main, args):
    """Run main(args); an error, Ctrl-C or SIGTERM during work becomes one line that says how to go on."""
    kept = "; what is finished is kept" * (not hasattr(args, "bench"))  # bench.py keeps nothing
    unless = " unless another process says otherwise," * ("LOCAL_RANK" in os.environ)
    go_on = kept and f"{kept}, and{unless} the same command goes on from there"
    if is_other_rank():  # rank 0 says it for all
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # None if closed; it escapes letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    # sent when a job's time is over, or when another process of accelerate launch has died
    signal.signal(signal.SIGTERM, lambda *_: die(f"terminated{go_on}", 143))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(args)
        print(end="", flush=True)  # a closed pipe may show only here
    except KeyboardInterrupt:
        die(f"interrupted{go_on}", 130)
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os._exit(141)
    except Exception as error:  # of any class: the hub's HTTP and the loaders have their own
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "inline_container" in said:  # torch.save's word for a failed write
            said = "a checkpoint cannot be written: is the disk full?"
        if "gloo" in said and "peer" in said:
            said = "another process has ended; its own line, if it left one, says why"
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(said):
            if not {"quantize", "weights"} <= vars(args).keys():  # mask.py or bench.py, or still in setup()
                die("out of memory; python bench.py --plan says what each stage needs", 1)
            from bench import savings  # not above: bench.py imports train.py, which imports this file
            print("out of memory: planning which flags need less ...")
            die(f"out of memory; {savings(args)}", 1)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            die(f"{said}{go_on}", 1)
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if ROOT in Path(f.filename).resolve().parents]  # perhaps through a link
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        die(f"{said} ({type(error).__name__}, {place}){kept}", 1)

# --------------------------------------------------- prompts: the filter, a concept's file, your own pictures

def read_text(path, flag=""):
    """A text file's content; if it is not readable UTF-8, exit naming it and the flag that it came from."""
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Notepad begins files with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        die(f"{flag} {path}: is no readable UTF-8 text ({type(error).__name__})".strip())

def lines_of(path, flag=""):
    """A text file's lines, without blank ones and # comments."""
    return [line for line in map(str.strip, read_text(path, flag).splitlines()) if line and line[0] != "#"]

# the one filter that every prompt passes before anything is drawn: the words in minors.txt
YOUNG = (r"(?<!\d)(?<!ty[\W_])([1-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
         r"|thirteen|fourteen|fifteen|sixteen|seventeen)(?!\d)")
WORDS = "|".join(lines_of(ROOT / "minors.txt")).replace("{YOUNG}", YOUNG)
MINORS = re.compile(rf"(?<![^\W\d_])({WORDS})(?![^\W\d_])", re.IGNORECASE)

def minors_in(prompt):
    """The match of the first mention of minors, or None. Accents, full-width letters and invisible characters
    do not hide it."""
    letters = [c for c in unicodedata.normalize("NFKD", prompt)
               if c.isspace() or unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc")]
    return MINORS.search(prompt) or MINORS.search("".join(letters))  # an invisible one may end a word

def allowed(prompts, what):
    """The prompts that do not mention minors; prints how many do, counted by the word found."""
    found = [minors_in(p) for p in prompts]
    words = Counter(" ".join(m[0].lower().split()) for m in found if m)
    if words:
        by_word = ", ".join(f"{word} {n}" for word, n in words.most_common())
        print(f"{what}: {words.total()} of {len(prompts)} prompts dropped, they mention minors ({by_word})")
    return [p for p, m in zip(prompts, found) if not m]

def unfit_name(text):
    """Is this unfit to name a file or folder: holding a slash, only dots, empty or too long?"""
    return re.search(r"[/\\]|^\.*$", text) or len(os.fsencode(text)) > 80

def prompts_folder(model):
    """The model's own prompts/, else ours."""
    return next(folder / "prompts" for folder in (Path(model), ROOT) if (folder / "prompts").is_dir())

def load_concept(model, name):
    """Read NAME.txt (format: README.md) -> dict of strings and lists."""
    folder = prompts_folder(model)
    path, known = folder / f"{name}.txt", sorted(p.stem for p in folder.glob("*.txt"))
    if name not in known:
        die(f"--concept {name}: known are {', '.join(known)}; for another write {path} "
            "(README: a concept is a file)")
    keys = "task concept detect neighbours unrelated unseen backgrounds styles".split()
    sections = "train eval paraphrases preserve".split()
    found, section = {}, None
    for line in lines_of(path):
        key, colon, value = line.partition(":")
        if line.startswith("[") and (key := line.strip("[]")) in sections and key not in found:
            section = found[key] = []
        elif section is not None and not line.startswith("["):
            section.append(line)
        elif key in found:
            die(f"{path}: has {key} twice")
        elif colon and key in keys:
            found[key] = [v for v in map(str.strip, value.split(",")) if v]
        else:
            die(f"{path}: {line} is none of {', '.join(keys)}, nor one of [{'], ['.join(sections)}]")
    for key in keys + sections:
        mine = allowed(found.get(key, []), f"{path}, {key}")
        found[key] = mine or die(f"{path}: has no {key} (README: a concept is a file)")
    if odd := [template for template in found["preserve"] if "{}" not in template]:
        die(f"{path}: [preserve] holds {odd[0]}, a template without {{}}")
    composed = [template.replace("{}", thing) for template in found["preserve"]
                for thing in found["neighbours"] + found["unrelated"] + found["unseen"]]
    composed += [f"{thing} and {other}" for thing in found["concept"]
                 for other in found["unrelated"] + found["unseen"]]
    if odd := [prompt for prompt in composed if minors_in(prompt)]:
        die(f"{path}: mentions minors once put together: {odd[0]}")
    if odd := list(filter(unfit_name, found["neighbours"] + found["unrelated"])):
        die(f"{path}: {odd[0]}: names a folder of images, take a phrase without / and \\, of 1 to 80 bytes")
    if odd := [end for end in found["backgrounds"] + found["styles"] if " " not in end]:
        die(f"{path}: {odd[0]} is no ending of a prompt, such as: on a beach, in oil style")
    if (task := ", ".join(found["task"])) not in TASKS:
        die(f"{path}: task is {task}, not {' or '.join(TASKS)}")
    return found | dict(name=name, task=task)

def read_prompts(flag, path):
    """The lines of a text file of prompts, without those that the filter drops."""
    return allowed(lines_of(path, flag), f"{flag} {path}") or die(f"{flag} {path}: holds no prompt")

MEND = "fix it or remove it"
PICTURES = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff".split()

def own_pictures(args):
    """Check all of --images -> [(file, caption)], without pictures whose caption mentions minors."""
    files = sorted(f for f in args.images.glob("[!.]*")
                   if not f.is_dir() and f.resolve() != args.preserve.resolve())
    pictures = [f for f in files if f.suffix.lower() in PICTURES and not f.stem.lower().endswith(".mask")]
    known = {f.with_suffix(end) for f in pictures for end in (f.suffix, ".txt", ".mask.png")}
    if odd := [f for f in files if f not in known]:
        die(f"--images: {odd[0]}: is no picture ({' '.join(PICTURES)}), nor the X.txt or X.mask.png of one: "
            f"{MEND}")
    rows = []
    for file in pictures:
        text, by_mask = file.with_suffix(".txt"), file.with_suffix(".mask.png")
        caption = (args.caption or "").replace("{}", args.concept[0])
        caption = read_text(text) if os.path.lexists(text) else caption  # a dead link: exit
        if not caption.strip():
            die(f"--images: {file} has no caption: write {text}, or give --caption")
        rows.append((file, " ".join(caption.split())))
        image = open_image(file, None, MEND, 2)
        if os.path.lexists(by_mask):
            side, mask = min(image.size), open_image(by_mask, image.size, MEND, 2)
            low, high = ImageOps.fit(mask, (side, side)).getextrema()
            colour = "black" if high < 128 else "white" if low > 127 else None
            if colour == "white" and args.task == "style":
                print(f"--images: {by_mask} is all white: the whole picture counts as the style")
            elif colour:
                die(f"--images: {by_mask} is all {colour}, cropped square: {MEND}")
    kept = set(allowed([caption for _, caption in rows], f"--images {args.images}"))
    return [row for row in rows if row[1] in kept] or die(f"--images {args.images}: holds no picture to use")

def load_concepts(args):
    """A dict for each --concept, from its prompt file or --images; --prompts and --preserve replace parts.
    evaluate.py's --task stands in for a prompt file: of such a concept no more than its name is known."""
    images, prompts, preserve, task = (getattr(args, k, None) for k in "images prompts preserve task".split())
    if odd := list(filter(unfit_name, args.concept)):
        die(f"--concept {odd[0]}: names files and folders, take a name without / and \\, of 1 to 80 bytes")
    if prompts and (images or len(args.concept) > 1):
        die(f"--prompts {prompts}: needs a single --concept, and no --images")
    if images:
        if len(args.concept) > 1 or not (task and preserve):
            die(f"--images {images}: needs one --concept, --task and --preserve")
        name, = args.concept
        pictures = own_pictures(args)
        captions = [caption for _, caption in pictures]
        concepts = [dict(name=name, task=args.task, concept=[name], train=captions, pictures=pictures,
                         detect=["nudenet" if name == "nudity" else name], unseen=[],
                         eval=list(dict.fromkeys(captions)))]
        args.n_forget = len(pictures)
    elif task or getattr(args, "caption", None):
        if "images" in args:
            die("--task, --caption: describe --images; without --images the concept's file says it all")
        concepts = [dict(name=name, task=task, concept=[name], detect=[name]) for name in args.concept]
    else:
        concepts = [load_concept(args.model, name) for name in dict.fromkeys(args.concept)]
        print(f"prompts: {prompts_folder(args.model)}")
    for concept in concepts:
        if prompts:
            concept["train"] = read_prompts("--prompts", prompts)
        if preserve:
            concept |= dict(neighbours=read_prompts("--preserve", preserve), unrelated=[], preserve=["{}"])
    return concepts

def mentions(phrase, concepts):
    """Does the phrase name one of the concepts, by its name, the judge's words or, for an object, the
    detector's (others have wider ones: a man for Elon Musk, a painting for a style)?"""
    words = [[c["name"], *c["concept"]] + c["detect"] * (c["task"] == "object") for c in concepts]
    return says(phrase, sum(words, []))

def says(phrase, words):
    """Does the phrase contain one of the words, without its article, or its regular plural?"""
    bare = [re.sub("(?i)^(an?|the) ", "", word) for word in words]
    forms = bare + [re.sub(end, plural, word) for word in bare
                    for end, plural in (("$", "s"), ("(?<=[sxzoh])$", "es"), ("y$", "ies"), ("fe?$", "ves"))]
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", phrase, re.IGNORECASE) for form in forms)

# -------------------------------------------------------------------- what cannot work is refused before work

def fingerprint(paths):
    """A checksum of files; above 64 MB only a thousand samples are read, so that 24 GB take seconds."""
    found = 0
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for start in range(0, size, max(65536, size // 1024)):
                file.seek(start)
                found = zlib.crc32(file.read(65536), found)
    return f"{found:08x}"

def check_size(size, vae):
    """-> size, or the VAE's sample_size if it is None; one that the latent grid cannot hold is refused."""
    size, step = size or vae["sample_size"], 2 ** len(vae["block_out_channels"])
    if size % step:
        die(f"--size {size}: must be a multiple of {step}, the VAE's factor times FLUX's 2 x 2 packing")
    return size

# each part of a pipeline's folder -> the name of its config file, and a key that must be in it
PARTS = dict(
    scheduler=("scheduler_config", "_class_name"), tokenizer=("tokenizer_config", "model_max_length"),
    tokenizer_2=("tokenizer_config", "model_max_length"), transformer=("config", "guidance_embeds"),
    vae=("config", "sample_size"), text_encoder=("config", "architectures"),
    text_encoder_2=("config", "architectures"))

def has_vocabulary(folder):
    """Does the folder hold a tokenizer's vocabulary? Without one transformers reads all words as unknown."""
    names = "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model"
    return any((Path(folder) / name).exists() for name in names)

def missing_part(folder):
    """The first file of a pipeline's folder that is missing or cut short, or None."""
    for part, (name, key) in PARTS.items():
        weights = {*(folder / part).glob("*.safetensors")}
        if name == "config":  # the part is a network: it must have weights
            weights = weights or {folder / part / "*.safetensors"}
        try:
            path = folder / part / f"{name}.json"
            if key not in json.loads(path.read_text()):
                return path
            if name == "tokenizer_config" and not has_vocabulary(folder / part):
                return folder / part / "tokenizer.json"
            for path in (folder / part).glob("*.safetensors.index.json"):
                shards = json.loads(path.read_text())["weight_map"]
                weights |= {path.parent / name for name in shards.values()}
            for path in sorted(weights):
                safe_open(path, "pt")  # reads only the header, and compares the file's length
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return path

def free_bytes(where):
    """Bytes free on "cuda", else in main memory; of several GPUs the least, so that all processes agree."""
    if where != "cuda":
        return psutil.virtual_memory().available
    return gather(torch.tensor([torch.cuda.mem_get_info()[0]], device=PartialState().device)).min().item()

def check_model(args):
    """Refuse a model that cannot be had, lacks its licence or a part, or is too large; downloads no weights.
    -> pixels a side, and the revision of the weights: the hub's commit, or a checksum of a folder's. Each
    network must fit by itself, since stages load one at a time."""
    model, device = args.model, args.device

    def refuse(why):
        script, known = (os.path.relpath(ROOT / name) for name in ("train.py", "emoji-flux"))
        die(f"--model {model}: {why}; what runs here: python {script} --model {known} --concept cat")

    here, folder = Path(model).is_dir(), Path(model)
    if not here:
        wanted = ["model_index.json", "*/*"]  # what diffusers downloads; the rest need not be here
        with contextlib.suppress(OSError, HFValidationError):
            folder = Path(snapshot_download(model, local_files_only=True, allow_patterns=wanted))
    config, missing, count = folder / "vae" / "config.json", missing_part(folder), Counter()
    # the cache may hold only a part of it, from an earlier check or an interrupted download
    if here or ((folder / "model_index.json").exists() and not missing):
        index = folder / "model_index.json"
        if not index.exists() or b"FluxPipeline" not in index.read_bytes():
            refuse(f"{folder} holds no FluxPipeline (model_index.json)")
        if missing:
            refuse(f"{missing} is missing or cannot be read")
        paths = sorted(p for p in folder.glob("*/*.safetensors")  # not a LoRA that somebody keeps there
                       if (p.parent / "config.json").exists())
        for path in paths:
            by_dtype = parse_local_safetensors_file_metadata(path).parameter_count
            count[path.parent.name] += sum(by_dtype.values())
        weights = fingerprint(paths + sorted(folder.glob("*.pth"))) if here else folder.name  # the commit
    else:
        try:
            info = HfApi().model_info(model, files_metadata=True, timeout=4)
            HfApi().auth_check(model)
            config = Path(hf_hub_download(model, "vae/config.json"))
            index = Path(hf_hub_download(model, "model_index.json"))
        except GatedRepoError:
            refuse(f"accept its licence on https://huggingface.co/{model}, then hf auth login")
        except (RepositoryNotFoundError, HFValidationError):
            refuse("neither a folder here nor a model on the hub")
        except Exception as error:  # every HTTP stack has a class for "no network"; or a token has expired
            cut = f" whole, {missing} is missing or cannot be read" if folder.is_dir() else ""
            refuse(f"no folder here, not cached{cut}, and the hub cannot be reached, or refuses "
                   f"({(str(error).strip() or type(error).__name__).splitlines()[0]}): connect, or pass a "
                   "folder")
        if b"FluxPipeline" not in index.read_bytes():
            refuse("is no FluxPipeline, by its model_index.json")
        for file in info.siblings:
            if re.fullmatch(r"[^/]+/[^/]+\.safetensors", file.rfilename):
                count[file.rfilename.split("/")[0]] += file.size / 2  # taking it for two bytes a weight
        weights = info.sha
    if not count:
        refuse("has no */*.safetensors")
    for part, n in count.most_common() if "quantize" in args else ():  # mask.py loads none of them
        where = "cpu" if part == "transformer" and args.offload else device
        free = free_bytes(where)
        gib = {how: n * (each or args.dtype.itemsize) / 2**30 for how, each in WEIGHT_BYTES.items()
               if how == "none" or part == "transformer" and (how == "int8" or device == "cuda")}
        need = gib.get(args.quantize, gib["none"])
        if need > free / 2**30:
            smaller = "".join(f", {n:.2f} with --quantize {how}" for how, n in gib.items() if n < need)
            refuse(f"its {part} needs {need:.2f} GiB{smaller}; {where} has {free / 2**30:.2f} GiB free")
    return check_size(getattr(args, "size", None), json.loads(config.read_text())), weights

def check_plan(args):
    """Refuse, before hours of sampling, what by bench.py's plan exceeds the GPU's memory; if --checkpointing,
    which changes no bit, is enough, turn it on. A CPU's memory is not checked: it may swap."""
    if args.device != "cuda":
        return
    from bench import needs, savings  # not above: bench.py imports train.py, which imports this file
    print("planning memory ...")
    free = free_bytes("cuda")
    if max(needs(args).values()) < free:
        return
    if max(needs(args, checkpointing=True).values()) >= free:
        die(f"this would run out of memory, {free / 2**30:.3g} GiB are free; {savings(args)}")
    args.checkpointing = True
    print("--checkpointing is on: training would not fit without it")

def check_folder(flag, path):
    """Refuse a path where no folder is or can be made, or that cannot be written to."""
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        die(f"--{flag} {path}: cannot be made, its name is too long")
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        die(f"--{flag} {path}: {there} is no folder that can be written to")

def seed_suffix(seed):
    """What a folder's name ends in, so that each seed has its own."""
    return f"-{seed}" if seed else ""

def setup(args):
    """Fill in what the flags left open, refuse what cannot work; writes nothing -> the concepts."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        die(f"--device {args.device}: there is none here")
    # torch's first choice on Hopper, where its backward gave NaN or, at FLUX's width, crashed (bad access)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False  # else convolutions of the float32 judges round to TF32
    # accelerate launch: a GPU per process, or gloo on CPUs; a day, since all wait for the one that masks
    PartialState(cpu=args.device == "cpu", timeout=timedelta(days=1))
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    concepts = load_concepts(args)
    args.concept = [concept["name"] for concept in concepts]
    if "min_found" in args and ["nudenet"] in [c["detect"] for c in concepts] and not find_spec("nudenet"):
        die("--concept nudity needs NudeNet for its masks: pip install nudenet")
    if getattr(args, "quantize", None) == "nf4":  # int8's torchao is among the requirements
        if args.device != "cuda":
            die("--quantize nf4: bitsandbytes needs a CUDA GPU, and there is none here; int8 runs on a CPU")
        if args.offload:
            die("--quantize nf4: bitsandbytes' weights cannot wait in main memory; --offload goes without it")
        if not find_spec("bitsandbytes"):
            die("--quantize nf4 needs bitsandbytes: pip install bitsandbytes")
    if args.device == "cuda" and args.dtype == torch.bfloat16:
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            die("--dtype bfloat16: GPUs before Ampere lack it; --dtype float32 takes twice the memory")
    args.size, args.weights = check_model(args)
    if "sample_batch" in args and not args.sample_batch:  # at most 5 megapixels; 25 and 5 divide 25 images
        groups = (5,) if getattr(args, "fewer_images", False) else (25, 5)
        args.sample_batch = next((n for n in groups if n * args.size**2 <= 5 * 1024**2), 1)
    named = f"{Path(args.model).name}-{'+'.join(args.concept)}{seed_suffix(args.seed)}"
    args.out = args.out or Path("out", named)
    if getattr(args, "images", None) and args.images.resolve() == args.out.resolve():
        die(f"--out {args.out}: is --images, and would mix its pictures with ours: use another --out")
    for flag in ("out", "preserve_dir", "report"):
        if path := getattr(args, flag, None):
            check_folder(flag.replace("_", "-"), path)
    n = PartialState().num_processes
    print(f"device: {args.device}, {str(args.dtype)[6:]}" + f", {n} processes" * (n > 1))
    for flag, (name, hub) in HUB.items():
        if hasattr(args, flag):
            beside = Path(args.model) / name
            value = getattr(args, flag) or (str(beside) if beside.exists() else hub)
            on_hub = "://" in value if flag == "sam" else re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value)
            if not (on_hub or Path(value).exists()):
                die(f"--{flag} {value}: is neither a file here nor a hub id or URL")
            setattr(args, flag, value)
            print(f"{flag}: {value}")
    return concepts

# ------------------------------------------------------------------------------------ settings, stages, locks

def read_settings(path, instead):
    """The settings that keep_settings wrote; where the file is missing, cut short or not ours: exit, saying
    what to do instead, or, if instead is None, {}."""
    try:
        return dict(json.loads(path.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return die(f"{path}: cannot be read: {instead}") if instead else {}

def check_settings(path, settings, what, instead="use another --out"):
    """Refuse if the json file, where there is one, was written with other settings; writes nothing."""
    if path.exists():
        made = read_settings(path, instead)
        settings = json.loads(json.dumps(settings, default=str))  # paths and dtypes as the file has them
        for key in sorted(settings.keys() | made.keys(), key=lambda key: ("." in key, key)):  # CONCEPT.x last
            was, now = two = made.get(key), settings.get(key)
            if was != now:
                if isinstance(was, list) and isinstance(now, list):  # show them from the first difference on
                    two = [some[len(os.path.commonprefix(two)):] for some in two]
                was, now = (textwrap.shorten(str(one), 120) for one in two)
                die(f"{what}: was made with {key} = {was}, not {now}: {instead}")

def keep_settings(path, settings, **more):
    """Write a json file of settings, of more that may change from run to run, and of versions and commit."""
    packages = "torch diffusers transformers peft accelerate prodigyopt torchao".split()
    versions = dict(python=sys.version.split()[0]) | {name: version(name) for name in packages}
    # prints nothing unless ROOT itself is a repository; ends in -dirty where files differ from the commit
    git = "git --git-dir .git describe --always --abbrev=40 --dirty --exclude '*'"
    commit = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    record = dict(settings=settings, **more, versions=versions, commit=commit)
    write_text(path, json.dumps(record, indent=1, default=str))

@contextlib.contextmanager
def peak_memory():
    """-> [RSS in bytes at the start, and the most so far, as a thread sees it]; resets CUDA's own peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    process, over = psutil.Process(), threading.Event()
    peak = [process.memory_info().rss] * 2

    def watch():
        while not over.wait(0.005):
            peak[1] = max(peak[1], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()

@contextlib.contextmanager
def stage(name, out):
    """A block of work whose time and peak memory are printed and kept in out/stages.csv: seconds, GiB of RSS
    and of CUDA, forwards. What it has loaded is freed before the next: never two large models at once.
    -> peak_memory's list; the block sets its [2], the number of forward passes."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with peak_memory() as peak:
        peak.append(0)
        yield peak
    free_memory()
    seconds, rss = time.perf_counter() - start, peak[1] / 2**30
    cuda = torch.cuda.max_memory_allocated() / 2**30
    if PartialState().is_main_process:
        print(f"{name}: {seconds:.0f} s, peak {rss:.2f} GiB" + f", on the GPU {cuda:.2f} GiB" * bool(cuda))
        with open(out / "stages.csv", "a") as file:
            file.write(f"{name},{seconds:.2f},{rss:.3f},{cuda:.3f},{peak[2]}\n")

def lock(out):
    """Lock a folder for a with block; refuse one in which another run is at work. A kill unlocks it."""
    out.mkdir(parents=True, exist_ok=True)
    held = FileLock(out / ".lock", blocking=False)
    try:
        mine = held.acquire() if PartialState().is_main_process else contextlib.nullcontext()
    except Timeout:
        die(f"--out {out}: another run is at work in it; wait for it, or use another --out")
    PartialState().wait_for_everyone()  # the others begin once this one has it
    return mine

# ----------------------------------------------------------------------------------------- files and pictures

@contextlib.contextmanager
def atomic(path):
    """A temporary path to write to, renamed to path at the end: neither a kill nor a full disk leaves half a
    file. Makes the folder."""
    half = path.with_suffix(f".{os.getpid()}.tmp")  # two processes may write the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        half.touch()
        mode = half.stat().st_mode
        yield half
        half.chmod(mode)  # safetensors writes files that only their owner can read
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)

def write_text(path, text):
    with atomic(path) as half:
        half.write_text(text, encoding="utf-8", newline="")

def save_image(image, path):
    with atomic(path) as half:
        image.save(half, format="PNG")

def read_image(path):
    """A picture as RGB on white, an X.mask.png as L on black: turned as EXIF says, 16 bits as 8, the first
    frame of an animation. OSError, with the name of PIL's exception, if it cannot be read."""
    mode, ground = ("L", "black") if str(path).endswith(".mask.png") else ("RGB", "white")
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode == "I" and image.format != "PNG":  # a PNG has at most 16 bits
                raise ValueError  # 32 bits: nothing tells which value is white
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # PIL would clip 16 bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert(mode)
    except Exception as error:  # PIL raises many kinds
        raise OSError(f"cannot be read ({type(error).__name__})") from error

def open_or_none(path):
    """read_image's picture; None for one that cannot be read."""
    with contextlib.suppress(OSError):
        return read_image(path)

def open_image(path, size=None, instead="delete it and run the same command again", code=1):
    """read_image's picture; exit, naming it, if it cannot be read or is not of this (width, height)."""
    try:
        image = read_image(path)
    except OSError as error:
        die(f"{path}: {error}; {instead}", code)
    if image.size != (size or image.size):
        die(f"{path}: is {image.size}, not {size}; {instead}", code)
    return image

def square(image, size):
    """Crop square and resize; a pixel of a mask (L) is on if any of those that it covers was."""
    if image.mode == "L":
        some = ImageOps.fit(image.point(lambda v: 255 * (v > 127)), (size, size), Image.Resampling.BOX)
        return some.point(lambda v: 255 * (v > 0))
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)

def contact_sheet(images, path, columns=10, side=96, titles=()):
    """Save images as one picture at path, row by row; titles label the rows."""
    left = max([150, *(8 + 6 * len(title) for title in titles)]) if titles else 0
    sheet = Image.new("RGB", (left + columns * side, -(-len(images) // columns) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        sheet.paste(image.resize((side - 2, side - 2)), (left + i % columns * side, i // columns * side))
    for i, title in enumerate(titles):
        pen.text((4, i * side + side // 2 - 6), title, fill="black")
    save_image(sheet, path)

# ------------------------------------------------------------------------------------------- the frozen model

def text_length(longest, transformer):
    """T5 tokens per prompt: the tokenizer's most; for FLUX.1-schnell, which has no guidance, at most 256."""
    return longest if transformer["guidance_embeds"] else min(longest, 256)

def load_whole(kind, name, **given):
    """kind.from_pretrained(name), but an OSError where it would quietly fill in random weights, or an empty
    vocabulary (which a pipeline's subfolder has elsewhere)."""
    if Path(name).is_dir() and "subfolder" not in given and not has_vocabulary(name):
        raise OSError(f"{name}: holds no tokenizer.json")
    model, found = kind.from_pretrained(name, output_loading_info=True, **given)
    if lost := found["missing_keys"]:
        raise OSError(f"{name}, {kind.__name__}: its weights lack {min(lost)}")
    return model

def encode_prompts(prompts, args):
    """{prompt: (T5 states (T, E), pooled CLIP state (P,))} on the CPU; the encoders are freed on return.
    Refuses a prompt that mentions minors only once put together, as pairs are: their parts passed it."""
    if odd := sorted(prompt for prompt in prompts if minors_in(prompt)):
        die(f"{odd[0]}: mentions minors once put together: mend the concept's file", 1)
    less, where = dict(transformer=None, vae=None), args.model
    if not Path(where).is_dir():  # by name transformers asks the hub again: a minute if offline
        where = FluxPipeline.download(where, revision=args.weights, **less)
    encoders = {part: load_whole(kind, where, subfolder=part, dtype=args.dtype)
                for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel))}
    pipe = FluxPipeline.from_pretrained(where, dtype=args.dtype, **encoders, **less).to(args.device)
    config = FluxTransformer2DModel.load_config(args.model, subfolder="transformer", revision=args.weights)
    length = text_length(pipe.tokenizer_2.model_max_length, config)
    found = {}
    with torch.no_grad():  # encode_prompt does not do it itself
        for prompt in tqdm(sorted(set(prompts)), desc="encode prompts"):
            states, pooled, _ = pipe.encode_prompt(prompt, None, device=args.device,
                                                   max_sequence_length=length)
            found[prompt] = states[0].cpu(), pooled[0].cpu()
    return found

def load_denoiser(args):
    """FluxPipeline without its text encoders: transformer, VAE, scheduler; frozen, on the CPU: place() it."""
    quantized = None
    if args.quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # slow to import
        quantized = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    elif args.quantize == "nf4":
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                       bnb_4bit_compute_dtype=args.dtype)
    quantized = quantized and PipelineQuantizationConfig(quant_mapping=dict(transformer=quantized))
    pipe = FluxPipeline.from_pretrained(args.model, revision=args.weights, text_encoder=None,
                                        text_encoder_2=None, tokenizer=None, tokenizer_2=None,
                                        dtype=args.dtype, quantization_config=quantized)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    return pipe

def place(pipe, args, parts=("transformer", "vae")):
    """Move parts to the device, with --offload one layer at a time; call after add_lora: a LoRA stays."""
    for model in (getattr(pipe, part) for part in parts):
        if not args.offload:
            model.to(args.device)
            continue
        add_hook_to_module(model, AlignDevicesHook(args.device))  # tells the pipeline where to work
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own and not own[0].requires_grad:
                add_hook_to_module(module, AlignDevicesHook(args.device, offload=True))
            elif own:
                module.to(args.device)
    return pipe

# -------------------------------------------------------------------------------------- Step 1 of Algorithm 1

def seed_of(seed, concept, index):
    """The noise seed of a concept's image; the number of images and the other concepts do not matter."""
    return zlib.crc32(f"{seed}/{concept}/{index}".encode())

def generate(pipe, embeds, prompts, seeds, steps, guidance, size):
    """One batch -> list of PIL images, each a function of its own prompt and seed but for rounding."""
    device = pipe._execution_device  # with --offload the weights are elsewhere
    states, pooled = (torch.stack([embeds[p][k] for p in prompts]) for k in (0, 1))  # (B, T, E), (B, P)
    noise = [torch.Generator().manual_seed(s) for s in seeds]
    return pipe(prompt_embeds=states.to(device), pooled_prompt_embeds=pooled.to(device), generator=noise,
                num_inference_steps=steps, guidance_scale=guidance, height=size, width=size).images

def check_set(folder, concept, prompts, count, args, **made_by):
    """Refuse a folder whose images other settings have made -> the settings. count may change; where it is a
    list of the user's own pictures, neither they nor their masks may."""
    if isinstance(count, list):
        files = [path for file, _ in count for path in (file, file.with_suffix(".mask.png"))]
        made_by["own pictures"] = fingerprint(path for path in files if path.exists())
    flags = "weights seed size sample_batch sample_steps sample_guidance dtype quantize".split()
    settings = dict(model=Path(args.model).name, concept=concept, prompts=prompts,
                    **{flag: getattr(args, flag) for flag in flags}, **made_by)
    flag = "preserve-dir" if folder.parent == getattr(args, "preserve_dir", None) else "out"
    # never advise to delete training images: the LoRA that was trained on them would stay as it is
    instead = f"delete {shlex.quote(str(folder))}" if made_by.get("lora") else f"use another --{flag}"
    record = folder / "settings.json"
    if "lora" in made_by and not record.exists() and any(folder.glob("*.png")):  # an evaluation's
        die(f"{folder}: holds pictures, and no settings.json that tells how they were made: {instead}")
    check_settings(record, settings, folder, instead)
    return settings

def plan_sets(concepts, args):
    """-> D_ES's sets, one a concept, and D_PR's, without what is to be forgotten; a set is (folder, concept,
    prompts, count or the user's own pictures). Images of other settings are refused."""
    forget = [(args.out / "forget" / c["name"], c["name"], c["train"], c.get("pictures", args.n_forget))
              for c in concepts]
    folder = args.preserve_dir or args.out / "preserve"
    by_name = sorted(concepts, key=lambda c: c["name"])  # the same D_PR in whatever order they were given
    others = {other: [p for t in c["preserve"] if not mentions(p := t.replace("{}", other), concepts)]
              for c in by_name for other in c["neighbours"] + c["unrelated"]}
    preserve = {name: (folder / name, name, said, args.n_preserve) for name, said in others.items() if said}
    if dropped := [name for name in others if name not in preserve]:
        print(f"to preserve: {len(dropped)} of {len(others)} dropped, they name what is forgotten: " +
              textwrap.shorten(", ".join(dropped), 120))
    if args.preserve and preserve:  # one set for the whole file, with the images of eight concepts
        count = max(len(preserve), 8 * args.n_preserve)
        preserve = {"": (folder / args.preserve.stem, args.preserve.stem, list(preserve), count)}
    if not preserve:
        die("--concept: nothing is left to preserve, all that the files name is to be forgotten")
    sets = (*forget, *preserve.values())
    if len({args.out.resolve(), *(one[0].resolve() for one in sets)}) <= len(sets):
        die(f"--preserve-dir {folder}: is or holds the place of --out or of the forget set: use another one")
    for one in sets:
        check_set(*one, args)
    return forget, list(preserve.values())

def sample_set(load, embeds, folder, concept, prompts, count, args, **made_by):
    """Fill folder with 000.png ... and manifest.json -> [(path, prompt)]; images already there are kept.

    They are drawn in whole groups of args.sample_batch, so that their number cannot change their rounding. Of
    several processes each draws its share: wait for all before reading the images.
    load() gives the pipeline; it is called only if an image is missing. made_by: more settings to record and
    to compare; of these, seeds, one a prompt, take the place of seed_of's.
    """
    world, group, seeds = PartialState(), args.sample_batch, made_by.get("seeds")
    listed = max(count, sum(file.stem.isdigit() for file in folder.glob("*.png")))  # more from an earlier run
    rows = [dict(file=f"{i:03}.png", prompt=prompts[i % len(prompts)],
                 seed=seeds[i % len(seeds)] if seeds else seed_of(args.seed, concept, i),
                 model=args.model, size=args.size) for i in range(-(-listed // group) * group)]
    files = [folder / row["file"] for row in rows[:count]]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # processes, or two runs that share it, may begin at once
        settings = check_set(folder, concept, prompts, count, args, **made_by)
        if not (folder / "settings.json").exists():  # the first images' versions and commit
            keep_settings(folder / "settings.json", settings)
    if world.is_main_process:
        write_text(folder / "manifest.json", json.dumps(rows[:listed], indent=1))
    turn = zlib.crc32(concept.encode())  # sets of one group each do not all fall to the same process
    missing = [i for i in range(0, count, group) if not all(f.exists() for f in files[i:i + group])
               and (i // group + turn) % world.num_processes == world.process_index]
    name = f"sample {folder.parent.name}/{folder.name}"
    for i in tqdm(missing, desc=name, unit=f"{group} images", leave=False, disable=not missing):
        texts, noise = zip(*[(row["prompt"], row["seed"]) for row in rows[i:i + group]])
        images = generate(load(), embeds, texts, noise, args.sample_steps, args.sample_guidance, args.size)
        for image, file in zip(images, files[i:]):
            if not file.exists():
                save_image(image, file)
    return [(file, row["prompt"]) for file, row in zip(files, rows)]

def import_set(folder, concept, prompts, pictures, args):
    """The user's own pictures and masks, cropped square and named as sample_set names its images."""
    rows, settings = [], check_set(folder, concept, prompts, pictures, args)
    if not (folder / "settings.json").exists():
        keep_settings(folder / "settings.json", settings)
    for i, (file, caption) in enumerate(tqdm(pictures, desc="your own images")):
        made = folder / f"{i:03}.png"
        for source, target in ((file, made), (file.with_suffix(".mask.png"), made.with_suffix(".mask.png"))):
            if source.exists() and not target.exists():
                save_image(square(open_image(source, None, MEND), args.size), target)
        rows.append((made, caption))
    return rows

def sample_all(embeds, forget, preserve, args):
    """Step 1 of Algorithm 1 -> D_ES, a list a concept, D_PR, one list, of (path, prompt); and forwards."""
    load = functools.cache(lambda: place(load_denoiser(args), args))  # once, and only if an image is missing
    with PartialState().main_process_first():  # one process copies
        own = [import_set(*one, args) for one in forget if args.images]
    forget = own or [sample_set(load, embeds, *one, args) for one in forget]
    preserve = sum([sample_set(load, embeds, *one, args) for one in preserve], [])
    PartialState().wait_for_everyone()
    shown = sum([found[:16] for found in forget], []) + preserve[::-(-args.n_preserve // 2)]  # two a concept
    if PartialState().is_main_process:
        contact_sheet([open_image(path) for path, _ in shown], args.out / "samples.png", 8)
    groups = torch.tensor([sum(load.cache_info()[:2])], device=PartialState().device)  # a call of load() each
    return forget, preserve, gather(groups).sum().item() * args.sample_batch * args.sample_steps

def main(args):
    forget, preserve = plan_sets(setup(args), args)
    check_plan(args)
    wanted = [p for _, _, prompts, _ in forget + preserve for p in prompts]
    with lock(args.out):
        with stage("prompts", args.out):
            embeds = encode_prompts(wanted, args)
        with stage("sample", args.out) as peak:
            forget, preserve, peak[2] = sample_all(embeds, forget, preserve, args)
    print(f"{args.out}: {sum(map(len, forget))} + {len(preserve)} images; look at samples.png")

if __name__ == "__main__":
    sys.modules["sample"] = sys.modules["__main__"]  # for bench.py, which imports it
    guarded(main, ARGS)
