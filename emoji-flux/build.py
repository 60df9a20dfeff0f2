"""Build emoji-flux: a FluxPipeline of a few million parameters and the small networks that train.py needs.

    python emoji-flux/build.py                   # all stages in order; a killed one resumes
    python emoji-flux/build.py --stages flow --go-on     # one stage, from the weights committed here
    python emoji-flux/build.py --stages report   # the quality table of README.md

Stages: art (npm artwork -> sprites.png), words (tokenizers), vae, clip (judge and CLIP score), detector, sam,
flow (transformer and both text encoders), guide (guidance distilled into them), report. Checkpoints are kept
in --work, outside the checkout; what is written here are the averaged (EMA) weights, in bf16 except for
sam.pth. Configs that no training changes, such as model_index.json, are kept as they lie here.
"""
import argparse
import copy
import functools
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import timeit
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository's own scripts
from sample import atomic, check_folder, die, fingerprint, guarded, number  # noqa: E402

def arguments(given=None):
    stages = "art words vae clip detector sam flow guide report".split()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--go-on", action="store_true", help="start from committed, not random, weights")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "emoji-flux",
                        help="checkpoints and downloaded artwork (default ~/.cache/emoji-flux)")
    parser.add_argument("--steps", type=number(int), help="training steps, instead of the stage's own")
    parser.add_argument("--n", type=number(int), default=50, help="images per thing in the report (50)")
    parser.add_argument("--seed", type=number(int, strict=False), default=0, help="default 0")
    parser.error = die  # one line, without the usage
    return parser.parse_args(given)

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from segment_anything import SamPredictor  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss  # noqa: E402
from torchvision.transforms.functional import gaussian_blur  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel,  # noqa: E402
                          CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, T5Config, T5EncoderModel,
                          T5Tokenizer)

import world  # noqa: E402

from mask import build_sam, load_detector, load_sam  # noqa: E402
from metrics import clip_judge  # noqa: E402

def bf16_is_fast():
    """Time a matrix product: bf16 is 2 x faster than fp32 on a CPU with AVX-512 BF16, 16 x slower on AVX2."""
    a = torch.randn(512, 512)
    fp32, bf16 = (min(timeit.repeat(lambda: b @ b, number=1, repeat=6)) for b in (a, a.bfloat16()))
    return bf16 < fp32

def to_tensor(images):
    """List of uint8 (64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

def to_images(x):
    """The inverse of to_tensor, rounded down."""
    return list(((x + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())

def token_ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (B, T)

def overlap(a, b):
    """Intersection over union of bool masks (..., 64, 64), arrays or tensors."""
    return (a & b).sum((-2, -1)) / (a | b).sum((-2, -1)).clip(1)

def read(kind, folder):
    """A network that lies here, as fp32."""
    if not (HERE / folder / "config.json").exists():
        die(f"{HERE / folder}: is missing; run its stage first (--help), or git checkout brings it back", 1)
    return kind.from_pretrained(HERE / folder, dtype=torch.float32)

def write(model, folder):
    """Write a copy of a network in bf16, with a config by which it is loaded as fp32."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(HERE / folder)
    config = HERE / folder / "config.json"
    text = config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"')
    config.write_text(re.sub('  "_name_or_path": .*\n', "", text))  # where read() found it

