"""Build emoji-flux, a FluxPipeline of a few million parameters and the small networks that train.py needs beside it.

    python emoji-flux/build.py                      # every stage in order; each goes on where it was killed
    python emoji-flux/build.py --stages flow        # one stage; with no checkpoint in --work it starts from the
                                                    # weights committed here, a fresh optimiser and a warm-up
    python emoji-flux/build.py --stages report      # the quality table of README.md

Stages: art (npm artwork -> sprites.png), vae, clip (judge and CLIP score), detector (OWLv2), sam, flow (transformer
and both text encoders, guidance distilled in), report. Checkpoints live in --work, outside the checkout; what is
committed is the averaged (EMA) weights, in bf16.
"""
import argparse
import copy
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from segment_anything import SamPredictor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm
from transformers import (AutoProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel,
                          CLIPTokenizer, CLIPVisionConfig, Owlv2Config, Owlv2ForObjectDetection,
                          Owlv2ImageProcessor, Owlv2Processor, Owlv2TextConfig, Owlv2VisionConfig, T5Config,
                          T5EncoderModel, T5Tokenizer)

import world

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository's own scripts
from mask import build_sam, detect, load_sam  # noqa: E402


def bf16_is_fast():
    """Time one matrix product: bf16 is 2 x faster than fp32 on a CPU with AVX-512 BF16, 16 x slower on AVX2."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 1024).to(dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def to_tensor(images):
    """list of uint8 (64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(stage, model, loss_of, steps, args, lr, warmup=200, ema=0.999, save=None):
    """The one training loop of every stage: Muon for the matrices of transformer layers and AdamW for the rest,
    warm-up, linear decay, EMA, checkpoints. Muon halves the steps that AdamW needs here.

    loss_of(model, average, step, rng) -> scalar loss; rng depends on (seed, step) alone, so a resumed run sees the same data.
    Returns the averaged model. save(averaged) is called at every checkpoint.
    """
    path = args.work / f"{stage}.pt"
    inner = {n for n, p in model.named_parameters() if p.ndim == 2 and re.search(r"(layers|blocks)\.\d", n)}
    hidden = [p for n, p in model.named_parameters() if n in inner]
    others = [p for n, p in model.named_parameters() if n not in inner]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    base = [[group["lr"] for group in o.param_groups] for o in optimizers]
    average = copy.deepcopy(model).eval().requires_grad_(False)
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for o, s in zip(optimizers, state["optimizers"]):
            o.load_state_dict(s)
        start, spent = state["step"], state["seconds"]
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=stage, mininterval=5)
    clock = saved = time.time()
    running = None
    for step in bar:
        scale = min((step + 1) / warmup, 1.0) * max(1 - step / steps, 0.01)
        for o, rates in zip(optimizers, base):
            for group, rate in zip(o.param_groups, rates):
                group["lr"] = rate * scale
        torch.manual_seed(args.seed * 10**6 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model, average, step, np.random.default_rng([args.seed, step]))
        loss.backward()
        if not torch.isfinite(loss):
            sys.exit(f"{stage}: the loss is {loss.item()} at step {step}; {path} is the last good state")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        decay = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_([p for p in average.parameters()], [p.detach() for p in model.parameters()], 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix_str(f"loss {running:.4f}")
        if time.time() - saved > 180 or step + 1 == steps:
            saved = time.time()
            state = dict(model=model.state_dict(), average=average.state_dict(), step=step + 1,
                         optimizers=[o.state_dict() for o in optimizers], seconds=spent + saved - clock)
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            if save:
                save(average)
            print(f"{stage} step {step + 1} loss {running:.4f} {state['seconds'] / 60:.1f} min", flush=True)
    return average


# ---------------------------------------------------------------------------------------------------- artwork

PACKAGES = {  # family -> npm package, and where the picture of a code point lies in it
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp")}


def build_art(args):
    """npm artwork -> sprites.png: one column a thing, one row a family, each cut to what is visible of it."""
    side = world.SIZE
    atlas = Image.new("RGBA", (side * len(world.NAMES), side * len(PACKAGES)))
    for row, (package, place) in enumerate(PACKAGES.values()):
        name = subprocess.run(["npm", "pack", package, "--silent", "--pack-destination", args.work], check=True,
                              capture_output=True, text=True).stdout.strip()
        with tarfile.open(args.work / name) as tar:
            files = set(tar.getnames())
            for column, code in enumerate(world.CODES.values()):
                path = next(p for p in (place.format(code), place.format(code + "-fe0f")) if p in files)
                art = Image.open(io.BytesIO(tar.extractfile(path).read())).convert("RGBA").convert("RGBa")
                art = art.crop(art.getchannel("a").point(lambda v: 255 * (v > 12)).getbbox())
                art = art.resize([max(1, round(v * side / max(art.size))) for v in art.size], Image.LANCZOS)
                atlas.paste(art.convert("RGBA"), (side * column + (side - art.width) // 2,
                                                  side * row + (side - art.height) // 2))
    atlas.save(HERE / "sprites.png", optimize=True)


# ---------------------------------------------------------------------------------------------------- VAE

def new_vae():
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):  # residual branches start at zero
            nn.init.zeros_(parameter)
    return vae


def vae_loss(vae, average, step, rng):
    x = to_tensor([world.draw(rng)["image"] for _ in range(8)])
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    error = y - x  # (B, 3, 64, 64)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + edges + 2 * error.square().mean() + 1e-4 * posterior.kl().float().mean() / 4096


def train_vae(args):
    vae = fit("vae", new_vae(), vae_loss, args.steps or 8000, args, lr=3e-3)
    x = to_tensor([world.draw(np.random.default_rng(i))["image"] for i in range(2000)])
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mean for b in x.split(100)])  # (2000, 16, 16, 16)
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    print(f"shift {vae.config.shift_factor:.4f} scale {vae.config.scaling_factor:.4f}")
    vae.to(torch.bfloat16).save_pretrained(HERE / "vae")


# ---------------------------------------------------------------------------------------------------- words

def words():
    """Every word of the grammar, of the paraphrases and of the judge's and detector's questions, sorted."""
    text = ["a an and on of in style the wall painting picture photo background something with"]
    text += [*world.NAMES, *world.BACKGROUNDS, *world.STYLES]
    text += [line for lines in world.paraphrases().values() for line in lines]
    text += [way for ways in world.STYLES.values() for way in ways]
    return sorted(set(" ".join(text).split()))


def make_tokenizers():
    """Both of FLUX's tokenizers with one token a word: a T5 unigram model and a CLIP byte-pair model."""
    length = world.MAX_WORDS + 1
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [("\u2581" + w, -1.0) for w in words()]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=length).save_pretrained(HERE / "tokenizer_2")
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(words(), trainers.BpeTrainer(
        vocab_size=10**5, end_of_word_suffix="</w>", min_frequency=0, show_progress=False, special_tokens=["<unk>"]))
    table = json.loads(trained.to_str())["model"]
    merges = [tuple(m) for m in table["merges"]]
    # the end token has the highest number, as in OpenAI's CLIP, whose pooling looks for it
    letters = [w for w in table["vocab"] if len(w.removesuffix("</w>")) == 1]
    kept = dict.fromkeys(["<unk>", *letters, *("".join(m) for m in merges)])
    vocab = {w: i for i, w in enumerate([*kept, "<|startoftext|>", "<|endoftext|>"])}
    # two positions more than T5's, for the start and end tokens
    for folder in ("tokenizer", "clip"):
        CLIPTokenizer(vocab=vocab, merges=merges, unk_token="<|endoftext|>", pad_token="<|endoftext|>",
                      model_max_length=length + 1).save_pretrained(HERE / folder)


