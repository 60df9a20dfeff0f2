"""What a run costs: planned from the configs alone, measured, and tried on a CPU at FLUX.1-dev's full size.

    python bench.py --plan                             # FLUX.1-dev: memory, work, and the cards it fits on
    python bench.py --memory --model emoji-flux        # the planned memory next to the measured memory
    python bench.py --step --model emoji-flux          # train.py's step next to a bare loop of the same work
    python bench.py --proof                            # two INPO steps on 11.9 B int8 weights, in 14 GiB RAM

Only configs are downloaded, and for FLUX.1 not even those. A plan runs the real networks on fake tensors,
which have shapes but no memory, and adds up the bytes that would be allocated at the same time.
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import json
import shutil
import time
import weakref
from pathlib import Path

from sample import (WEIGHT_BYTES, check_folder, check_size, die, generate, guarded, load_denoiser,
                    model_flag, number, peak_memory, place, prompts_folder, stage, text_length)

def arguments(given=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = die
    what = parser.add_mutually_exclusive_group(required=True)
    for flag in ("plan", "memory", "step", "proof"):
        what.add_argument(f"--{flag}", dest="bench", action="store_const", const=flag)
    model_flag(parser.add_argument)
    parser.add_argument("--size", type=number(int), help="pixels a side (default: the VAE's sample_size)")
    parser.add_argument("--batch", type=number(int), default=1,
                        help="forget images per step, for --plan and --step (default 1)")
    parser.add_argument("--sample-batch", type=number(int), default=1,
                        help="images sampled at once, for --plan (default 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="of the frozen weights (default: bfloat16 for --plan, else train.py's)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="default %(default)s")
    return parser.parse_args(given)

ARGS = arguments() if __name__ == "__main__" else None  # before the slow imports: --help answers at once

import torch  # noqa: E402
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel  # noqa: E402
from huggingface_hub import HfApi, try_to_load_from_cache  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop  # noqa: E402
from segment_anything import sam_model_registry  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel  # noqa: E402

import train  # noqa: E402
from inpo import inpo_loss  # noqa: E402
from mask import check_networks, load_sam  # noqa: E402

GIB, SAM = 2**30, "masks (SAM)"
# the counter knows only CUDA's attention kernels; count the CPU's in the same way
flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
# FLUX.1's published configs, where they differ from the classes' defaults; schnell has no guidance
FLUX = dict(
    transformer=dict(guidance_embeds=True),
    text_encoder=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768),
    text_encoder_2=dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
                        feed_forward_proj="gated-gelu"),
    vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
             sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
             use_post_quant_conv=False, down_block_types=["DownEncoderBlock2D"] * 4,
             up_block_types=["UpDecoderBlock2D"] * 4))

def config_of(model, part):
    """A network's config: FLUX's for FLUX.1's own names, else the folder's, the cache's or the hub's."""
    if model in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"):
        return FLUX[part] | (dict(guidance_embeds=model.endswith("dev")) if part == "transformer" else {})
    try:
        here = Path(model).is_dir() or try_to_load_from_cache(model, f"{part}/config.json")
        if not here:
            HfApi().model_info(model, timeout=10)  # without a network: one try, load_config makes six
        return AutoencoderKL.load_config(model, subfolder=part, local_files_only=bool(here))  # for every part
    except Exception as error:  # every HTTP library has its own error for "no network"
        die(f"--model {model}: no {part}/config.json, here or on the hub ({type(error).__name__})")

def build(part, config, **changed):
    """One of the pipeline's networks, frozen, on the meta device: it has shapes but no memory."""
    config = {k: v for k, v in config.items() if not k.startswith("_")} | changed
    make = dict(transformer=FluxTransformer2DModel.from_config, vae=AutoencoderKL.from_config,
                text_encoder=lambda config: CLIPTextModel(CLIPTextConfig(**config)),
                text_encoder_2=lambda config: T5EncoderModel(T5Config(**config)))
    with torch.device("meta"):
        return make[part](config).requires_grad_(False)