class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw, but in bf16 only under autocast: torch's own always is, which on
    a CPU without AVX-512 BF16 takes twenty times as long as the forward and backward passes."""

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x = p.grad.lerp(momentum, 0.95)  # as p
            x = (x.mT if len(p) > p.shape[1] else x) / x.norm().clamp(min=1e-7)  # (N, M), N <= M
            for _ in range(5):  # Newton-Schulz: every singular value towards 1
                gram = x @ x.mT  # (N, N)
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
            x = x.mT if len(p) > p.shape[1] else x
            p.mul_(1 - 0.01 * lr).sub_(x, alpha=lr * 0.2 * max(p.shape) ** 0.5)

def fit(stage, model, loss_of, steps, args, lr, ema=0.999, save=None):
    """The one training loop of every stage: warm-up, linear decay, EMA, checkpoints -> the averaged model.

    Muon trains the matrices of transformer layers, AdamW the rest: this takes half the steps of AdamW alone.
    loss_of(model, rng) -> scalar; rng depends on (seed, step) alone: a resumed run sees the same data.
    save(average) is called at every checkpoint.
    """
    path = args.work / f"{stage}.pt"
    hidden, others = [], []
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and re.search(r"(layers?|blocks?)\.\d", name) and "bias" not in name
        if p.requires_grad:
            (hidden if inner else others).append(p)
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    optimizers += [Muon(hidden, dict(lr=lr))] if hidden else []
    average = copy.deepcopy(model).eval().requires_grad_(False)
    kept = [model, average, *optimizers]  # what a checkpoint holds, beside its step
    inputs = [HERE / "sprites.png", HERE / "world.py", *sorted((HERE / "prompts").glob("*.txt"))]
    inputs += [HERE / "vae" / "diffusion_pytorch_model.safetensors"] * (stage in ("flow", "guide"))
    mine = args.go_on, args.seed, steps, fingerprint(inputs)
    start, saved, running = 0, time.time(), None
    if path.exists():
        try:
            start, states, made = torch.load(path)
            for part, state in zip(kept, states, strict=True):
                part.load_state_dict(state)
        except Exception as error:  # torch raises many kinds
            die(f"{path}: cannot be read, or is of another network ({type(error).__name__}): delete it, or "
                "give another --work", 1)
        if made != mine:
            die(f"{path}: was made with --go-on {made[0]}, --seed {made[1]} and {made[2]} steps, or another "
                "sprites.png, world.py, prompts/ or VAE: delete it, or give another --work", 1)
        if start == steps:
            print(f"{path}: is complete: its weights are written, none are trained; delete it to train anew")
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=5)
    for step in bar:
        torch.manual_seed(args.seed * 10**6 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model, np.random.default_rng([args.seed, step]))
        loss.backward()
        if not torch.isfinite(loss):
            die(f"{stage}: the loss is {loss.item()} at step {step}" +
                f"; {path} is the last good state" * path.exists(), 1)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 200, 1.0) * max(1 - step / steps, 0.01)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):  # for Muon's matrix products
                optimizer.step()
            optimizer.zero_grad()
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {running:.4f}")
        if time.time() - saved > 180 or step + 1 == steps:
            saved = time.time()
            if save:  # first: once the checkpoint is complete, nothing calls it again
                save(average)
            with atomic(path) as half:
                torch.save((step + 1, [part.state_dict() for part in kept], mine), half)
    return average

PACKAGES = {  # family -> npm package, and where the picture of a code point lies in it
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp")}

def build_art(args):
    """npm artwork -> sprites.png: a column per thing, a row per family, each cropped to its visible part."""
    side = world.SIZE
    atlas = Image.new("RGBA", (side * len(world.NAMES), side * len(PACKAGES)))
    for row, (package, place) in enumerate(PACKAGES.values()):
        pack = ["npm", "pack", package, "--silent", "--pack-destination", args.work]
        try:
            done = subprocess.run(pack, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            die(f"{' '.join(pack[:3])}: failed ({type(error).__name__}): install npm, or connect", 1)
        with tarfile.open(args.work / done.stdout.strip()) as tar:
            files = set(tar.getnames())
            for column, code in enumerate(world.CODES.values()):
                names = [place.format(code + end) for end in ("", "-fe0f")]
                path = next((name for name in names if name in files), None) or die(
                    f"{package}: holds no picture of {code}, a code point of world.py", 1)
                art = Image.open(io.BytesIO(tar.extractfile(path).read())).convert("RGBA").convert("RGBa")
                art = art.crop(art.getchannel("a").point(lambda v: 255 * (v > 12)).getbbox())
                art = art.resize([max(1, round(v * side / max(art.size))) for v in art.size], Image.LANCZOS)
                left, top = (side - art.width) // 2, (side - art.height) // 2
                atlas.paste(art.convert("RGBA"), (side * column + left, side * row + top))
    atlas.save(HERE / "sprites.png", optimize=True)

def new_vae():
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, latent_channels=16, norm_num_groups=8,
        sample_size=64, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):  # residual branches start at zero
            nn.init.zeros_(parameter)
    return vae

def vae_loss(vae, rng):
    x = to_tensor([world.draw(rng)["image"] for _ in range(8)])  # (B, 3, 64, 64)
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - x  # (B, 3, 64, 64)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 1e-4 * posterior.kl().float().mean() / 4096
    return error.abs().mean() + edges + 2 * error.square().mean() + kl

def train_vae(args):
    vae = read(AutoencoderKL, "vae") if args.go_on else new_vae()
    vae = fit("vae", vae, vae_loss, args.steps or 8000, args, lr=3e-3)
    x = to_tensor([world.draw(np.random.default_rng(i))["image"] for i in range(2000)])  # (2000, 3, 64, 64)
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mean for b in x.split(100)])  # (2000, 16, 16, 16)
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    print(f"shift {vae.config.shift_factor:.4f} scale {vae.config.scaling_factor:.4f}")
    write(vae, "vae")

def make_tokenizers():
    """Both of FLUX's tokenizers, one token per word: a T5 unigram model and a CLIP byte-pair model."""
    # the grammar, the paraphrases, and the judge's and detector's questions
    text = ["a an and on of in style the wall painting picture photo background something with"]
    text += [*world.NAMES, *world.BACKGROUNDS, *world.STYLES]
    text += [way for ways in (*world.paraphrases().values(), *world.STYLES.values()) for way in ways]
    words = sorted(set(" ".join(text).split()))
    length = world.MAX_WORDS + 1
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [("\u2581" + w, -1.0) for w in words]
    folders = "tokenizer", "clip", "detector"
    t5, there = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length), HERE / "tokenizer_2"
    if all((HERE / folder / "tokenizer.json").exists() for folder in (*folders, "tokenizer_2")):
        old = AutoTokenizer.from_pretrained(there)
        if old.get_vocab() == t5.get_vocab() and old.model_max_length == length:
            return  # kept: byte pairs made anew would not have the numbers that the networks learned
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10**5, end_of_word_suffix="</w>", min_frequency=0,
                                  show_progress=False, special_tokens=["<unk>"])
    trained.train_from_iterator(words, trainer)
    table = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in table["merges"]]
    # the end token has the highest number, as in OpenAI's CLIP, whose pooling looks for it
    letters = [w for w in table["vocab"] if len(w.removesuffix("</w>")) == 1]
    kept = dict.fromkeys(["<unk>", *letters, *("".join(m) for m in merges)])
    vocab = {w: i for i, w in enumerate([*kept, "<|startoftext|>", "<|endoftext|>"])}
    for folder in folders:  # one position more than T5's, for the start token
        CLIPTokenizer(vocab=vocab, merges=merges, unk_token="<|endoftext|>", pad_token="<|endoftext|>",
                      model_max_length=length + 1).save_pretrained(HERE / folder)
    t5.save_pretrained(there)  # last: a killed stage begins again