def text_config(kind, tokenizer, width, layers):
    return kind(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=64,
                num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)


def vision_config(kind, layers):
    return kind(hidden_size=128, intermediate_size=384, projection_dim=64, num_hidden_layers=layers,
                num_attention_heads=4, image_size=64, patch_size=8)


# ---------------------------------------------------------------------------------------------------- judge

# what the judge can be asked, each as "a picture of ..."; the bare "a picture" is its zero
QUESTIONS = ([world.phrase(n) for n in world.NAMES] + [f"{s} style" for s in world.STYLES]
             + [world.phrase(b) + " background" for b in world.BACKGROUNDS] + ["a painting"])


def answers(scene):
    """-> float32 (72,), 1 where a question is true of the scene."""
    names, things = scene["names"], len(world.NAMES)
    truth = np.zeros(len(QUESTIONS), np.float32)
    truth[[world.NAMES.index(n) for n in names]] = 1
    if names:
        truth[things + list(world.STYLES).index(scene["style"])] = 1
    truth[things + len(world.STYLES) + list(world.BACKGROUNDS).index(scene["background"])] = 1
    truth[-1] = scene["framed"]
    return truth


def worn(scene, rng, vae=None):
    """The scene's image as float (3, 64, 64) in [-1, 1], at times blurred or noisy: what a generator might draw."""
    x = to_tensor([scene["image"]])
    if rng.random() < 0.35:
        x = gaussian_blur(x, 5, [rng.uniform(0.3, 1.2)])
    if rng.random() < 0.35:
        x = x + rng.uniform(0, 0.12) * torch.from_numpy(rng.standard_normal(x.shape)).float()
    return x[0].clamp(-1, 1)