class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak, without the network's own weights."""
    def __init__(self, network, device):
        super().__init__()
        self.device = device
        weights = {tensor.untyped_storage() for tensor in (*network.parameters(), *network.buffers())}
        self.live, self.most, self.known = 0, 0, weakref.WeakSet(weights)

    def add(self, n_bytes):
        self.live += n_bytes
        self.most = max(self.most, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        if function is torch.ops.aten.convolution.default:  # oneDNN copies the input, cuDNN the output too
            copies = args[0].nbytes + out.nbytes * (self.device == "cuda")
            self.most = max(self.most, self.live + copies)
        return out

def watch(network, work, dtype, device="cpu"):
    """Run work(network) on fake tensors -> peak bytes, bytes still held when it returns, FLOP."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        for module in network.modules():
            for name, p in list(module.named_parameters(recurse=False)):  # a LoRA stays float32
                empty = torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else dtype)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)
        with Peak(network, device) as peak, FlopCounterMode(display=False) as flops:
            graph = work(network)
            kept = peak.live
            del graph
        return peak.most, kept, flops.get_total_flops()

def predict(batch, tokens, texts, backward=False):
    """-> work(network) for watch(): predict a batch, keep a LoRA's graph or, if backward, go through it."""
    def work(network):
        c, dtype = network.config, next(p.dtype for p in network.parameters() if not p.requires_grad)
        z = torch.empty(batch, tokens, c.in_channels, dtype=dtype)  # (B, L, D)
        states = torch.empty(batch, texts, c.joint_attention_dim, dtype=dtype)  # (B, T, E)
        pooled = torch.empty(batch, c.pooled_projection_dim, dtype=dtype)  # (B, P)
        v = train.predict(network, z, torch.empty(batch), states, pooled, 1.0)
        return v.float().square().mean().backward() if backward else v
    return work

def flux(model, rank, **changed):
    """The transformer on the meta device; rank 0: without a LoRA."""
    network = build("transformer", config_of(model, "transformer"), **changed)
    if rank:
        train.add_lora(network, rank, 0)
    return network

@functools.cache
def watch_blocks(model, double, single, rank, dtype, *given, checkpointing=False):
    """watch() predict(*given) on a transformer cut to so many double and single blocks."""
    network = flux(model, rank, num_layers=double, num_single_layers=single)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return watch(network, predict(*given), dtype)

def watch_all(model, *given, **more):
    """The same for all blocks, which are alike within a kind: each further one adds what the second one added
    (not so the peak under checkpointing, which plan() takes from a single block)."""
    network = flux(model, 0)
    counts = len(network.transformer_blocks), len(network.single_transformer_blocks)
    base, *grown = (watch_blocks(model, *blocks, *given, **more) for blocks in ((1, 1), (2, 1), (1, 2)))
    return [first + sum((n - 1) * (second - first) for n, second in zip(counts, seconds))
            for first, *seconds in zip(base, *grown)]

def call(method, *shape, dtype=None):
    """-> work(network) for watch(): call a method of a network that is not trained on zeros of a shape."""
    return lambda network: getattr(network, method)(
        torch.zeros(shape, dtype=dtype or next(network.parameters()).dtype))

@functools.cache
def plan_masks(model):
    """-> bytes at SAM's peak, FLOP per image: the model's own SAM, else ViT-H. The detector needs less."""
    own = Path(model) / "sam.pth"
    check_networks(argparse.Namespace(sam=own, detector=Path(model) / "detector"))
    with torch.device("meta"):
        if own.exists():
            sam = load_sam(torch.load(own, map_location="meta", weights_only=True))
        else:
            sam = sam_model_registry["vit_h"]()
    side = sam.image_encoder.img_size
    most, _, flop = watch(sam.requires_grad_(False), call("image_encoder", 1, 3, side, side), torch.float32)
    return 4 * sum(p.numel() for p in sam.parameters()) + most, flop

@functools.cache
def plan(model, size, dtype, batch, sample_batch, rank=4, texts=None, states=3.5, device="cuda"):
    """-> {stage: {how: bytes}}, {unit of work: FLOP}, (LoRA's modules, tensors, parameters), all parameters.

    how: a value of --quantize, or "offload". states: the optimizer's floats per LoRA parameter. Prodigy keeps
    three, and the first values of parameters that do not start at 0: matrices A, half of them, so 3.5.
    device: on "cuda" cuDNN's copies count too.
    """
    dtype = getattr(torch, dtype or "bfloat16")
    networks = {part: build(part, config_of(model, part)) for part in FLUX}
    numel = {part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()}
    vae = networks["vae"]
    size = check_size(size, vae.config)
    side = size // 2 ** (len(vae.config.block_out_channels) - 1)  # latent cells
    tokens, texts, B = side * side // 4, texts or tokens_of(model), 2 * batch

    tuned = networks["transformer"]
    lora = [p.numel() for p in train.add_lora(tuned, rank, 0)]
    linears = [m.weight.numel() for m in tuned.modules() if isinstance(m, torch.nn.Linear)]
    blocks = [sum(p.numel() for p in kind[0].parameters())
              for kind in (tuned.transformer_blocks, tuned.single_transformer_blocks)]
    text, _, text_flop = watch(networks["text_encoder_2"], call("forward", 1, texts, dtype=torch.long), dtype)
    latents = sample_batch, vae.config.latent_channels, side, side
    decoded, _, decode_flop = watch(vae, call("decode", *latents), dtype, device)
    encoded, _, encode_flop = watch(vae, call("encode", 1, 3, size, size), dtype, device)
    drawn, _, flop = watch_all(model, 0, dtype, sample_batch, tokens, texts)
    plain, _, _ = watch_all(model, rank, dtype, B, tokens, texts, True)
    # with checkpointing: the inputs of all blocks are kept, and one block at a time is computed again
    _, given, _ = watch_all(model, rank, dtype, B, tokens, texts, checkpointing=True)
    within = max(watch_blocks(model, k, 1 - k, rank, dtype, B, tokens, texts, True)[0] for k in (0, 1))
    whole, block, layer = (n * dtype.itemsize for n in (numel["transformer"], max(blocks), max(linears)))
    found = {name: {} for name in ("prompts", "sample", SAM, "latents", "train", "train --checkpointing")}
    for how in (*WEIGHT_BYTES, "offload"):
        each = WEIGHT_BYTES.get(how) or dtype.itemsize
        resident = 0 if how == "offload" else numel["transformer"] * each
        # the weights' copies in dtype or on the GPU: a layer's when used; autograd keeps all but nf4's
        used, kept = (0 if how == "none" else layer), how in ("int8", "offload")
        vae_bytes, optimizer = numel["vae"] * dtype.itemsize, 4 * sum(lora) * (2 + states)
        found["prompts"][how] = (numel["text_encoder"] + numel["text_encoder_2"]) * dtype.itemsize + text
        found["sample"][how] = resident + vae_bytes + max(decoded, drawn + used)
        found[SAM][how] = plan_masks(model)[0]
        found["latents"][how] = vae_bytes + encoded
        found["train"][how] = resident + optimizer + plain + max(used, kept * whole)
        found["train --checkpointing"][how] = resident + optimizer + given + within + max(used, kept * block)
    work = dict(forward=flop / sample_batch, decode=decode_flop / sample_batch, encode=encode_flop,
                text=text_flop, mask=plan_masks(model)[1])
    return found, work, (len(lora) // 2, len(lora), sum(lora)), sum(numel.values())

def needs(args, **changed):
    """{stage: planned bytes at the peak} for a script's flags, with some changed. Only of sample and train:
    no flag but --device makes the other stages smaller."""
    given = vars(args) | changed  # sample.py and evaluate.py have none of these flags:
    flags = argparse.Namespace(**dict(batch=1, accumulate=1, checkpointing=False, rank=4) | given)
    found = plan(flags.model, flags.size, str(flags.dtype)[6:], flags.batch // flags.accumulate,
                 flags.sample_batch, flags.rank, device=flags.device)[0]
    stages = dict(sample=found["sample"])
    if "batch" in args:
        stages["train"] = found["train --checkpointing" if flags.checkpointing else "train"]
    return {name: row["offload" if flags.offload else flags.quantize] for name, row in stages.items()}

def savings(args):
    """One line: what a script needs by the plan with its flags, and with each further flag that lowers it,
    alone and with the others."""
    now = needs(args)
    smaller = dict(none=["int8", "nf4"], int8=["nf4"], nf4=[])[args.quantize] * (not args.offload)
    quantized = {f"--quantize {q}": dict(quantize=q) for q in smaller if q == "int8" or args.device == "cuda"}
    offloaded = {} if args.offload or args.quantize == "nf4" else {"--offload": dict(offload=True)}
    fewer = {"--sample-batch 1": dict(sample_batch=1)}
    if "batch" in args:
        fewer["--checkpointing"] = dict(checkpointing=True)
        fewer[f"--accumulate {args.batch}"] = dict(accumulate=args.batch)
    together = functools.reduce(dict.__or__, fewer.values())
    others = quantized | offloaded | fewer | {" ".join(fewer): together}
    others |= {" ".join([*fewer, flag]): together | changed
               for flag, changed in (quantized | offloaded).items()}
    advice = []
    for flag, changed in others.items():
        found = needs(args, **changed)
        less = [f"{name} {found[name] / GIB:.3g}" for name in now if found[name] < 0.99 * now[name]]
        advice += [f"with {flag} {', '.join(less)}"] * bool(less)
    needed = ", ".join(f"{name} {n_bytes / GIB:.3g}" for name, n_bytes in now.items())
    return f"planned, GiB: {needed}; {'; '.join(advice) or 'no further flag lowers it'}"

def tokens_of(model):
    """The length of an encoded prompt, in T5 tokens (512 unless the model is a folder)."""
    config = Path(model) / "tokenizer_2" / "tokenizer_config.json"
    if Path(model).is_dir() and not config.exists():
        die(f"--model {model}: no {config}")
    longest = json.loads(config.read_text())["model_max_length"] if config.exists() else 512
    return text_length(longest, config_of(model, "transformer"))

def show_plan(args):
    found, work, lora, numel = plan(args.model, args.size, args.dtype, args.batch, args.sample_batch)
    print(f"{args.model}: {numel:,} parameters; LoRA of rank 4: {lora[0]} modules, {lora[1]} tensors, "
          f"{lora[2]:,} parameters")
    print(f"\nGiB at the peak, {args.dtype or 'bfloat16'}, {args.batch} + {args.batch} images a step, "
          f"{args.sample_batch} sampled at once; computed")
    print(f"{'stage':24}" + "".join(f"{how:>10}" for how in found["train"]))
    for name, row in found.items():
        print(f"{name:24}" + "".join(f"{n_bytes / GIB:10.4g}" for n_bytes in row.values()))
    for name in ("train", "train --checkpointing"):
        rows = [row for key, row in found.items() if key == name or "train" not in key]
        needed = [max(row[how] for row in rows) / GIB for how in found[name]]
        cards = [next((f"{gb} GB" for gb in (16, 24, 40, 80) if need < 0.95 * gb), "none") for need in needed]
        print(f"{'card, ' + name:24}" + "".join(f"{card:>10}" for card in cards))
    images, steps, forward = 50 + 8 * 25, 300, work["forward"] / 1e12
    print(f"\nwork by the defaults, a forward of one image being {forward:.3g} TFLOP; computed")
    for name, forwards, more in (  # prompts: 12 to sample, 96 to preserve, 24 of the pictures
            ("prompts, 132 (T5)", 0, 132 * work["text"]), (f"{SAM}, 50 images", 0, 50 * work["mask"]),
            (f"sample, {images} images x 28 steps", images * 28, images * work["decode"]),
            (f"latents, {images} images", 0, images * work["encode"]),
            (f"train, {steps} steps of {args.batch} + {args.batch}", steps * 2 * args.batch * 3, 0),
            ("train --checkpointing", steps * 2 * args.batch * 4, 0),
            ("pictures, 4 x 2 x 6", 48 * 28, 48 * work["decode"])):
        print(f"{name:32}{forwards:>8,} forwards{forwards * forward + more / 1e12:>12,.0f} TFLOP")

def random_run(args, out, batch, *flags):
    """-> train.py's arguments, and what train.train() takes after the pipeline, with random latents."""
    model, flags = args.model, [*flags, "--batch", str(batch), "--lr", "0.7"]
    flags += [f"--{flag}={vars(args)[flag]}" for flag in ("size", "dtype") if vars(args)[flag]]
    concept = min(prompts_folder(model).glob("*.txt")).stem  # any will do
    run = train.arguments(["--model", model, "--concept", concept, "--out", str(out), *flags])
    table6, = train.fill_presets(train.setup(run), run)
    preset = argparse.Namespace(**vars(run) | table6)
    config, rng = config_of(model, "transformer"), torch.Generator().manual_seed(0)
    side = run.size // 2 ** (len(config_of(model, "vae")["block_out_channels"]) - 1)
    x = torch.randn(batch, side * side // 4, config["in_channels"], generator=rng)  # (N, L, D)
    states = torch.randn(tokens_of(model), config["joint_attention_dim"], generator=rng)  # (T, E)
    pooled = torch.randn(config["pooled_projection_dim"], generator=rng)  # (P,)
    embeds, texts = {"": (states.to(run.dtype), pooled.to(run.dtype))}, [""] * batch
    return run, ([(x, torch.ones_like(x), texts)], (x, texts), embeds, [preset])

def measure_memory(args):
    """The plan next to the measured peaks of sampling and training, less what the process held before each.
    The rows of batch 1 only warm up: what libraries load when first used stays in memory."""
    print(f"{'batch':>6} {'stage':24}{'planned':>10}{'measured':>10}  MiB above idle")
    for batch in (1, 32, 64, 128):
        for flags in ((), ("--checkpointing",)):
            out = args.out / "memory"  # our own subfolder: nothing else in --out is deleted
            shutil.rmtree(out, ignore_errors=True)
            run, data = random_run(args, out, batch, "--steps", "3", *flags)
            planned = plan(args.model, args.size, str(run.dtype)[6:], batch, batch, device=run.device)[0]
            gc.collect()
            idle = torch.cuda.memory_allocated()  # 0 without a GPU; on one, cuBLAS keeps workspaces
            if not flags:
                with stage("sample", out) as peak:
                    generate(place(load_denoiser(run), run), data[2], [""] * batch, range(batch), 3, 3.5,
                             run.size)
                print_pair(batch, "sample", planned, peak, idle)
            with stage("train", out) as peak:
                train.train(load_denoiser(run), *data, run)
            print_pair(batch, " ".join(("train", *flags)), planned, peak, idle)

def print_pair(batch, name, planned, peak, idle):
    measured = torch.cuda.max_memory_allocated() - idle or peak[1] - peak[0]  # since it began
    print(f"{batch:6} {name:24}{planned[name]['none'] / 2**20:10.0f}{measured / 2**20:10.0f}")

def measure_step(args, rounds=20):
    """train.py's step next to a bare loop: same forwards, backward, optimizer, threads; but cached inputs."""
    run, (forget, preserve, embeds, (preset,)) = random_run(args, args.out, args.batch)
    cached = next(iter(train.batch_of(0, forget[0], preserve, embeds, run)))

    def ours(transformer, params, step):
        for part in train.batch_of(step, forget[0], preserve, embeds, run):
            train.iteration(transformer, *part, preset)[0].backward()
        for tensors in ([p.grad for p in params], [p.detach() for p in params]):  # train.py's check for NaN
            torch.nn.utils.get_total_norm(tensors)

    def bare(transformer, params, step):
        x, mask, states, pooled, sigma, eps = cached
        t = sigma[:, None, None]  # (2B, 1, 1)
        z, target, half = (1 - t) * x + t * eps, eps - x, len(mask)  # (2B, L, D)
        with train.reference(transformer):
            v_ref = train.predict(transformer, z, sigma, states, pooled, run.guidance)
        v = train.predict(transformer, z, sigma, states, pooled, run.guidance)
        S, S_ref = ((mask * (u - target)[:half] ** 2).sum((1, 2)) / mask.sum((1, 2)) for u in (v, v_ref))
        dS = S - S_ref  # (B,)
        loss = (2 * torch.sigmoid(-3 * (dS - 0.1)) * torch.nn.functional.softplus(-dS)).mean()
        (loss + 0.6 * (v[half:] - v_ref[half:]).square().mean()).backward()

    sides = {}
    for work in (ours, bare):
        transformer = place(load_denoiser(run), run).transformer
        params = train.add_lora(transformer, run.rank, 0)
        sides[work] = transformer, params, train.make_optimizer(params, run), []
    for step in tqdm(range(rounds), desc="interleaved steps"):
        for work, (transformer, params, optimizer, took) in sides.items():
            gc.collect()
            idle, start = torch.cuda.memory_allocated(), time.perf_counter()  # 0 without a GPU
            with peak_memory() as peak:
                work(transformer, params, step)
                optimizer.step()
                optimizer.zero_grad()
            getattr(torch, run.device).synchronize()
            memory = torch.cuda.max_memory_allocated() - idle or peak[1] - peak[0]
            took.append((1e3 * (time.perf_counter() - start), memory / 2**20))
    mine, other = (torch.tensor(rows).median(0).values.tolist() for *_, rows in sides.values())
    for what, a, b, unit in zip(("time", "memory above idle"), mine, other, ("ms", "MiB")):
        ratio = f"{a / b:.3f}" if b >= 1 else "too small to tell"
        print(f"{what}: train.py {a:.0f}, bare loop {b:.0f} {unit}, ratio {ratio}")

def proof(args):
    """Two steps of train.py's own loss on FLUX.1-dev's transformer, with 11.9 B random int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    run = argparse.Namespace(loss="inpo", beta=1.0, guidance=1.0, **train.TABLE6["object"])
    with stage("build", args.out) as build_peak:
        transformer = build("transformer", FLUX["transformer"])
        layers = [m for m in transformer.modules() if list(m.parameters(recurse=False))]
        torch.manual_seed(0)
        for layer in tqdm(layers, desc="random int8 weights"):
            layer.to_empty(device="cpu")
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()
                quantize_(layer, Int8WeightOnlyConfig(version=2))
            else:
                torch.nn.init.ones_(layer.weight)
    params = train.add_lora(transformer.requires_grad_(False), 4, 0)
    transformer.enable_gradient_checkpointing()
    optimizer, rng = torch.optim.AdamW(params, lr=1e-3), torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, 16, 64, generator=rng) for _ in range(2))  # (2B, L, D): 64 px
    texts = torch.randn(2, 32, 4096, generator=rng), torch.randn(2, 768, generator=rng)  # (2B, T, E), (2B, P)
    losses = []
    with stage("train", args.out) as train_peak:
        for step in range(3):
            start = time.perf_counter()
            loss, info = train.iteration(transformer, x, torch.ones(1, 16, 64), *texts,
                                         torch.tensor([0.5, 0.5]), eps, run)
            losses.append(inpo_loss(info["dS"], run.eta, run.gamma, run.tau).item())
            print(f"step {step}: dS {info['dS'].item():.6g}, INPO loss {losses[-1]:.6f}, prior "
                  f"{info['prior'].item():.3g}, {time.perf_counter() - start:.0f} s for the loss")
            if step == 0 and info["dS"].item() != 0:
                die("--proof: dS is not exactly 0 before the first step", 1)
            if step < 2:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    train.save_lora(transformer, args.out)
    saved = train.get_peft_model_state_dict(transformer)
    loaded = FluxPipeline.lora_state_dict(args.out)
    same = all(torch.equal(loaded[f"transformer.{name}"], value) for name, value in saved.items())
    planned, *_ = plan("black-forest-labs/FLUX.1-dev", 64, "float32", 1, 1, texts=32, states=2)
    planned = planned["train --checkpointing"]["int8"]
    idle, peak = build_peak[0], max(build_peak[1], train_peak[1])
    print(f"LoRA: {sum(p.numel() for p in params):,} parameters, saved and loaded again: "
          f"{'the same' if same else 'NOT the same'}; loss {' > '.join(f'{v:.6f}' for v in losses)}")
    print(f"peak {peak / GIB:.2f} GiB of RSS; above idle {(peak - idle) / GIB:.2f}, "
          f"planned {planned / GIB:.2f}")
    if not (same and losses[0] > losses[1] > losses[2]):
        die("--proof: failed", 1)

def main(args):
    check_folder("out", args.out)
    if args.bench in ("memory", "step"):  # glibc is to return freed memory, or RSS stays high
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).mallopt(-3, 65536)  # -3: M_MMAP_THRESHOLD
    dict(plan=show_plan, memory=measure_memory, step=measure_step, proof=proof)[args.bench](args)

if __name__ == "__main__":
    guarded(main, ARGS)