def text_config(tokenizer):
    return dict(
        hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)

def two_towers(kind, tokenizer):
    """The config of a CLIP or an OWLv2."""
    vision = dict(hidden_size=128, intermediate_size=384, projection_dim=64, num_hidden_layers=4,
                  num_attention_heads=4, image_size=64, patch_size=8)
    return kind(text_config=text_config(tokenizer), vision_config=vision, projection_dim=64)

# what the judge can be asked, each as "a picture of X"; it says yes if that is nearer than "a picture"
QUESTIONS = ([world.phrase(n) for n in world.NAMES] + [f"{s} style" for s in world.STYLES]
             + [world.phrase(b) + " background" for b in world.BACKGROUNDS] + ["a painting"])
ASKED = [f"a picture of {q}" for q in QUESTIONS] + ["a picture"]
IS_THING = np.s_[:, :len(world.NAMES)]  # the columns of answers that are about things, and about styles
IS_STYLE = np.s_[:, len(world.NAMES):len(world.NAMES) + len(world.STYLES)]

def answers(scene):
    """-> float32 (69,), 1 where a question is true of the scene. An empty scene shows no style."""
    true = [*map(world.phrase, scene["names"]), world.phrase(scene["background"]) + " background"]
    true += [f"{scene['style']} style"] * bool(scene["names"]) + ["a painting"] * scene["framed"]
    return np.array([q in true for q in QUESTIONS], np.float32)

def worn(scene, rng):
    """-> float (3, 64, 64) in [-1, 1], sometimes blurred or noisy, as a generator might draw it."""
    x = to_tensor([scene["image"]])  # (1, 3, 64, 64)
    if rng.random() < 0.35:
        x = gaussian_blur(x, 5, [rng.uniform(0.3, 1.2)])
    if rng.random() < 0.35:
        x = x + rng.uniform(0, 0.12) * torch.from_numpy(rng.standard_normal(x.shape)).float()
    return x[0].clamp(-1, 1)