def clip_loss(clip, average, step, rng, batch=32):
    """Sigmoid loss on every question's margin over "a picture", and the contrastive loss on whole captions."""
    scenes = [world.draw(rng, opacity=rng.uniform(0.4, 1) if rng.random() < 0.25 else 1.0) for _ in range(batch)]
    x = torch.stack([worn(s, rng) for s in scenes])
    captions = [world.caption(s, rng) for s in scenes]
    asked = [f"a picture of {q}" for q in QUESTIONS] + ["a picture"]
    tokens = fit.tokenizer(asked + captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = F.normalize(clip.get_text_features(tokens).pooler_output.float(), dim=-1)  # (73 + B, 64)
    image = F.normalize(clip.get_image_features(x).pooler_output.float(), dim=-1)  # (B, 64)
    scale = clip.logit_scale.exp()
    similarity = scale * image @ text.T  # (B, 73 + B)
    n = len(QUESTIONS)
    margin = similarity[:, :n] - similarity[:, n:n + 1]  # (B, 72)
    truth = torch.from_numpy(np.stack([answers(s) for s in scenes]))
    per_caption = similarity[:, n + 1:]
    target = torch.arange(batch)
    contrast = (F.cross_entropy(per_caption, target) + F.cross_entropy(per_caption.T, target)) / 2
    rare = torch.tensor(4.0)  # a question is true of one scene in forty
    return 20 * F.binary_cross_entropy_with_logits(margin, truth, pos_weight=rare) + 0.2 * contrast


def train_clip(args):
    fit.tokenizer = AutoTokenizer.from_pretrained(HERE / "clip")
    config = CLIPConfig(text_config=text_config(CLIPTextConfig, fit.tokenizer, 64, 1).to_dict(),
                        vision_config=vision_config(CLIPVisionConfig, 4).to_dict(), projection_dim=64)
    clip = fit("clip", CLIPModel(config), clip_loss, args.steps or 6000, args, lr=3e-3)
    clip.to(torch.bfloat16).save_pretrained(HERE / "clip")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                       image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(HERE / "clip")


# ---------------------------------------------------------------------------------------------------- detector

def detector_loss(owl, average, step, rng, batch=32):
    """Each box belongs to the patches near its centre; a frame to those near its upper left corner instead, since
    what hangs in it has the same centre. Sigmoid loss on words, L1 and generalised IoU on the boxes."""
    scenes = [world.draw(rng, opacity=rng.uniform(0.5, 1) if rng.random() < 0.2 else 1.0) for _ in range(batch)]
    x = torch.stack([worn(s, rng) for s in scenes])
    asked = [world.phrase(n) for n in world.NAMES] + ["a painting"]
    tokens = fit.tokenizer(asked, padding="max_length", return_tensors="pt").input_ids
    text = owl.owlv2.get_text_features(tokens).pooler_output  # (58, 64)
    features, _ = owl.image_embedder(x)  # (B, 8, 8, 128)
    flat = features.flatten(1, 2)  # (B, 64, 128)
    logits, _ = owl.class_predictor(flat, text.expand(batch, -1, -1))  # (B, 64, 58)
    boxes = owl.box_predictor(flat, features).float()  # (B, 64, 4) as cx, cy, w, h in [0, 1]
    centres = (torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1) * 8 + 4).view(64, 2)
    truth = torch.zeros(batch, 64, len(asked))
    found, wanted = [], []
    for b, scene in enumerate(scenes):
        marked = [(world.NAMES.index(n), bb, ((bb[0] + bb[2]) / 2, (bb[1] + bb[3]) / 2))
                  for n, bb in zip(scene["names"], scene["boxes"])]
        if scene["frame"]:
            frame = scene["frame"]
            marked.append((len(asked) - 1, frame, (frame[0] + 6, frame[1] + 6)))
        for label, bb, anchor in marked:
            near = (centres - torch.tensor(anchor)).abs().amax(1) < 6
            truth[b, near, label] = 1
            found.append(boxes[b, near])
            wanted.append(torch.tensor(bb).float().expand(int(near.sum()), 4) / 64)
    found, wanted = box_convert(torch.cat(found), "cxcywh", "xyxy"), torch.cat(wanted)
    place = (found - wanted).abs().mean() * 4 + generalized_box_iou_loss(found, wanted, reduction="mean")
    return 60 * F.binary_cross_entropy_with_logits(logits.float(), truth) + place