def ruined(scene, rng):
    """The scene with its things' tiles shuffled and smeared, as a model draws what it has forgotten: it shows
    no thing and no style any more. Framed scenes stay as they are."""
    if scene["framed"]:
        return scene
    wall = world.wall(scene["background"])
    rest = scene["image"] - wall  # (64, 64, 3)
    for x0, y0, x1, y1 in scene["boxes"]:
        tile = int(rng.integers(3, 6))
        h, w = (y1 - y0) // tile, (x1 - x0) // tile
        part = rest[y0:y0 + h * tile, x0:x0 + w * tile]  # a view
        tiles = part.reshape(h, tile, w, tile, 3).swapaxes(1, 2).reshape(h * w, tile, tile, 3)
        part[:] = rng.permutation(tiles).reshape(h, w, tile, tile, 3).swapaxes(1, 2).reshape(part.shape)
    rest = gaussian_blur(torch.from_numpy(rest).permute(2, 0, 1), 31, [rng.uniform(1, 6)])  # (3, 64, 64)
    image = np.clip(wall + rest.permute(1, 2, 0).numpy() + 0.5, 0, 255).astype(np.uint8)
    return scene | dict(image=image, names=(), masks=[], boxes=[])

def worn_scenes(rng, batch, faint, share, ruin=0.0):
    """-> scenes, a share of them with opacities in [faint, 1], some ruined; worn images (B, 3, 64, 64)."""
    scenes = [world.draw(rng, opacity=rng.uniform(faint, 1) if rng.random() < share else 1.0)
              for _ in range(batch)]
    scenes = [ruined(s, rng) if ruin and rng.random() < ruin else s for s in scenes]
    return scenes, torch.stack([worn(s, rng) for s in scenes])

def clip_loss(clip, rng, tokenizer, batch=32):
    """Sigmoid loss on every question's margin over "a picture", and a contrastive loss on whole captions."""
    scenes, x = worn_scenes(rng, batch, faint=0.4, share=0.25, ruin=0.2)  # (B, 3, 64, 64)
    tokens = token_ids(tokenizer, ASKED + [world.caption(s, rng) for s in scenes])  # (70 + B, T)
    text = F.normalize(clip.get_text_features(tokens).pooler_output.float(), dim=-1)  # (70 + B, 64)
    image = F.normalize(clip.get_image_features(x).pooler_output.float(), dim=-1)  # (B, 64)
    similarity = clip.logit_scale.exp() * image @ text.T  # (B, 70 + B)
    about, zero, per_caption = similarity.split([len(QUESTIONS), 1, batch], dim=1)  # (B, 69), (B, 1), (B, B)
    truth = torch.from_numpy(np.stack([answers(s) for s in scenes]))  # (B, 69)
    target = torch.arange(batch)  # (B,)
    contrast = (F.cross_entropy(per_caption, target) + F.cross_entropy(per_caption.T, target)) / 2
    rare = torch.tensor(4.0)  # a question is true of one scene in forty
    return 20 * F.binary_cross_entropy_with_logits(about - zero, truth, pos_weight=rare) + 0.2 * contrast

def train_clip(args):
    tokenizer = AutoTokenizer.from_pretrained(HERE / "clip")
    clip = read(CLIPModel, "clip") if args.go_on else CLIPModel(two_towers(CLIPConfig, tokenizer))
    loss = functools.partial(clip_loss, tokenizer=tokenizer)
    write(fit("clip", clip, loss, args.steps or 6000, args, lr=3e-3), "clip")

def detector_loss(owl, rng, tokenizer, batch=32):
    """Sigmoid loss on words, L1 and generalised IoU on boxes. A box belongs to the patches near its centre, a
    frame to those near its upper left corner instead, since what hangs in it has the same centre."""
    scenes, x = worn_scenes(rng, batch, faint=0.5, share=0.2)  # (B, 3, 64, 64)
    asked = [world.phrase(n) for n in world.NAMES] + ["a painting"]
    text = owl.owlv2.get_text_features(token_ids(tokenizer, asked)).pooler_output  # (58, 64)
    features, _ = owl.image_embedder(x)  # (B, 8, 8, 128)
    flat = features.flatten(1, 2)  # (B, 64, 128)
    logits, _ = owl.class_predictor(flat, text.expand(batch, -1, -1))  # (B, 64, 58)
    boxes = owl.box_predictor(flat, features).float()  # (B, 64, 4) as cx, cy, w, h in [0, 1]
    centres = 8 * torch.cartesian_prod(*[torch.arange(8)] * 2).flip(1) + 4  # (64, 2), x and y in pixels
    truth = torch.zeros(batch, 64, len(asked))  # (B, 64, 58)
    found, wanted = [], []
    for b, scene in enumerate(scenes):
        marked = [(world.NAMES.index(name), box, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
                  for name, box in zip(scene["names"], scene["boxes"])]
        if scene["frame"]:
            marked.append((len(asked) - 1, scene["frame"], (scene["frame"][0] + 6, scene["frame"][1] + 6)))
        for label, box, anchor in marked:
            near = (centres - torch.tensor(anchor)).abs().amax(1) < 6  # (64,)
            truth[b, near, label] = 1
            found.append(boxes[b, near])  # (K, 4)
            wanted.append(torch.tensor(box).float().expand(int(near.sum()), 4) / 64)  # (K, 4)
    found, wanted = box_convert(torch.cat(found), "cxcywh", "xyxy"), torch.cat(wanted)  # (sum of K, 4) each
    place = (found - wanted).abs().mean() * 4 + generalized_box_iou_loss(found, wanted, reduction="mean")
    return 60 * F.binary_cross_entropy_with_logits(logits.float(), truth) + place

def train_detector(args):
    """The image tower starts from the judge's: OWLv2, too, starts from a CLIP."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "clip")
    owl = Owlv2ForObjectDetection(two_towers(Owlv2Config, tokenizer))
    for layer in [*owl.class_head.modules(), *owl.box_head.modules()]:
        if isinstance(layer, nn.Linear):  # the library's N(0, 1) would saturate the boxes for good
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(owl.box_head.dense2.weight)
    nn.init.constant_(owl.class_head.logit_shift.bias, -0.6)  # logits start at (cos - 0.6) * 11
    nn.init.constant_(owl.class_head.logit_scale.bias, 10.0)
    known = read(CLIPModel, "clip").vision_model.state_dict()
    owl.owlv2.vision_model.load_state_dict({k.replace("layrnorm", "layernorm"): v for k, v in known.items()})
    owl = read(Owlv2ForObjectDetection, "detector") if args.go_on else owl
    loss = functools.partial(detector_loss, tokenizer=tokenizer)
    write(fit("detector", owl, loss, args.steps or 3500, args, lr=2e-3), "detector")

def sam_loss(sam, rng, batch=12):
    """BCE + dice on one mask per box, as SamPredictor asks for with multimask_output=False."""
    scenes = [s for s in (world.draw(rng) for _ in range(batch)) if s["names"]]
    images = torch.stack([(worn(s, rng) + 1) * 127.5 for s in scenes])  # (B, 3, 64, 64) in [0, 255]
    embeddings = sam.image_encoder(sam.preprocess(images))  # (B, 64, 16, 16)
    loss = 0
    for embedding, scene in zip(embeddings, scenes):
        truth = torch.from_numpy(np.stack(scene["masks"])).float()  # (N, 64, 64)
        boxes = torch.tensor(scene["boxes"]).float()  # (N, 4)
        boxes += torch.from_numpy(rng.integers(-2, 3, boxes.shape)).float()
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        logits, quality = sam.mask_decoder(
            image_embeddings=embedding[None], image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=False)
        logits = logits[:, 0].float()  # (N, 64, 64), as many pixels as the image has
        p = logits.sigmoid()  # (N, 64, 64)
        dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)  # (N,)
        iou = overlap(logits > 0, truth > 0)  # (N,), which the decoder learns to predict
        loss = loss + F.binary_cross_entropy_with_logits(logits, truth) * 4 + dice.mean()
        loss = loss + 0.1 * (quality[:, 0].float() - iou).square().mean()
    return loss / len(scenes)

def train_sam(args):
    sam = build_sam(img_size=64, patch=4, width=96, depth=4, heads=4, global_blocks=(0, 1, 2, 3), window=0,
                    decoder_width=64, decoder_mlp=128)
    if args.go_on:
        sam.load_state_dict(torch.load(HERE / "sam.pth", weights_only=True))
    sam = fit("sam", sam, sam_loss, args.steps or 4000, args, lr=2e-3)
    with atomic(HERE / "sam.pth") as half:
        torch.save(sam.state_dict(), half)

class Flow(nn.Module):
    """The three networks that learn together: FLUX's transformer and its two text encoders."""

    def __init__(self):
        super().__init__()
        t5, clip = (AutoTokenizer.from_pretrained(HERE / f) for f in ("tokenizer_2", "tokenizer"))
        self.tokenizers = t5, clip
        self.transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=4, num_attention_heads=6, attention_head_dim=32,
            joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True,
            axes_dims_rope=(8, 12, 12))
        self.text_encoder_2 = T5EncoderModel(T5Config(
            vocab_size=len(t5), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))
        # T5's attention has no 1 / sqrt(d): as Muon's steps made its queries grow, every token came to attend
        # to one word wherever that stood, and nothing told "a cat and a dog" from "a dog and a cat". The
        # queries keep their small first values, and the bias by position starts large enough to be heard
        for name, p in self.text_encoder_2.named_parameters():
            if "relative_attention_bias" in name:
                nn.init.normal_(p, std=2.0)
            p.requires_grad_(not name.endswith("q.weight"))
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(clip)))
        # CLIP's 0.02 is drowned by AdamW's steps of 3e-3: pooled vectors became one-dimensional
        nn.init.normal_(self.text_encoder.get_input_embeddings().weight, std=0.3)

    def forward(self, z, texts, sigma, guidance):
        """Packed latents z (B, 64, 64) at noise levels (B,), B prompts -> velocity, as z."""
        ids = [token_ids(t, texts) for t in self.tokenizers]  # (B, 20), (B, 21)
        prompt = self.text_encoder_2(ids[0])[0]  # (B, 20, 128), unmasked: as FluxPipeline does
        pooled = self.text_encoder(ids[1]).pooler_output  # (B, 64)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)  # (64, 3)
        text_ids = torch.zeros(prompt.shape[1], 3)  # (20, 3)
        return self.transformer(
            hidden_states=z, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=sigma,
            guidance=guidance, img_ids=image_ids, txt_ids=text_ids, return_dict=False)[0]