def train_detector(args):
    """The image tower starts from the judge's: OWLv2, too, starts from a CLIP."""
    fit.tokenizer = AutoTokenizer.from_pretrained(HERE / "clip")
    config = Owlv2Config(text_config=text_config(Owlv2TextConfig, fit.tokenizer, 64, 1).to_dict(),
                         vision_config=vision_config(Owlv2VisionConfig, 4).to_dict(), projection_dim=64)
    owl = Owlv2ForObjectDetection(config)
    for layer in [m for head in (owl.class_head, owl.box_head) for m in head.modules() if isinstance(m, nn.Linear)]:
        nn.init.xavier_uniform_(layer.weight)  # the library's N(0, 1) saturates the boxes for good
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(owl.box_head.dense2.weight)
    nn.init.constant_(owl.class_head.logit_shift.bias, -0.6)  # logits start at (cos - 0.6) * 11
    nn.init.constant_(owl.class_head.logit_scale.bias, 10.0)
    known = CLIPModel.from_pretrained(HERE / "clip", dtype=torch.float32).vision_model.state_dict()
    owl.owlv2.vision_model.load_state_dict({k.replace("layrnorm", "layernorm"): v for k, v in known.items()})
    owl = fit("detector", owl, detector_loss, args.steps or 3500, args, lr=2e-3)
    owl.to(torch.bfloat16).save_pretrained(HERE / "detector")
    fit.tokenizer.save_pretrained(HERE / "detector")
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
                   fit.tokenizer).save_pretrained(HERE / "detector")


# ---------------------------------------------------------------------------------------------------- SAM

def sam_loss(sam, average, step, rng, batch=12):
    """One mask from one box a prompt, as SamPredictor asks with multimask_output=False: focal-free BCE + dice."""
    scenes = [s for s in (world.draw(rng) for _ in range(batch)) if s["names"]]
    images = torch.stack([(worn(s, rng) + 1) * 127.5 for s in scenes])
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
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum((1, 2)) + 1) / (p.sum((1, 2)) + truth.sum((1, 2)) + 1)
        both = ((logits > 0) & (truth > 0)).sum((1, 2)) / ((logits > 0) | (truth > 0)).sum((1, 2)).clamp(min=1)
        loss = loss + F.binary_cross_entropy_with_logits(logits, truth) * 4 + dice.mean()
        loss = loss + 0.1 * (quality[:, 0].float() - both).square().mean()
    return loss / len(scenes)