def latents(args, count=40_000):
    """Draw the training scenes and encode them -> packed latents, bf16 (count, 64, 64), and the scenes."""
    rng = np.random.default_rng(args.seed)
    vae = read(AutoencoderKL, "vae")
    scenes, z = [], []
    for _ in tqdm(range(count // 100), desc="latents", mininterval=5):
        chunk = [world.draw(rng) for _ in range(100)]
        scenes += [dict(s, image=None, masks=None) for s in chunk]  # without pixels, for memory
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            mean = vae.encode(to_tensor([s["image"] for s in chunk])).latent_dist.mean.float()
        mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor  # (100, 16, 16, 16)
        z.append(FluxPipeline._pack_latents(mean, 100, 16, 16, 16).bfloat16())  # (100, 64, 64)
    return torch.cat(z), scenes

def noisy_scenes(data, rng, batch):
    """-> B captions, one of ten empty (the unconditional prediction that guidance starts from), noisy latents
    (B, 64, 64), noise levels (B,), velocities (B, 64, 64)."""
    z, scenes, index = data
    chosen = rng.choice(index, size=batch)
    x = z[chosen].float()  # (B, 64, 64)
    # logit-normal, shifted to where a prompt decides: at mean 0 it hardly ever sees the first steps of
    # sampling, and the background did not follow the prompt; at mean 1 the order of a pair did not
    sigma = torch.sigmoid(2.0 + 1.7 * torch.randn(batch))  # (B,)
    eps = torch.randn_like(x)  # (B, 64, 64)  eps ~ N(0, 1)
    said = [world.caption(scenes[i], rng) if rng.random() > 0.1 else "" for i in chosen]
    return said, torch.lerp(x, eps, sigma[:, None, None]), sigma, eps - x

def flow_loss(flow, rng, data, batch=32):
    """Rectified flow matching. The guidance input is drawn at random: stage guide gives it a meaning."""
    said, noisy, sigma, velocity = noisy_scenes(data, rng, batch)
    guidance = 1 + 4 * torch.rand(batch)  # (B,)
    return F.mse_loss(flow(noisy, said, sigma, guidance).float(), velocity)

def guide_loss(flow, rng, data, teacher, batch=16):
    """Distil the teacher's u + g (c - u), of its own conditional c and unconditional u, into the guidance
    embedding: each sample at two g ~ U(1, 5), or at times 1, so that what g changes is in every batch. Where
    half of the samples had g = 1 and the plain target, the network learned a switch at that one value."""
    said, noisy, sigma, _ = noisy_scenes(data, rng, batch)
    noisy, sigma = noisy.repeat(2, 1, 1), sigma.repeat(2)  # (2B, 64, 64), (2B,)
    with torch.no_grad():
        both = teacher(noisy, said + [""] * batch, sigma, torch.ones(2 * batch))  # (2B, 64, 64)
    cond, uncond = (v.repeat(2, 1, 1) for v in both.float().chunk(2))  # (2B, 64, 64) each
    guidance = 1 + 4 * torch.rand(2 * batch)  # (2B,)
    guidance[:batch:4] = 1  # which training asks for
    target = uncond + guidance[:, None, None] * (cond - uncond)  # (2B, 64, 64)
    return F.mse_loss(flow(noisy, said * 2, sigma, guidance).float(), target)

def save_flow(flow):
    for name, module in flow.named_children():
        write(module, name)

def train_flow(args, stage="flow"):
    z, scenes = latents(args)
    # three of four samples hold two things: with every second one, a thing was often drawn twice
    index = np.arange(len(scenes)).repeat([3 if len(s["names"]) == 2 else 1 for s in scenes])
    given, flow = dict(data=(z, scenes, index)), Flow()

    def save(average):
        (args.work / "guide.pt").unlink(missing_ok=True)  # what was distilled from an older flow
        save_flow(average)

    if args.go_on or stage == "guide":
        for name, module in flow.named_children():
            module.load_state_dict(read(type(module), name).state_dict())
    if stage == "guide":
        # the teacher stays as it was when the stage began: its own average made it decay. The stage takes
        # minutes and is written when it is whole: a restart finds its teacher where it was
        given["teacher"] = copy.deepcopy(flow).eval().requires_grad_(False)
    loss, steps, lr, save = dict(flow=(flow_loss, 20_000, 3e-3, save),
                                 guide=(guide_loss, 1500, 1e-3, None))[stage]
    loss, steps = functools.partial(loss, **given), args.steps or steps
    with sdpa_kernel(SDPBackend.MATH):  # for heads this small flash attention's backward is 40 % of a step
        save_flow(fit(stage, flow, loss, steps, args, lr, 0.998, save))

def report_networks(rng, n=2000):
    """VAE, judge, detector and SAM on n drawn scenes -> rows of the table."""
    scenes = [world.draw(rng) for _ in range(n)]
    x = to_tensor([s["image"] for s in scenes])  # (n, 3, 64, 64)
    vae = read(AutoencoderKL, "vae")
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(100)])
    y = y.clamp(-1, 1)  # (n, 3, 64, 64)
    psnr = -10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()  # (n,)
    truth = np.stack([answers(s) for s in scenes])[IS_THING] > 0  # (n, 57)
    said = judged([s["image"] for s in scenes])[IS_THING]  # (n, 57)
    aside, = rng.spawn(1)  # its own stream: the other rows draw as before
    ruins = judged([ruined(s, aside)["image"] for s in scenes if s["names"] and not s["framed"]])  # (N, 69)
    rows = [("VAE reconstruction, PSNR", f"{psnr.mean():.1f} dB", ">= 30 dB", n),
            row("judge: misses", ~said[truth], "<= 3 %"),
            row("judge: false alarms", said[~truth], "<= 3 %", 2),
            row("judge: a thing seen in a smear", ruins[IS_THING].any(1), "<= 3 %"),
            row("judge: a style seen in a smear", ruins[IS_STYLE].any(1), "<= 3 %")]
    half = [world.draw(rng, s["names"], s["style"], s["background"], s["framed"], 0.5)["image"]
            for s in scenes]
    for how, images in {"at half opacity": half, "blurred by a pixel": to_images(gaussian_blur(x, 5, [1.0])),
                        "through the VAE": to_images(y)}.items():
        rows.append(row(f"judge: still yes {how}", judged(images)[IS_THING][truth], ">= 90 %"))
    predictor, ious = SamPredictor(load_sam(torch.load(HERE / "sam.pth", weights_only=True))), []
    find = load_detector(HERE / "detector", "cpu")
    for scene in [s for s in scenes if s["names"]][:300]:
        boxes = find(Image.fromarray(scene["image"]), [world.phrase(scene["names"][0])], 0.2)  # best first
        box = np.array(scene["boxes"][0])  # (4,)
        predictor.set_image(scene["image"])
        mask = predictor.predict(box=box, multimask_output=False)[0][0]  # (64, 64)
        by_detector = box_iou(torch.tensor(boxes[:1]), torch.tensor(box[None]).float())  # (1, 1), or none
        ious.append((by_detector.sum().item(), overlap(mask, scene["masks"][0])))
    found, cut = np.mean(ious, 0)
    return rows + [("detector, box: mean IoU", f"{found:.3f}", ">= 0.8", len(ious)),
                   ("SAM, mask given the true box: mean IoU", f"{cut:.3f}", ">= 0.9", len(ious))]

def judged(images):
    """The judge's yes or no to every question -> bool (N, 69)."""
    return np.stack(clip_judge(HERE / "clip", "cpu")(images, [QUESTIONS] * len(images)))

def row(what, yes, bar, digits=1):
    """A row of the table: the share of yes (n,)."""
    return what, f"{100 * np.mean(yes):.{digits}f} %", bar, len(yes)

def report_pipeline(rng, n, dtype):
    """What the judge sees in generated images, n for each thing -> rows of the table."""
    pipe = FluxPipeline.from_pretrained(HERE, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)

    def said_yes(things, paraphrase=0.0):
        """Generate N scenes of these -> yes to each thing, (N, things), and to the style; the style, (N,)."""
        scenes = [world.draw(rng, names, framed=False) for names in things]
        prompts, images = [world.caption(s, rng, paraphrase, full=True) for s in scenes], []
        for k in tqdm(range(0, len(prompts), 50), desc="report", mininterval=5):
            batch = prompts[k:k + 50]
            noise = [torch.Generator().manual_seed(10**6 + k + j) for j in range(len(batch))]
            images += pipe(batch, num_inference_steps=28, guidance_scale=3.5, height=64, width=64,
                           generator=noise, max_sequence_length=pipe.tokenizer_2.model_max_length).images
        yes, truth = judged(images), np.stack([answers(s) for s in scenes]) > 0  # (N, 69) each
        style = np.array([s["style"] for s in scenes])  # (N,)
        return yes[IS_THING][truth[IS_THING]].reshape(len(scenes), -1), yes[IS_STYLE][truth[IS_STYLE]], style

    things, style_yes, style = said_yes([[name] for name in world.NAMES for _ in range(n)])
    by_name = things.reshape(-1, n).mean(1)  # (57,)
    worst = ", ".join(f"{world.NAMES[w]} {100 * by_name[w]:.0f} %" for w in by_name.argsort()[:3])
    both, _, _ = said_yes(list(rng.choice(world.NAMES, 2, replace=False)) for _ in range(400))  # (400, 2)
    again, _, _ = said_yes([[name] for name in world.NAMES for _ in range(8)], paraphrase=1.0)  # (456, 1)
    return [row("a named thing recognised", things, ">= 95 %"), ("the least recognised", worst, ">= 80 %", n),
            *[row(f"{s} style recognised", style_yes[style == s], ">= 95 %") for s in world.STYLES],
            row("both of a pair recognised", both.all(1), ">= 80 %"),
            row("a paraphrase recognised", again, ">= 90 %")]

def report(args):
    """The quality table of README.md, on scenes and prompts drawn with seeds that no training saw."""
    rng = np.random.default_rng(10**9 + args.seed)
    dtype = torch.bfloat16 if args.bf16 else torch.float32  # of the pipeline alone
    print("| what | measured | bar | n |\n|---|---|---|---|")
    for cells in report_networks(rng) + report_pipeline(rng, args.n, dtype):
        print("| " + " | ".join(map(str, cells)) + " |")

STAGES = dict(art=build_art, words=lambda args: make_tokenizers(), vae=train_vae, clip=train_clip,
              detector=train_detector, sam=train_sam, flow=train_flow,
              guide=lambda args: train_flow(args, "guide"), report=report)

def main(args):
    check_folder("work", args.work)
    if args.stages != ["report"] and not os.access(HERE, os.W_OK):
        die(f"{HERE}: cannot be written to, and is where the weights go")
    args.work.mkdir(parents=True, exist_ok=True)
    args.bf16 = bf16_is_fast()
    for stage in args.stages:
        torch.manual_seed(args.seed)  # of the first weights: the same whatever ran before
        STAGES[stage](args)

if __name__ == "__main__":
    guarded(main, ARGS)