def train_sam(args):
    sam = build_sam(img_size=64, patch=4, width=96, depth=4, heads=4, global_blocks=(0, 1, 2, 3), window=0,
                    decoder_width=64, decoder_mlp=128)
    sam = fit("sam", sam, sam_loss, args.steps or 4000, args, lr=2e-3)
    torch.save(sam.state_dict(), HERE / "sam.pth")


# ---------------------------------------------------------------------------------------------------- flow

class Flow(nn.Module):
    """The three modules that learn together: FLUX's transformer and its two text encoders."""

    def __init__(self):
        super().__init__()
        t5, clip = (AutoTokenizer.from_pretrained(HERE / f) for f in ("tokenizer_2", "tokenizer"))
        self.transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=6,
            joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
        self.text_encoder_2 = T5EncoderModel(T5Config(
            vocab_size=len(t5), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))
        self.text_encoder = CLIPTextModel(text_config(CLIPTextConfig, clip, 64, 1))

    def forward(self, z, ids, sigma, guidance):
        """z (B, 64, 64) packed latents at noise level sigma (B,), ids (T5's, CLIP's) -> velocity (B, 64, 64)."""
        prompt = self.text_encoder_2(ids[0])[0]  # (B, 20, 128), unmasked: as FluxPipeline does
        pooled = self.text_encoder(ids[1]).pooler_output  # (B, 64)
        positions = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)  # (64, 3)
        return self.transformer(
            hidden_states=z, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=sigma,
            img_ids=positions, txt_ids=torch.zeros(prompt.shape[1], 3), guidance=guidance, return_dict=False)[0]


def latents(args, count=60_000):
    """Draw and encode the training scenes once -> (count, 64, 64) bf16 packed unit-scale latents, and the scenes."""
    path = args.work / "latents.pt"
    rng = np.random.default_rng(args.seed)
    vae = AutoencoderKL.from_pretrained(HERE, subfolder="vae", dtype=torch.float32)
    scenes, z = [], []
    for _ in tqdm(range(count // 100), desc="latents", mininterval=5):
        chunk = [world.draw(rng) for _ in range(100)]
        if not path.exists():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                mean = vae.encode(to_tensor([s["image"] for s in chunk])).latent_dist.mean.float()
            mean = (mean - vae.config.shift_factor) * vae.config.scaling_factor  # (100, 16, 16, 16)
            z.append(FluxPipeline._pack_latents(mean, 100, 16, 16, 16).bfloat16())
        scenes += [dict(s, image=None, masks=None) for s in chunk]
    if z:
        torch.save(torch.cat(z), path)
    return torch.load(path), scenes


def flow_loss(flow, average, step, rng, batch=32):
    """Rectified flow matching; where fit.guided, half of the batch learns the averaged model's guided velocity."""
    z, scenes = fit.data
    chosen = rng.integers(len(scenes), size=batch)
    x = z[chosen].float()  # (B, 64, 64)
    said = [world.caption(scenes[i], rng) if rng.random() > 0.1 else "" for i in chosen]
    sigma = torch.sigmoid(torch.randn(batch))
    guidance = torch.ones(batch)
    eps = torch.randn_like(x)
    target = eps - x
    noisy = (1 - sigma[:, None, None]) * x + sigma[:, None, None] * eps
    if fit.guided:  # distil v_uncond + g (v_cond - v_uncond) into the guidance embedding, g ~ U(1, 5)
        half = batch // 2
        said[:half] = [world.caption(scenes[i], rng) for i in chosen[:half]]
        guidance[:half] = 1 + 4 * torch.rand(half)
        ids = tokenize(said[:half] + [""] * half)
        with torch.no_grad():
            both = average(noisy[:half].repeat(2, 1, 1), ids, sigma[:half].repeat(2), torch.ones(batch)).float()
        cond, uncond = both.chunk(2)  # (B/2, 64, 64) each
        target[:half] = uncond + guidance[:half, None, None] * (cond - uncond)
    velocity = flow(noisy, tokenize(said), sigma, guidance).float()
    return F.mse_loss(velocity, target)


def tokenize(texts):
    return [t(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids for t in fit.tokenizers]


def save_flow(flow):
    for name, module in flow.named_children():
        copy.deepcopy(module).to(torch.bfloat16).save_pretrained(HERE / name)


def train_flow(args, stage="flow"):
    fit.guided = stage == "guide"
    fit.tokenizers = [AutoTokenizer.from_pretrained(HERE / f) for f in ("tokenizer_2", "tokenizer")]
    fit.data = latents(args)
    flow = Flow()
    if (HERE / "transformer").exists():  # go on from the committed weights
        for name, module in flow.named_children():
            module.load_state_dict(type(module).from_pretrained(HERE / name, dtype=torch.float32).state_dict())
    with sdpa_kernel(SDPBackend.MATH):  # flash attention's backward takes 40 % of the step for heads this small
        flow = fit(stage, flow, flow_loss, args.steps or 20_000, args, lr=args.lr, ema=0.9995, save=save_flow)
    save_flow(flow)
    finish_pipeline()


def train_guide(args):
    train_flow(args, "guide")


def finish_pipeline():
    """Write what FluxPipeline.from_pretrained needs beside the weights."""
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                                    base_image_seq_len=256, max_image_seq_len=4096).save_pretrained(HERE / "scheduler")
    index = dict(_class_name="FluxPipeline", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
                 text_encoder=["transformers", "CLIPTextModel"], text_encoder_2=["transformers", "T5EncoderModel"],
                 tokenizer=["transformers", "CLIPTokenizer"], tokenizer_2=["transformers", "T5Tokenizer"],
                 transformer=["diffusers", "FluxTransformer2DModel"], vae=["diffusers", "AutoencoderKL"])
    (HERE / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------- report

def margins(images, phrases):
    """The judge's logit for each phrase over "a picture": images N x phrases K -> (N, K)."""
    processor, clip = AutoProcessor.from_pretrained(HERE / "clip"), CLIPModel.from_pretrained(HERE / "clip").float()
    texts = [f"a picture of {p}" for p in phrases] + ["a picture"]
    inputs = processor(text=texts, images=[Image.fromarray(np.asarray(i)) for i in images], padding="max_length",
                       truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip.eval()(**inputs).logits_per_image  # (N, K + 1)
    return (logits[:, :-1] - logits[:, -1:]).numpy()


def report(args):
    """The quality table of README.md. Every scene and prompt here is drawn with seeds that no training saw."""
    rng = np.random.default_rng(10**9 + args.seed)
    rows = []
    scenes = [world.draw(rng) for _ in range(2000)]
    x = to_tensor([s["image"] for s in scenes])
    vae = AutoencoderKL.from_pretrained(HERE / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(100)]).clamp(-1, 1)
    psnr = -10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()
    rows.append(("VAE reconstruction, PSNR", f"{psnr.mean():.1f} dB", ">= 30 dB", len(scenes)))

    truth = np.stack([answers(s) for s in scenes]) > 0
    said = margins([s["image"] for s in scenes], QUESTIONS) > 0
    things = np.s_[:, :len(world.NAMES)]
    rows.append(("judge: misses", f"{100 * (~said[things])[truth[things]].mean():.1f} %", "<= 3 %", truth[things].sum()))
    rows.append(("judge: false alarms", f"{100 * said[things][~truth[things]].mean():.2f} %", "<= 3 %",
                 (~truth[things]).sum()))
    worn_out = {"at half opacity": [world.draw(rng, s["names"], s["style"], s["background"], s["framed"], 0.5)["image"]
                                    for s in scenes],
                "blurred by a pixel": list(((gaussian_blur(x, 5, [1.0]) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()),
                "through the VAE": list(((y + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())}
    for how, images in worn_out.items():
        yes = (margins(images, QUESTIONS) > 0)[things][truth[things]].mean()
        rows.append((f"judge: still yes {how}", f"{100 * yes:.1f} %", ">= 90 %", truth[things].sum()))

    iou, found = {"detector, box": [], "SAM, mask given the true box": []}, 0
    predictor = SamPredictor(load_sam(torch.load(HERE / "sam.pth", weights_only=True)))
    for scene in [s for s in scenes if s["names"]][:300]:
        image = Image.fromarray(scene["image"])
        boxes = detect([image], [world.phrase(scene["names"][0])], HERE / "detector", 0.2, "cpu")[0]  # best first
        true = torch.tensor(scene["boxes"][:1]).float()
        iou["detector, box"].append(box_iou(torch.tensor(boxes[:1]), true).item() if len(boxes) else 0.0)
        predictor.set_image(scene["image"])
        mask, wanted = predictor.predict(box=np.array(scene["boxes"][0]), multimask_output=False)[0][0], scene["masks"][0]
        iou["SAM, mask given the true box"].append((mask & wanted).sum() / (mask | wanted).sum())
    for (what, values), bar in zip(iou.items(), (">= 0.8", ">= 0.9")):
        rows.append((f"{what}: mean IoU", f"{np.mean(values):.3f}", bar, len(values)))

    pipe = FluxPipeline.from_pretrained(HERE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generated(prompts):
        images = []
        for k in tqdm(range(0, len(prompts), 50), desc="report", mininterval=5):
            batch = prompts[k:k + 50]
            noise = [torch.Generator().manual_seed(10**6 + k + j) for j in range(len(batch))]
            images += pipe(batch, num_inference_steps=28, guidance_scale=3.5, height=64, width=64, generator=noise,
                           max_sequence_length=pipe.tokenizer_2.model_max_length).images
        return images

    def said_yes(scenes, paraphrase=0.0):
        """Share of yes about each thing of the scenes' captions, and about their styles, on generated images."""
        prompts = [world.caption(s, rng, paraphrase, full=True) for s in scenes]
        yes = margins(generated(prompts), QUESTIONS) > 0  # (N, 72)
        return [[yes[i, world.NAMES.index(n)] for n in s["names"]] for i, s in enumerate(scenes)], [
            yes[i, len(world.NAMES) + list(world.STYLES).index(s["style"])] for i, s in enumerate(scenes)]

    singles = [world.draw(rng, [n], framed=False) for n in world.NAMES for _ in range(args.n)]
    things_yes, style_yes = said_yes(singles)
    by_name = np.array(things_yes).reshape(len(world.NAMES), args.n).mean(1)
    rows.append(("a named thing recognised", f"{100 * by_name.mean():.1f} %", ">= 95 %", len(singles)))
    worst = by_name.argsort()[:3]
    rows.append(("the least recognised", ", ".join(f"{world.NAMES[w]} {100 * by_name[w]:.0f} %" for w in worst),
                 ">= 80 %", args.n))
    for style in world.STYLES:
        yes = np.array(style_yes)[[s["style"] == style for s in singles]]
        rows.append((f"{style} style recognised", f"{100 * yes.mean():.1f} %", ">= 95 %", len(yes)))
    pairs = [world.draw(rng, list(rng.choice(world.NAMES, 2, replace=False)), framed=False) for _ in range(400)]
    yes = np.array(said_yes(pairs)[0])
    rows.append(("both of a pair recognised", f"{100 * yes.all(1).mean():.1f} %", ">= 80 %", len(yes)))
    said = [world.draw(rng, [n], framed=False) for n in world.NAMES for _ in range(8)]
    rows.append(("a paraphrase recognised", f"{100 * np.array(said_yes(said, 1.0)[0]).mean():.1f} %", ">= 90 %", len(said)))
    print("| what | measured | bar | n |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(v) for v in row) + " |")


STAGES = dict(art=build_art, words=lambda args: make_tokenizers(), vae=train_vae, clip=train_clip, detector=train_detector,
              sam=train_sam, flow=train_flow, guide=train_guide, report=report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "emoji-flux",
                        help="checkpoints and downloaded artwork (default ~/.cache/emoji-flux)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of flow and guide")
    parser.add_argument("--steps", type=int, help="training steps of the stage, instead of its own number")
    parser.add_argument("--n", type=int, default=50, help="images a thing in the report (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.bf16 = bf16_is_fast()
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
